"""What does inference cost with adapters that hold many edits, against the same model without them?

    python benchmarks/bench_adapters.py --out benchmarks/results/adapters.json

Adapters with and without take turns in one process, token by token, on the same forced tokens; what counts is the
median of the ratios of neighbours. Decode steps and the pass over the prompt are measured apart. The model has
GPT-2-XL's sizes and random weights, and adapters hold random keys: what they cost does not depend on what they hold.
An edit has 2.69 tokens in its target, as in zsRE, and so as many neurons of iReVa and rows of the cache, but one row of
GRACE. As published iReVa takes 4.6 % more time at 10,000 edits (Table 6, an A100, the whole call).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial

import numpy as np
from harness import Side, arguments, parse
from records import Record, Results, Timing
from workload import random_decoder, shape

FULL = {"shape": "gpt2-xl", "edits": (100, 1000, 10000), "repeats": 40, "passes": 12, "batches": (1, 8)}
QUICK = {"shape": "tiny", "edits": (100, 1000), "repeats": 4, "passes": 2, "batches": (1, 2)}
KINDS = ("none", "iReVa", "GRACE", "cache")
TOKENS = 2.69  # of a target
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
        columns = append(None, columns | {"tokens": jnp.zeros(n, jnp.int32)})
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

    from jaxedit.models.transformer import Context, Past, embed, run_and_keep, unembed

    model = random_decoder(shape(name), dtype)
    config, params = model.config, model.params
    chance = np.random.default_rng(0)

    @partial(jax.jit, static_argnames="room")
    def prefill(params, tokens, room: int):
        """Logits after prompts ``[b, s]``, and a cache with room for more tokens; as in `jaxedit.generate`."""
        context = Context.of_mask(jnp.ones_like(tokens)).as_prompts()
        h, past = run_and_keep(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]) for x in (past.k, past.v))
        return unembed(params, config, h[:, -1]), (k, v, past.carried)

    @partial(jax.jit, donate_argnames="kept")
    def decode(params, token, at, kept):
        """Logits after one more token a row ``[b, 1]``, which stands at place `at`, and the cache with it."""
        (k, v, carried), b = kept, len(token)
        slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
        here = Context(jnp.full((b, 1), at), jnp.ones((b, 1), jnp.int32)).ending(jnp.full(b, -1))
        there = Context(*(jnp.broadcast_to(x, (b, k.shape[2])) for x in (slots, (slots < at).astype(jnp.int32))))
        h = embed(params, config, token, here)
        h, new = run_and_keep(params, config, h, here, 0, config.n_layer, Past(k, v, there, carried))
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, one, at, 2) for old, one in ((k, new.k), (v, new.v)))
        return unembed(params, config, h[:, 0]), (k, v, new.carried)

    def timed(function, *given):
        start = time.perf_counter()
        made = jax.block_until_ready(function(*given))
        return time.perf_counter() - start, made

    def turns(repeats: int, call):
        """Seconds ``[2, repeats]`` of ``call(which, i)``, without and with; which goes first alternates."""
        found = np.zeros((2, repeats))
        for i in range(repeats):
            for which in (0, 1) if i % 2 else (1, 0):
                found[which, i] = call(which, i)
        return found.tolist()

    def measure(kind: str, edits: int, batch: int, repeats: int, passes: int, room: int = 0):
        made, used, held = (None, 0, 0) if kind == "none" else adapter(kind, model, edits, room)
        sides = (params, params if made is None else {**params, "adapters": (made,)})
        prompt = chance.integers(config.vocab, size=(batch, length)).astype(np.int32)
        forced = chance.integers(config.vocab, size=(repeats + 3, batch, 1)).astype(np.int32)
        kept = [prefill(side, prompt, room=len(forced))[1] for side in sides]

        def step(which: int, i: int) -> float:
            seconds, (_, kept[which]) = timed(decode, sides[which], forced[i], np.int32(length + i), kept[which])
            return seconds

        for i in range(3):
            step(0, i), step(1, i)
        decoding = turns(repeats, lambda which, i: step(which, i + 3))
        del kept
        once = partial(prefill, room=len(forced))
        prefilling = turns(passes, lambda which, i: timed(once, sides[which], prompt)[0])
        return {"used": used, "held": held, "decode": decoding, "prefill": prefilling}

    def about():
        """Bytes of the weights, and bytes a second at which they can be read."""
        total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
        widest = max(jax.tree.leaves(params), key=lambda x: x.nbytes)
        best = min(timed(total, widest)[0] for _ in range(8))
        return {"bytes": sum(x.nbytes for x in jax.tree.leaves(params)), "byte_per_s": widest.nbytes / best}

    return {"measure": measure, "about": about}


def spread(found) -> tuple[float, float, float]:
    """Median and quartiles of how many percent longer the second of each pair took."""
    more = [100 * (b / a - 1) for a, b in zip(*found, strict=True)]
    low, middle, high = statistics.quantiles(more, n=4, method="inclusive")
    return middle, low, high


def main():
    parser = arguments(__doc__)
    parser.add_argument("--edits", type=int, nargs="+", help="how many edits; batches of more than 1: the last of them")
    parser.add_argument("--batches", type=int, nargs="+", help="rows that are generated at once")
    parser.add_argument("--passes", type=int, help="timed passes over the prompt; --repeats are decode steps")
    parser.add_argument("--length", type=int, default=32, help="tokens of the prompt")
    args = parse(parser, FULL, QUICK)
    dtype, most = args.dtype or "float32", max(args.edits)
    results = Results(QUESTION, args)
    runs = []
    for batch in args.batches:
        runs.append(("none", 0, batch, 0))
        runs += [(k, n, batch, 0) for k in KINDS[1:] for n in (args.edits if batch == 1 else [most])]
    runs.append(("iReVa", min(args.edits), 1, round(TOKENS * most)))
    rows = [("adapter", "edits", "rows", "room", "batch", "decode", "quartiles", "ms", "of reading", "prefill", "quartiles")]
    with Side("jax", jax_tasks, args.shape, dtype, args.length, threads=args.threads) as side:
        read = side("about").value
        least = read["bytes"] / read["byte_per_s"]
        for kind, edits, batch, room in runs:
            found = side("measure", kind, edits, batch, args.repeats, args.passes, room).value
            row = [kind, f"{edits:,}", f"{found['used']:,}", f"{found['held']:,}", str(batch)]
            for stage in ("decode", "prefill"):
                without, extra = (Timing(tuple(x)) for x in found[stage])
                middle, low, high = spread(found[stage])
                name = f"{stage}, {edits} edits" + (f", room for {room}" if room else "")
                settings = {"shape": args.shape, "dtype": dtype, "edits": edits, "batch": batch, "prompt": args.length}
                percent = {"median": middle, "quartiles": [low, high]}
                counted = {"rows": found["used"], "room": found["held"], "longer_percent": percent}
                seconds = {"run": extra, "without": without}
                results.records.append(Record(name, kind, side.about, settings, seconds, found=counted))
                row += [f"{middle:+.2f} %", f"{low:+.2f} to {high:+.2f}"]
                if stage == "decode":
                    more = statistics.median(b - a for a, b in zip(*found[stage], strict=True))
                    row += [f"{1000 * more:+.2f}", f"{100 * more / least:+.2f} %"]
            rows.append(tuple(row))
            print("  ".join(row), flush=True)
    results.tables.append(rows)
    results.notes += [
        f"Longer than without an adapter, median of {args.repeats} pairs of decode steps and {args.passes} pairs of "
        f"passes over {args.length} prompt tokens. \"none\": both of a pair without, which shows the noise.",
        f"*ms*: what a decode step takes longer; *of reading*: that, relative to the {1000 * least:.0f} ms in which the "
        f"{read['bytes'] / 1e9:.2f} GB of weights can be read once at {read['byte_per_s'] / 1e9:.1f} GB/s.",
        "Keys are random and no edit is hit. The last row holds few edits with room for many.",
    ]
    results.finish()


if __name__ == "__main__":
    main()
