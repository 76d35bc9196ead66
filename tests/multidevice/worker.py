"""One process of a run on several devices, and the work that it and one device do alike: see `work`.

python worker.py OUT data model [coordinator processes process_id]
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

LLAMA = Path(__file__).resolve().parents[1] / "goldens" / "tiny-llama"
LAYERS = (1, 2, 3)
TEMPLATES = ("{}", "It is known that {}")
WORDS = "the river town of an old king was built in stone by people who came from the north".split()
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 5 + i % 30)).capitalize() + "." for i in range(60)]
TOKENS = 1200
WIDTH = 48
ROWS = 27  # that those tokens are packed into


def statistics(model, tokenizer, batch: int = 4, on_progress=None, **options):
    """Second moments of 1200 tokens in rows of 48, checkpointed every 200 tokens."""
    from jaxedit.statistics import second_moments

    settings = dict(length=WIDTH, max_tokens=TOKENS, checkpoint_every=200, batch=batch)
    return second_moments(model, tokenizer, TEXTS, LAYERS, **settings, on_progress=on_progress, **options)


def method():
    import jaxedit as je

    anchor = je.AnchorConfig(steps=4)
    solver = je.Ridge(cov_weight=10.0)
    return je.Method(name="fe", targets=je.ForwardReplay(), layers=LAYERS, solver=solver, anchor=anchor)


def edit_tokens(model, tokenizer):
    from jaxedit.data.tokens import check_templates, validate

    return validate(tokenizer, requests(), check_templates(TEMPLATES), model.config.max_positions)


def requests():
    import jaxedit as je

    return je.read_requests(LLAMA / "facts.json")[:7]


def anchors(model, tokenizer, checkpoint, on_progress=None):
    """Anchors in parts of two edits, and how many edits were computed here."""
    from jaxedit.targets.anchor import find_anchors
    from jaxedit.targets.resumable import find_anchors_resumable

    computed = []

    def find(params, config, edits, *rest):
        computed.extend(edits)
        return find_anchors(params, config, edits, *rest)

    edits, recipe = edit_tokens(model, tokenizer), method()
    arguments = (model.params, model.config, edits, LAYERS[0], recipe.anchor, on_progress)
    return find_anchors_resumable(*arguments, checkpoint=checkpoint, part=2, find=find), len(computed)


def work(model, tokenizer) -> dict[str, np.ndarray]:
    """Statistics, an edit with all that it is made of, and its evaluation, as arrays."""
    import jaxedit as je

    moments = statistics(model, tokenizer, cache=False)
    result = je.apply_edits(model, tokenizer, requests(), method(), stats=moments, templates=TEMPLATES)
    report = je.evaluate(model, result.model, tokenizer, requests(), max_neighbours=2, generate=True)
    found = result.targets.anchors[LAYERS[0]]
    blocks = [m.params["blocks"] for m in (model, result.model)]
    down = [np.asarray(b["down"]["w"]) for b in blocks]
    placed = {"edited": blocks[1]["down"]["w"], "down": blocks[0]["down"]["w"], "up": blocks[0]["up"]["w"]}
    placed |= {"norm": blocks[0]["attn_norm"]["scale"], "embed": model.params["embed"]["tokens"]}
    scores = [s for side in (report.base, report.edited, report.specificity) for s in side.values()]
    return {
        **{f"moment.{l}": moments[l].matrix for l in LAYERS},
        "anchors": found.value,
        "losses": np.nan_to_num(found.losses),
        "targets": result.targets.values,
        "update": down[1] - down[0],
        "probability": result.info.probability_after,
        "report": np.asarray([np.nan if s is None else s for s in scores]),
        **{f"shard.{name}": np.asarray(x.addressable_shards[-1].data.shape) for name, x in placed.items()},
    }


def killed_at(stage: str, when):
    """on_progress that ends process 1 as ``kill -9`` does, where KILL names this stage, and what it was told so far."""
    seen = []

    def report(done, *_):
        seen.append(done)
        if os.environ["KILL"] == stage and sys.argv[-1] == "1" and when(seen):
            os.kill(os.getpid(), signal.SIGKILL)

    return report, seen


def main(out: str, data: str, model_axis: str, *processes: str):
    import jax

    import jaxedit as je
    from jaxedit.distributed import connect, is_first

    if processes:
        connect(processes[0], int(processes[1]), int(processes[2]))
    jax.config.update("jax_enable_x64", True)
    model, tokenizer = je.load(LLAMA, "float64", mesh=je.make_mesh(int(data), int(model_axis)))
    to = Path(out).with_suffix(".npz" if is_first() else f".{processes[2]}.npz")
    if "KILL" not in os.environ:
        np.savez(to, **work(model, tokenizer))
        return
    report, seen = killed_at("statistics", lambda seen: seen[-1] > TOKENS // 2)
    moments = statistics(model, tokenizer, on_progress=report)
    np.savez(to.with_suffix(".moments.npz"), seen=seen, **{f"moment.{l}": moments[l].matrix for l in LAYERS})
    report, _ = killed_at("anchors", lambda seen: sum(seen) > 4)  # in its second part of two edits in each of two
    kept, computed = anchors(model, tokenizer, os.environ["JAXEDIT_CACHE"], report)
    np.savez(to, anchors=kept.value, computed=computed)


if __name__ == "__main__":
    main(*sys.argv[1:])
