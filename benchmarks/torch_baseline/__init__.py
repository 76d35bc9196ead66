"""Locate-then-edit in PyTorch, on transformers models: what jaxedit is compared with.

The published algorithm (MEMIT and Forward Replay) as its authors run it, one anchor at a time through a hook on the
model, a pass over the text for each layer's statistics, a float64 solve in each layer, but with care for speed:
nothing is copied between devices in a loop, the host waits for the device once a step, logits are made only where
the loss reads them, and a pass ends at the last layer that is asked for. Rows, weights of contexts and settings are
jaxedit's own, so both do the same work and agree to rounding. Works on any device and in any dtype; δ, losses and
statistics are float32 (float64 for a float64 model), solves float64. `adapters` has iReVa and GRACE.

    model, tokenizer = torch_baseline.load("directory", dtype="bfloat16", device="cuda")
    result = torch_baseline.edit.apply(model, tokenizer, requests, "fe", layers, anchor, cov_weight, templates, moments)
    print(result["seconds"], torch_baseline.evaluate.metrics(model, tokenizer, requests))
    torch_baseline.edit.restore(model, result)
"""

from . import adapters, anchors, edit, evaluate, solve, statistics
from .models import load, random_model

__all__ = ["adapters", "anchors", "edit", "evaluate", "load", "random_model", "solve", "statistics"]
