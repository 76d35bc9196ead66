"""A first edit in a fresh process, for `bench_cold_start`; nothing but the standard library is imported up here."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path


def main(kind: str, file: str, steps: int):
    """A first edit in this fresh process; prints seconds by stage."""
    seconds, start = {}, time.perf_counter()

    def done(stage: str):
        nonlocal start
        now = time.perf_counter()
        seconds[stage], start = now - start, now

    if kind == "jax":
        import jaxedit as je

        _ = je.load, je.apply_edits  # names are imported when they are first used
        done("import")
        import workload

        work, templates, moments = pickle.loads(Path(file).read_bytes())
        stats = je.SecondMoments.from_arrays(moments, 1)
        done("not counted")
        model, tokenizer = je.load(work.model, dtype=work.dtype)
        done("load")
        je.apply_edits(
            model,
            tokenizer,
            work.requests,
            workload.method("fe", model.config, steps),
            stats=stats,
            templates=templates,
        )
        done("edit")
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        done("import")
        import torch_baseline
        import workload

        work, templates, moments = pickle.loads(Path(file).read_bytes())
        chosen = workload.method("fe", workload.config_of(work), steps)
        moments = {l: torch.from_numpy(m) for l, m in moments.items()}
        done("not counted")
        model, tokenizer = torch_baseline.load(work.directory, work.dtype)
        done("load")
        weight = chosen.solver.cov_weight
        torch_baseline.edit.apply(
            model, tokenizer, work.requests, "fe", chosen.layers, chosen.anchor, weight, templates, moments
        )
        done("edit")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
