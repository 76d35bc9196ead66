"""What do dense Jacobians between layers cost, against PyTorch's transforms over the same Hugging Face layers?

    python benchmarks/bench_jacobian.py --requests counterfact.json --out benchmarks/results/jacobian_cpu.json

The Jacobian of the decisive token from the output of layer 3 to that of layer 7, for 16 prompts. PyTorch runs the
layers on each prompt up to its decisive token, by `torch.func.jacfwd` and by `torch.autograd.functional.jacobian`; the
ratio is against the faster of the two. `jacfwd, one token` is a better baseline than either: the same layers on the
decisive token alone, with the earlier tokens' keys and values in a cache, which is what jaxedit does.
"""

from __future__ import annotations

import numpy as np
import workload
from harness import Side, arguments, interleave, parse, record
from records import Ratio, Results

FULL = {"count": 16, "steps": 25, "repeats": 5}
QUICK = {"count": 2, "repeats": 1}
SOURCE, TARGET = 3, 7
QUESTION = "What do dense Jacobians between layers cost?"
PLAIN = ("jacfwd", "functional.jacobian")
BETTER = "jacfwd, one token"


def jax_tasks(backend, work: workload.Workload):
    from jaxedit.analysis.jacobian import jacobian, stretch

    model, tokenizer = workload.jax_model(work)

    def dense():
        return jacobian(stretch(model, tokenizer, work.requests, SOURCE, TARGET))

    return {"jacobian": dense}


def torch_tasks(backend, work: workload.Workload):
    import torch
    from transformers import DynamicCache

    from jaxedit.data.tokens import prompt_row

    model, tokenizer = workload.torch_model(work, backend.device)
    model.set_attn_implementation("eager")  # the fused attention has no forward-mode derivative
    layers, rotary = model.model.layers, model.model.rotary_emb
    prompts = []
    for request in work.requests:
        row = prompt_row(tokenizer, request)
        prompts.append(torch.tensor([row.tokens[: row.lookup + 1]], device=backend.device))

    def entering(tokens):
        """What enters the layer after the source, and the mask and rotary angles of the prompt."""
        with torch.no_grad():
            h = model(tokens, output_hidden_states=True).hidden_states[SOURCE + 1]
        n = h.shape[1]
        mask = torch.full((n, n), torch.finfo(h.dtype).min, dtype=h.dtype, device=h.device).triu(1)[None, None]
        return h, mask, rotary(h, torch.arange(n, device=h.device)[None])

    def of_prompt(tokens):
        h, mask, angles = entering(tokens)

        def reach(delta):
            x = torch.cat([h[:, :-1], h[:, -1:] + delta], 1)
            for layer in layers[SOURCE + 1 : TARGET + 1]:
                x = layer(x, attention_mask=mask, position_embeddings=angles)
            return x[0, -1]

        return reach, torch.zeros_like(h[0, -1])

    def of_token(tokens):
        h, mask, angles = entering(tokens)
        cache = DynamicCache()
        with torch.no_grad():
            x = h[:, :-1]
            for layer in layers[SOURCE + 1 : TARGET + 1] if x.shape[1] else ():
                before = tuple(a[:, :-1] for a in angles)
                x = layer(x, attention_mask=mask[..., :-1, :-1], position_embeddings=before, past_key_values=cache)
        here = tuple(a[:, -1:] for a in angles)
        known = {l: (cache.layers[l].keys, cache.layers[l].values) for l in range(SOURCE + 1, len(cache.layers))}

        def reach(delta):
            again = DynamicCache()
            for l, (k, v) in known.items():
                again.update(k, v, l)
            x = h[:, -1:] + delta
            for layer in layers[SOURCE + 1 : TARGET + 1]:
                x = layer(x, attention_mask=None, position_embeddings=here, past_key_values=again)
            return x[0, -1]

        return reach, torch.zeros_like(h[0, -1])

    def stacked(make, transform):
        found = [transform(*make(tokens)) for tokens in prompts]
        return torch.stack(found).detach().cpu().numpy()

    def forward_mode(reach, at):
        return torch.func.jacfwd(reach)(at)

    def functional(reach, at):
        return torch.autograd.functional.jacobian(reach, at, vectorize=True)

    return {
        "jacfwd": lambda: stacked(of_prompt, forward_mode),
        "functional.jacobian": lambda: stacked(of_prompt, functional),
        BETTER: lambda: stacked(of_token, forward_mode),
    }


def main():
    args = parse(arguments(__doc__), FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    with (
        Side("jax", jax_tasks, work, threads=args.threads) as ours,
        Side("torch", torch_tasks, work, threads=args.threads) as theirs,
    ):
        calls = {"jaxedit": lambda: ours("jacobian")}
        calls |= {name: lambda name=name: theirs(name) for name in (*PLAIN, BETTER)}
        first = {name: call() for name, call in calls.items()}
        warm = interleave(args.repeats, calls)
    mine = warm["jaxedit"][-1].value
    n, d, _ = mine.shape
    for name in calls:
        gap = float(np.linalg.norm(warm[name][-1].value - mine) / np.linalg.norm(mine))
        settings = work.settings(prompts=n, d_model=d, source=SOURCE, target=TARGET)
        about = ours.about if name == "jaxedit" else theirs.about
        label = "jaxedit" if name == "jaxedit" else f"torch, {name}"
        found = {"difference_to_jaxedit": gap}
        results.records.append(record("jacobian", label, about, settings, warm[name], first[name], found=found))
    by_name = dict(zip(calls, results.records, strict=True))
    faster = min(PLAIN, key=lambda name: by_name[name].seconds["run"].median)
    results.ratios.append(Ratio.of(f"jacobian, warm, {faster}", by_name["jaxedit"], by_name[faster]))
    results.ratios.append(Ratio.of(f"jacobian, warm, {BETTER}", by_name["jaxedit"], by_name[BETTER]))
    results.ratios.append(
        Ratio.of(f"jacobian, first with compilation, {faster}", by_name["jaxedit"], by_name[faster], "first")
    )
    results.finish()


if __name__ == "__main__":
    main()
