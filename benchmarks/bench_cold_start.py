"""How long until a first edit, from a fresh process?

    python benchmarks/bench_cold_start.py --out benchmarks/results/cold_start_cpu.json

Import times are of fresh Python processes, taken in turn. The first edit is one Forward Replay edit with templates
and second moments at hand: a process starts, imports, loads the model and edits, once with an empty compilation
cache and then with the cache that this left, against PyTorch with transformers doing the same. The baseline takes its
tokenisation from jaxedit; importing that is subtracted from its time.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import workload
from harness import THREADS, Side, arguments, compilation_cache, parse
from records import Ratio, Record, Results, Timing

FULL = {"count": 1, "steps": 25, "repeats": 5, "tokens": 20_000}
QUICK = {"steps": 3, "repeats": 1, "tokens": 4096}
EVERYTHING = "import jaxedit as je; je.load, je.read_requests, je.apply_edits, je.evaluate"
IMPORTS = {
    "jaxedit": "import jaxedit",
    "jaxedit, all that an edit uses": EVERYTHING,
    "jax": "import jax",
    "torch": "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer",
}
CHILD = Path(__file__).parent / "cold_child.py"
QUESTION = "How long until a first edit, from a fresh process?"


def prepare_tasks(backend, work: workload.Workload, tokens: int):
    import jaxedit as je
    from jaxedit.data.templates import sample_templates

    def prepare(file: Path):
        """Templates and second moments, for both sides."""
        model, tokenizer = workload.jax_model(work)
        layers = workload.method("fe", model.config, 25).layers
        stats = je.second_moments(model, tokenizer, None, layers, max_tokens=tokens)
        matrices = {l: stats[l].matrix for l in layers}
        file.write_bytes(pickle.dumps((work, sample_templates(model, tokenizer, 0), matrices)))

    return {"prepare": prepare}


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    start = time.perf_counter()
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    seconds = time.perf_counter() - start
    if made.returncode:
        raise SystemExit(made.stderr)
    return seconds, made.stdout


def main():
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, help="tokens for the second moments")
    args = parse(parser, FULL, QUICK)
    work = workload.make(args)
    results = Results(QUESTION, args)
    with Side("jax", prepare_tasks, work, args.tokens) as ours, Side("torch", nothing) as theirs:
        about = {"jax": ours.about, "torch": theirs.about}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "prepared.pickle"
            ours("prepare", file)
            ours.close(), theirs.close()
            imports(results, args, about)
            first_edits(results, args, work, about, file)
    results.finish()


def nothing(backend):
    """A side that is only asked what it is."""
    return {}


def imports(results: Results, args, about):
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(args.repeats + 1):
        for name, code in IMPORTS.items():
            samples[name].append(timed([sys.executable, "-c", code], {})[0])
    for name, seconds in samples.items():
        side = "torch" if name == "torch" else "jax"
        results.records.append(
            Record(f"import {name}", side, about[side], {"code": IMPORTS[name]}, {"run": Timing(tuple(seconds[1:]))})
        )
    _, whole, _, other = results.records  # a bare import loads nothing yet, so it is no match for torch's
    results.ratios.append(Ratio.of(f"{whole.name}, against torch and transformers", whole, other))
    command = [sys.executable, "-X", "importtime", "-c", EVERYTHING]
    text = subprocess.run(command, capture_output=True, text=True)
    rows = [line.removeprefix("import time:").split("|") for line in text.stderr.splitlines() if "|" in line][1:]
    rows = [(int(own), int(total), name) for own, total, name in rows]
    slow = sorted((r for r in rows if r[1] > 20_000), key=lambda r: -r[1])[:12]
    shown = ", ".join(f"{name.strip()} {total / 1e6:.2f} s" for _, total, name in slow)
    results.notes.append(f"Slowest imports of what an edit uses, with what they import: {shown}.")


def first_edits(results: Results, args, work, about, file: Path):
    found: dict[str, list[tuple[float, dict]]] = {"empty cache": [], "warm cache": [], "torch": []}
    threads = {name: str(args.threads) for name in THREADS}
    for _ in range(max(1, args.repeats // 2)):
        with tempfile.TemporaryDirectory() as cache:
            for name in found:
                kind = "torch" if name == "torch" else "jax"
                command = [sys.executable, str(CHILD), kind, str(file), str(args.steps)]
                total, out = timed(command, {**threads, **compilation_cache(cache)})
                stages = json.loads(out.splitlines()[-1])
                found[name].append((total - stages.pop("not counted"), stages))
    for name, runs in found.items():
        side = "torch" if name == "torch" else "jax"
        seconds = {"run": Timing(tuple(total for total, _ in runs))}
        seconds |= {stage: Timing(tuple(s[stage] for _, s in runs)) for stage in runs[0][1]}
        label = "first edit" if side == "torch" else f"first edit, {name}"
        results.records.append(Record(label, side, about[side], work.settings(steps=args.steps), seconds))
        shown = ", ".join(f"{stage} {t.median:.2f} s" for stage, t in seconds.items() if stage != "run")
        results.notes.append(f"{label} ({side}): {seconds['run'].median:.2f} s from start to end, of it {shown}.")
    *ours, torch = results.records[-3:]
    for made in ours:
        results.ratios.append(Ratio.of(f"{made.name}, whole process", made, torch))


if __name__ == "__main__":
    main()
