"""Is the baseline as fast as the published code? Both edit the same records, in turns, on this machine.

    cd benchmarks
    python -m torch_baseline.against_published --python published/bin/python --repo FE --model DIR --requests \
        counterfact.json --templates templates.json --moments moments.safetensors --layers 3 4 5 6 7

Run it where jaxedit and torch are installed; `--python` is the interpreter of the environment that
``benchmarks/published_code.py`` describes. The first losses show that both see the same rows and weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch

import jaxedit as je
from jaxedit.data.tokens import check_templates, prompt_row

from .anchors import find_anchor
from .edit import apply, replay, restore
from .models import load


class Turns:
    """The published code in its own process: it measures one thing when it is told to."""

    def __init__(self, python: str, options: list[str]):
        script = Path(__file__).parents[1] / "published_code.py"
        command = [python, str(script), "--turns", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def measure(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the published code ended with status {self.process.wait()}; its error is above")
        return json.loads(line)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", required=True, help="interpreter of the published code's environment")
    parser.add_argument("--repo", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", required=True)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--moments", required=True)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["fe", "memit"])
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--cov-weight", type=float, default=1500.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = ["repo", "model", "requests", "templates", "moments", "count", "steps", "lr"]
    options = [x for name in shared for x in (f"--{name}", str(getattr(args, name)))]
    options += ["--cov-weight", str(args.cov_weight), "--layers", *map(str, args.layers), "--methods", *args.methods]
    published = Turns(args.python, options)
    model, tokenizer = load(args.model, device=device)
    requests = je.read_requests(args.requests)[: args.count]
    templates = check_templates(json.loads(args.templates.read_text()))
    moments = {l: m.matrix for l, m in je.SecondMoments.load(args.moments).items()}
    anchor = je.AnchorConfig(steps=args.steps, lr=args.lr)
    first_anchor = je.AnchorConfig(steps=2, lr=args.lr)
    find_anchor(model, tokenizer, requests[0], args.layers[0], first_anchor, templates)
    record = {}
    print("method  record  steps: ours  published  first loss: ours  published  ms a step: ours  published   ratio")
    for method in args.methods:
        rows, layer = [], args.layers[0 if method == "fe" else -1]
        for i, request in enumerate(requests):
            theirs = published.measure()
            start = time.perf_counter()
            found = find_anchor(model, tokenizer, request, layer, anchor, templates)
            if method == "fe":
                clean = [prompt_row(tokenizer, request)]
                replay(model, clean, args.layers, found.value[None])
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            ours = {"seconds": seconds, "updates": found.updates, "losses": found.losses.tolist()}
            rows.append({"ours": ours, "published": theirs})
            steps = [len(x["losses"]) for x in (ours, theirs)]
            ms = [1000 * x["seconds"] / n for x, n in zip((ours, theirs), steps, strict=True)]
            first = [x["losses"][0][0] for x in (ours, theirs)]
            cells = (method, i, *steps, *first, *ms, ms[0] / ms[1])
            print(
                "{:6s}  {:6d}  {:11d}  {:9d}  {:16.6f}  {:9.6f}  {:15.1f}  {:9.1f}  {:6.3f}".format(*cells), flush=True
            )
        theirs = published.measure()
        given = (requests, method, args.layers, anchor, args.cov_weight, templates, moments)
        result = apply(model, tokenizer, *given)
        restore(model, result)
        ours = result["seconds"]["keys"] + result["seconds"]["solve"]
        both = f"ours {ours:.2f} s, published {theirs['seconds']:.2f} s"
        print(f"{method}: keys and solve of {len(requests)} edits: {both}")
        norms = [float(d.norm()) for d in result["deltas"].values()]
        record[method] = {"anchors": rows, "edit": {"ours": ours, "published": theirs, "our_update_norms": norms}}
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
