"""What do the key second moments of the edited layers cost, against PyTorch's pass per layer and its single pass?

    python benchmarks/bench_statistics.py --tokens 200000 --out benchmarks/results/statistics_cpu.json

All three see the same documents, cut at 512 tokens: jaxedit packed into rows, PyTorch sorted by length and padded.
"torch, a pass per layer" is the published procedure, "torch, one pass" collects all layers at once. Where the corpus
has fewer tokens than asked for, it is read again from the start.
"""

from __future__ import annotations

import itertools

import flops
import numpy as np
import workload
from harness import Side, arguments, interleave, parse, record
from records import Ratio, Results

FULL = {"count": 1, "steps": 25, "repeats": 3, "tokens": 200_000}
QUICK = {"repeats": 1, "tokens": 4096}
LENGTH = 512
TORCH_ROWS = 8  # documents a batch
QUESTION = "What do key statistics of the edited layers cost?"


def documents(work: workload.Workload, corpus, tokens: int) -> list:
    """Rows of packed documents for `tokens` tokens; made-up ones where the model is."""
    from jaxedit.data.corpus import pack_documents, read_corpus

    if work.shape is not None:
        return [synthetic_row(work.shape["vocab_size"], i) for i in range(-(-tokens // LENGTH))]
    _, tokenizer = workload.jax_model(work)
    texts = list(read_corpus(corpus))
    return list(pack_documents(tokenizer, itertools.cycle(texts), LENGTH, tokens))


def synthetic_row(vocab: int, seed: int):
    """A row full of documents of made-up tokens, of 30 to 250 tokens each."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(0, vocab, LENGTH, np.int32)
    segments, positions = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32)
    at, number = 0, 1
    while at < LENGTH:
        size = min(int(chance.integers(30, 250)), LENGTH - at)
        segments[at : at + size], positions[at : at + size] = number, np.arange(size)
        at, number = at + size, number + 1
    return tokens, positions, segments


def fingerprint(matrices: dict) -> dict[int, np.ndarray]:
    """Products with a fixed vector, by which large matrices can be compared across processes."""
    return {l: np.asarray(m @ np.ones(m.shape[1], m.dtype)) for l, m in matrices.items()}


def jax_tasks(backend, work: workload.Workload, corpus, tokens: int):
    from jaxedit.moments_pass import moments_of_rows
    from jaxedit.statistics import rows_a_step

    model, _ = workload.jax_model(work)
    rows = documents(work, corpus, tokens)
    layers = workload.method("fe", model.config, 25).layers
    found = {}

    def second_moments(steps=None):
        batch = rows_a_step(model.params, LENGTH)
        some = rows if steps is None else rows[: steps * batch]
        found["matrices"], count = moments_of_rows(model.params, model.config, some, layers, batch=batch)
        return count

    def counted():
        real = int(sum(np.count_nonzero(r[2]) for r in rows))
        return {
            "tokens": real,
            "layers": layers,
            "padding": len(rows) * LENGTH / real,
            "one pass": flops.statistics_one_pass(model.config, real, layers),
            "pass per layer": flops.statistics_per_layer(model.config, real, layers),
        }

    return {
        "rows": lambda: [t[s == i] for t, _, s in rows for i in range(1, int(s.max()) + 1)],
        "second moments": second_moments,
        "counted": counted,
        "fingerprint": lambda: fingerprint(found["matrices"]),
    }


def torch_tasks(backend, work: workload.Workload):
    from torch_baseline import statistics

    model, _ = workload.torch_model(work, backend.device)
    layers = workload.method("fe", workload.config_of(work), 25).layers
    held = {}

    def keep(rows):
        held["rows"] = rows

    def run(function):
        held["matrices"] = function(model, held["rows"], layers, TORCH_ROWS)

    def on_host():
        return fingerprint({l: m.float().cpu().numpy() for l, m in held["matrices"].items()})

    return {
        "keep": keep,
        "pass per layer": lambda: run(statistics.per_layer),
        "one pass": lambda: run(statistics.one_pass),
        "fingerprint": on_host,
    }


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="tokens of the corpus")
    parser.add_argument("--corpus", help="anything that second_moments takes (default: the packaged corpus)")
    args = parse(parser, FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    with (
        Side("jax", jax_tasks, work, args.corpus, args.tokens, threads=args.threads) as ours,
        Side("torch", torch_tasks, work, threads=args.threads) as theirs,
    ):
        theirs("keep", ours("rows").value)
        calls = {
            "jaxedit": lambda: ours("second moments"),
            "torch, one pass": lambda: theirs("one pass"),
            "torch, a pass per layer": lambda: theirs("pass per layer"),
        }
        first = ours("second moments", 1)  # compiles what all steps share
        warm = interleave(args.repeats, calls)
        expected, mine = theirs("fingerprint").value, ours("fingerprint").value
        error = max(np.linalg.norm(mine[l] - expected[l]) / np.linalg.norm(expected[l]) for l in mine)
        counted = ours("counted").value
        ceilings = {"jaxedit": ours("ceiling", work.dtype).value, "torch": theirs("ceiling", work.dtype).value}
        made = {}
        found = {"seconds_of_first_step_with_compilation": first.seconds}
        if work.shape is None:
            found["relative_difference_to_torch"] = float(error)
        for side, samples in warm.items():
            work_done = counted["pass per layer" if "per layer" in side else "one pass"]
            settings = work.settings(tokens=counted["tokens"], layers=counted["layers"], padding=counted["padding"])
            made[side] = record(
                "statistics",
                side,
                (ours if side == "jaxedit" else theirs).about,
                settings,
                samples,
                flops=work_done,
                counted="2 per weight and token up to the keys; Gram matrices whole (a pass per layer) or half",
                ceiling=ceilings[side.split(",")[0]],
                found=found if side == "jaxedit" else {},
            )
    results.records += made.values()
    for side in ("torch, a pass per layer", "torch, one pass"):
        results.ratios.append(Ratio.of(f"statistics against {side}", made["jaxedit"], made[side]))
    results.finish()


if __name__ == "__main__":
    main()
