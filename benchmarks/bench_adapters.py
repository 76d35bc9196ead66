"""What does inference cost with adapters that hold many edits, against the same model without them?

    python benchmarks/bench_adapters.py --out benchmarks/results/adapters.json

`generate_tokens` runs with and without them in turns in one process, for one token, which is the pass over the prompt,
and for more, whose difference is the decode steps. Each run with an adapter stands between two without, and what counts
is the median of its ratios to their mean. The model has GPT-2-XL's sizes and random weights, and adapters hold random
keys, none of which is hit: both say the same tokens, and what an adapter costs does not depend on what it holds. An
edit has 2.69 tokens in its target, as in zsRE, and so as many neurons of iReVa and rows of the cache, but one row of
GRACE. As published iReVa takes 4.6 % more time for a call of 256 tokens at 10,000 edits (Table 6, on an A100).
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np
from harness import Side, arguments, parse
from records import Record, Results, Timing
from workload import random_decoder, shape

FULL = {"shape": "gpt2-xl", "edits": (100, 1000, 10000), "repeats": 12, "tokens": 8, "batches": (1,)}
QUICK = {"shape": "tiny", "edits": (100, 1000), "repeats": 3, "tokens": 24, "batches": (1, 2)}
KINDS = ("none", "iReVa", "GRACE", "cache")
TOKENS = 2.69  # of a target
CALL = 256  # tokens of a call, as published
QUESTION = "How much longer does inference take with adapters?"


def adapter(kind: str, model, edits: int, room: int = 0):
    """An adapter with random keys, and how many rows it uses and holds. room: of an iReVa, neurons at least."""
    import jax
    import jax.numpy as jnp

    from jaxedit.adapters import grace
    from jaxedit.adapters.caching import Cache
    from jaxedit.adapters.codebook import room as grown
    from jaxedit.adapters.ireva import IReVa
    from jaxedit.adapters.ireva_neurons import Neurons, standardised
    from jaxedit.adapters.rows import append
    from jaxedit.presets import preset_name

    config = model.config
    n = edits if kind == "GRACE" else round(TOKENS * edits)

    def drawn(rows: int, width: int):
        return standardised(jax.random.normal(jax.random.key(edits), (rows, width), jnp.float32))

    if kind == "GRACE":
        settings = grace.Grace(**grace.PRESETS.get(preset_name(config) or "", {}))
        empty, rows = settings.empty(model), grown(n)
        free = jnp.where(jnp.arange(rows) < n, jnp.arange(rows, dtype=jnp.int32), -1)
        made = dataclasses.replace(
            empty,
            keys=drawn(rows, empty.keys.shape[1]),
            values=drawn(rows, empty.values.shape[1]),
            radii=jnp.ones(rows),
            labels=jnp.zeros((rows, 4), jnp.int32),
            owner=free,
            row=free,
            resized=jnp.full(rows, -1, jnp.int32),
            before=jnp.zeros(rows),
            count=jnp.asarray(n, jnp.int32),
        )
        return made, n, rows
    owner = jnp.asarray(np.minimum(np.arange(n) / TOKENS, edits - 1), jnp.int32)
    columns = {"keys": drawn(n, config.d_model), "owner": owner}
    given = jnp.asarray(edits, jnp.int32)
    if kind == "cache":
        squares = jnp.sum(columns["keys"] ** 2, -1)
        columns = append(None, columns | {"squares": squares, "tokens": jnp.zeros(n, jnp.int32)})
        last = config.n_layer - 1
        return Cache(**columns, radius=jnp.ones(()), given=given, layers=(last,), asks=last), n, len(columns["owner"])
    s = IReVa()
    columns = append(None, columns | {"values": columns["keys"], "biases": jnp.full(n, s.theta * (config.d_model - 1))})
    spare = max(0, room - len(columns["owner"]))
    fill = {name: -1 if name == "owner" else 0 for name in columns}
    columns = {
        name: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1), constant_values=fill[name])
        for name, x in columns.items()
    }
    settings = {name: getattr(s, name) for name in ("alpha", "theta", "gate", "pool", "positions")}
    made = Neurons(**columns, given=given, layers=(s.layer_in(config),), act=config.act, **settings)
    return made, n, len(columns["owner"])


def jax_tasks(backend, name: str, dtype: str, length: int):
    import jax
    import jax.numpy as jnp

    from jaxedit.evaluation.generation import generate_tokens

    model = random_decoder(shape(name), dtype)
    config, params = model.config, model.params

    prompts, sides = {}, {}

    def prepare(runs):
        """Adapters of all runs; how many rows each uses and holds."""
        found = []
        for kind, edits, batch, room in runs:
            made, used, held = (None, 0, 0) if kind == "none" else adapter(kind, model, edits, room)
            sides[kind, edits, batch, room] = params if made is None else {**params, "adapters": (made,)}
            prompts[batch] = np.random.default_rng(0).integers(config.vocab, size=(batch, length)).astype(np.int32)
            found.append((used, held))
        return found

    def timed(params, batch: int, tokens: int):
        """Seconds of the pass over the prompt, and of a step after it, and what was said."""
        prompt, seconds, said = prompts[batch], [], None
        for new in (1, 1 + tokens):
            start = time.perf_counter()
            said = jax.block_until_ready(generate_tokens(params, config, prompt, np.ones_like(prompt), new))[0]
            seconds.append(time.perf_counter() - start)
        return np.asarray([seconds[0], (seconds[1] - seconds[0]) / tokens]), np.asarray(said)

    def measure(tokens: int, begin: int):
        """For each run seconds ``[2, 2]`` without and with, the former the mean of right before and right after."""
        found, before = {}, None
        order = [*sides][begin % len(sides) :] + [*sides][: begin % len(sides)]
        for run in order:
            batch = run[2]
            if before is None or before[0] != batch:
                before = (batch, *timed(params, batch, tokens))
            extra, said = timed(sides[run], batch, tokens)
            after = (batch, *timed(params, batch, tokens))
            assert np.array_equal(said, after[2]), "an edit was hit"
            found[run] = [((before[1] + after[1]) / 2).tolist(), extra.tolist()]
            before = after
        return [found[run] for run in sides]

    def about():
        """Bytes of the weights, and bytes a second at which they can be read."""
        total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
        widest = max(jax.tree.leaves(params), key=lambda x: x.nbytes)
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            total(widest).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return {"bytes": sum(x.nbytes for x in jax.tree.leaves(params)), "byte_per_s": widest.nbytes / min(seconds)}

    return {"prepare": prepare, "measure": measure, "about": about}


def spread(found) -> tuple[float, float, float]:
    """Median and quartiles of how many percent longer the second of each pair took."""
    more = [100 * (b / a - 1) for a, b in zip(*found, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4, method="inclusive")
    return middle, low, high


def main():
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, nargs="+", help="how many edits; batches of more than 1: the last of them")
    parser.add_argument("--batches", type=int, nargs="+", help="rows that are generated at once")
    parser.add_argument("--tokens", type=int, help="decode steps of a run")
    parser.add_argument("--length", type=int, default=32, help="tokens of the prompt")
    args = parse(parser, FULL, QUICK)
    dtype, most = args.dtype or "float32", max(args.edits)
    results = Results(QUESTION, args)
    runs = []
    for batch in args.batches:
        runs.append(("none", 0, batch, 0))
        runs += [(k, n, batch, 0) for k in KINDS[1:] for n in (args.edits if batch == 1 else [most])]
    runs.append(("iReVa", min(args.edits), 1, round(TOKENS * most)))
    head = ("adapter", "edits", "rows", "room", "batch")
    rows = [(*head, "decode step", "quartiles", "ms", "of reading", "prompt", "quartiles", f"{CALL} tokens")]
    with Side("jax", jax_tasks, args.shape, dtype, args.length, threads=args.threads) as side:
        read = side("about").value
        least = read["bytes"] / read["byte_per_s"]
        sizes = side("prepare", runs).value
        side("measure", args.tokens, 0)  # compiles
        rounds = []
        for i in range(args.repeats):
            rounds.append(side("measure", args.tokens, i).value)
            print(f"round {i + 1} of {args.repeats}", flush=True)
        for (kind, edits, batch, room), (used, held), samples in zip(
            runs, sizes, zip(*rounds, strict=True), strict=True
        ):
            stages = np.asarray(samples).transpose(2, 1, 0).tolist()  # stage, without or with, round
            found = dict(zip(("prefill", "decode"), stages, strict=True))
            settings = {"shape": args.shape, "dtype": dtype, "edits": edits, "batch": batch, "prompt": args.length}
            counted = {"rows": used, "room": held}
            longer = {stage: spread(found[stage]) for stage in ("decode", "prefill")}
            for stage, (middle, *quartiles) in longer.items():
                without, extra = (Timing(tuple(x)) for x in found[stage])
                name = f"{stage}, {edits} edits, batch {batch}" + (f", room for {room}" if room else "")
                share = {"longer_percent": {"median": middle, "quartiles": quartiles}}
                seconds = {"run": extra, "without": without}
                results.records.append(Record(name, kind, side.about, settings, seconds, found=counted | share))
            step, prompt = (statistics.median(found[stage][0]) for stage in ("decode", "prefill"))
            more = statistics.median(b - a for a, b in zip(*found["decode"], strict=True))
            call = (prompt * longer["prefill"][0] + CALL * step * longer["decode"][0]) / (prompt + CALL * step)
            row = (kind, f"{edits:,}", f"{used:,}", f"{held:,}", str(batch))
            row += (*percent(longer["decode"]), f"{1000 * more:+.2f}", f"{100 * more / least:+.1f} %")
            rows.append((*row, *percent(longer["prefill"]), f"{call:+.2f} %"))
            print("  ".join(rows[-1]), flush=True)
    results.tables.append(rows)
    results.notes += [
        f"How much longer a decode step, and the pass over {args.length} prompt tokens, takes than without an adapter: "
        f"median and quartiles of {args.repeats} rounds of {args.tokens} steps each. Each run stands between two "
        'without. "none" is no adapter either, and shows the noise.',
        f"*ms*: what a step takes longer; *of reading*: relative to the {1000 * least:.0f} ms in which the "
        f"{read['bytes'] / 1e9:.2f} GB of weights can be read once at {read['byte_per_s'] / 1e9:.1f} GB/s, the least "
        f"that a step could take; *{CALL} tokens*: the pass over the prompt and so many steps, from the medians.",
        "*rows* are in use, and there is *room* for more, which costs the same. The last line has few edits and room "
        "for many.",
    ]
    results.finish()


def percent(longer: tuple[float, float, float]) -> tuple[str, str]:
    middle, low, high = longer
    return f"{middle:+.2f} %", f"{low:+.2f} to {high:+.2f}"


if __name__ == "__main__":
    main()
