"""Time the code that was published with Forward Replay (github.com/jugechengzi/FE), which holds MEMIT too.

Runs by itself, in an environment of its own (jaxedit is not needed there):

    python3.11 -m venv published
    published/bin/pip install torch==2.13.0 transformers==4.44.2 "numpy<2.3" omegaconf hydra-core datasets scipy \
        scikit-learn nltk matplotlib
    published/bin/python benchmarks/published_code.py --repo FE --model DIR --requests counterfact.json \
        --templates templates.json --moments moments.safetensors --layers 3 4 5 6 7 --lr 0.5 --out out.json

Of each record it times the anchor (FE's with its replay), then the keys and solves of all records in one batch. The
losses are those that the code itself computes, in full precision, and one unmeasured anchor goes first. Weights are
restored between methods. ``torch_baseline/against_published.py`` runs this in turns with the baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch

SETTINGS = {"llama": "llama3-8b", "gpt2": "gpt2-xl", "gptj": "gpt-j-6b", "qwen2": "qwen2.5-7b", "mistral": "mistral-7b"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of the repository")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--requests", type=Path, required=True, help="CounterFact records, as JSON")
    parser.add_argument("--templates", type=Path, required=True, help='JSON: [["{}"], ["context. {}", ...]]')
    parser.add_argument("--moments", type=Path, required=True, help="second moments, from `jaxedit stats`")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["fe", "memit"], choices=["fe", "memit"])
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--clamp", type=float, default=0.75)
    parser.add_argument("--kl-weight", type=float, default=0.0625)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--cov-weight", type=float, default=15000.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", action="store_true", help="wait for a line on stdin before each measurement, answer")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def as_written_by_4_44(model: Path, made: Path) -> Path:
    """A copy of a model directory, weights linked, that transformers 4.44 reads. Returns `made`."""
    for file in model.iterdir():
        if file.suffix in (".safetensors", ".json") and not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())

    def rewrite(name: str, change):
        content = json.loads((model / name).read_text())
        change(content)
        (made / name).unlink(missing_ok=True)
        (made / name).write_text(json.dumps(content))

    def config(c):
        rope = c.pop("rope_parameters", None) or {}
        if "rope_theta" in rope:
            c["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            c["rope_scaling"] = rope
        c["torch_dtype"] = c.pop("dtype", c.get("torch_dtype", "float32"))

    def tokenizer(t):
        merges = t["model"].get("merges", [])
        t["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]

    rewrite("config.json", config)
    rewrite("tokenizer.json", tokenizer)
    # One that wraps tokenizer.json as it is and emits no token types
    rewrite("tokenizer_config.json", lambda t: t.update(tokenizer_class="GPT2TokenizerFast"))
    return made


class Published:
    """The repository's modules with one model loaded, ready to be timed."""

    def __init__(self, args: argparse.Namespace):
        sys.path.insert(0, str(args.repo))
        sys.modules["z_methods.compute_z_mlp"] = types.ModuleType("compute_z_mlp")  # imported, but not published
        sys.modules["z_methods.compute_z_mlp"].__dict__["compute_z"] = None
        import precompute_z
        import z_methods.compute_z
        from omegaconf import OmegaConf
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.args, self.targets = args, precompute_z
        self.editors = {m: _module(args.repo, f) for m, f in (("fe", "FE-memit_main"), ("memit", "memit_main"))}
        with tempfile.TemporaryDirectory() as made:
            folder = as_written_by_4_44(args.model, Path(made))
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, args.dtype))
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.templates = json.loads(args.templates.read_text())
        moments = load_file(args.moments)
        for module in self.editors.values():
            module.CONTEXT_TEMPLATES_CACHE = self.templates
            module.covs[:] = [moments[str(l)] for l in args.layers]
        config = self.model.config
        settings = OmegaConf.load(args.repo / "configs" / "config.yaml")
        settings.algs = OmegaConf.load(args.repo / "configs" / "algs" / "memit.yaml")
        settings.llms = OmegaConf.load(args.repo / "configs" / "llms" / f"{SETTINGS[config.model_type]}.yaml")
        settings.llms.update(
            layers=args.layers,
            v_num_grad_steps=args.steps,
            v_lr=args.lr,
            clamp_norm_factor=args.clamp,
            kl_factor=args.kl_weight,
            v_weight_decay=args.weight_decay,
            v_loss_layer=config.num_hidden_layers - 1,
            mom2_update_weight=[args.cov_weight] * len(args.layers),
        )
        self.settings = settings
        self.rounded: list[float] = []
        # The only use of numpy there is to round the loss and its terms for printing, once a step
        z_methods.compute_z.np = types.SimpleNamespace(round=lambda x, _: self.rounded.append(x) or x)

    def anchor(self, method: str, request: dict) -> tuple[dict, dict]:
        """Time one anchor: ``(what was measured, targets by layer [d_model, 1])``."""
        layers, common = self.args.layers, (self.model, self.tokenizer, [request], self.settings)
        self.rounded.clear()
        start = self._now()
        if method == "fe":
            found = self.targets.compute_z_batch_first_forward(*common, "firstforward", layers, 1, self.templates)
        else:
            z = self.targets.compute_z_batch_final_layer(*common, "all", layers[-1], 1, self.templates)
            found = {layers[-1]: z}
        seconds = self._now() - start
        losses = [self.rounded[i : i + 4] for i in range(0, len(self.rounded), 4)]  # total, nll, KL, decay
        return {"seconds": seconds, "updates": len(losses) - 1, "losses": losses}, found

    def edit(self, method: str, requests: list[dict], targets: dict) -> dict:
        """Time keys, residuals, solves and writes of all requests in one batch, and put the weights back."""
        rows = [dict(r, target_new=" " + r["target_new"], sample_idx=i) for i, r in enumerate(requests)]
        names = [self.settings.llms.rewrite_module_tmp.format(l) for l in self.args.layers]
        weights = [self.model.get_parameter(f"{name}.weight") for name in names]
        before = [w.detach().clone() for w in weights]
        size = len(self.editors[method].covs[0])
        past = torch.zeros(len(weights), size, size)
        given = (targets,) if method == "fe" else (targets[self.args.layers[-1]], self.args.layers[-1])
        start = self._now()
        self.editors[method].batch_edit(self.settings, self.model, self.tokenizer, rows, self.device, past, *given)
        seconds = self._now() - start
        norms = [float((w - b).norm()) for w, b in zip(weights, before, strict=True)]
        with torch.no_grad():
            for w, b in zip(weights, before, strict=True):
                w.copy_(b)
        return {"seconds": seconds, "update_norms": norms}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _module(repo: Path, name: str) -> Any:
    """A module of algs/memit, whose file name need not be an identifier."""
    spec = importlib.util.spec_from_file_location(
        f"algs.memit.{name.replace('-', '_')}", repo / "algs" / "memit" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main():
    args = arguments()
    answers = sys.stdout

    def turn(result: dict | None = None):
        """Hand a result over, and wait until the next one is wanted."""
        if args.turns:
            if result is not None:
                print(json.dumps(result), file=answers, flush=True)
            sys.stdin.readline()

    def quietly(function, *given):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return function(*given)

    published = quietly(Published, args)
    records = json.loads(args.requests.read_text())[args.first : args.first + args.count]
    facts = [r["requested_rewrite"] for r in records]
    requests = [dict(f, target_new=f["target_new"]["str"], target_true=f["target_true"]["str"]) for f in facts]
    published.settings.llms.v_num_grad_steps = 2
    quietly(published.anchor, args.methods[0], requests[0])
    published.settings.llms.v_num_grad_steps = args.steps
    methods = {}
    turn({"ready": True})
    for method in args.methods:
        anchors, targets = [], []
        for request in requests:
            measured, found = quietly(published.anchor, method, request)
            anchors.append(measured)
            targets.append(found)
            turn(measured)
        together = {l: torch.cat([t[l].detach() for t in targets], 1) for l in targets[0]}
        edit = quietly(published.edit, method, requests, together)
        turn(edit)
        steps = sum(len(a["losses"]) for a in anchors)
        seconds = sum(a["seconds"] for a in anchors)
        methods[method] = {
            "anchors": anchors,
            "edit": edit,
            "anchor_seconds_per_edit": seconds / len(requests),
            "anchor_ms_per_step": 1000 * seconds / steps,
            "keys_and_solve_seconds_per_edit": edit["seconds"] / len(requests),
        }
        if not args.turns:
            print({k: v for k, v in methods[method].items() if k not in ("anchors", "edit")})
    if args.out is not None:
        about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        about |= {"torch": torch.__version__, "device": device, "cores": os.cpu_count()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "methods": methods}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
