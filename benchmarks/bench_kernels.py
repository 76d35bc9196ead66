"""How fast is each implementation of the second-moment kernel, against XLA's product and cuBLAS?

    python benchmarks/bench_kernels.py --out benchmarks/results/kernels_h100.json

``total += xᵀ x`` for keys x ``[tokens, d_ff]`` in bfloat16 with float32 sums, at the widths of published models.
On a GPU: the Mosaic kernel (triangle only), XLA, and through PyTorch cuBLAS (the whole product). Without one: XLA and
PyTorch at small widths. FLOPs are those of the triangle, which is what has to be computed.
"""

from __future__ import annotations

from harness import Side, arguments, measure, parse
from records import Ratio, Record, Results

WIDTHS = {"gpt2-xl": 6400, "gptj": 16384, "llama3-8b": 14336, "qwen2.5-7b": 18944}
SMALL = {"smollm2-135m": 1536, "small": 1024}
FULL = {"count": 0, "steps": 0, "repeats": 10, "tokens": 8192}
QUICK = {"repeats": 2, "tokens": 512}
QUESTION = "How fast is each second-moment kernel?"


def jax_tasks(backend, dtype: str):
    import jax
    import jax.numpy as jnp
    from jaxedit_kernels.second_moment import second_moment
    from jaxedit_kernels.second_moment.specs import HOPPER_CANDIDATES

    def run(implementation: str, tokens: int, d: int, repeats: int, candidate: int | None = None):
        spec = None if candidate is None else HOPPER_CANDIDATES[candidate]
        x = jax.random.normal(jax.random.key(0), (tokens, d), dtype)
        step = jax.jit(lambda x, t: second_moment(x, t, implementation=implementation, spec=spec), donate_argnums=1)
        held = [jnp.zeros((d, d), jnp.float32)]

        def once():
            held[0] = step(x, held[0])
            return held[0]

        return measure(once, repeats, jax.block_until_ready)

    return {"run": run, "gpu": lambda: backend.on_gpu, "candidates": lambda: [str(c) for c in HOPPER_CANDIDATES]}


def torch_tasks(backend, dtype: str):
    import torch

    def run(tokens: int, d: int, repeats: int):
        x = torch.randn((tokens, d), device=backend.device).to(getattr(torch, dtype))
        total = torch.zeros((d, d), device=backend.device)

        def once():
            if backend.on_gpu:
                total.add_(torch.mm(x.T, x, out_dtype=torch.float32))
            else:
                wide = x.float()
                total.addmm_(wide.T, wide)

        return measure(once, repeats, backend.wait)

    return {"run": run}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="rows of x")
    parser.add_argument("--tune", action="store_true", help="time every tuning candidate of the Mosaic kernel too")
    args = parse(parser, FULL, QUICK)
    dtype = args.dtype or "bfloat16"
    results = Results(QUESTION, args)
    with (
        Side("jax", jax_tasks, dtype, threads=args.threads) as ours,
        Side("torch", torch_tasks, dtype, threads=args.threads) as theirs,
    ):
        on_gpu = ours("gpu").value
        widths = WIDTHS if on_gpu else SMALL
        if args.shape:
            widths = {args.shape: WIDTHS[args.shape]}
        top = {"jax": ours("ceiling", dtype).value, "torch": theirs("ceiling", dtype).value}
        for label, d in widths.items():
            timings = {"torch": theirs("run", args.tokens, d, args.repeats).value}
            for implementation in ("mosaic_gpu", "xla") if on_gpu else ("xla",):
                timings[implementation] = ours("run", implementation, args.tokens, d, args.repeats).value
            made = {}
            for name, timing in timings.items():
                made[name] = Record(
                    f"second moment, {label}",
                    name,
                    (theirs if name == "torch" else ours).about,
                    {"tokens": args.tokens, "d_ff": d, "dtype": dtype},
                    {"run": timing},
                    flops=args.tokens * d * (d + 1.0),
                    bytes=2.0 * args.tokens * d + 8.0 * d * d,
                    counted="the upper triangle; x read once, the sum read and written once",
                    ceiling=top["torch" if name == "torch" else "jax"],
                    found={"flops_of_whole_product": 2.0 * args.tokens * d * d},
                )
            results.records += made.values()
            if on_gpu and args.tune:
                for i, spec in enumerate(ours("candidates").value):
                    timing = ours("run", "mosaic_gpu", args.tokens, d, args.repeats, i).value
                    results.notes.append(f"{label}: {1000 * timing.median:.3f} ms with {spec}")
            best = made["mosaic_gpu" if on_gpu else "xla"]
            for name, other in made.items():
                if other is not best:
                    results.ratios.append(Ratio.of(f"{best.name}, {best.side} against {name}", best, other))
    results.finish()


if __name__ == "__main__":
    main()
