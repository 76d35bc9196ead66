"""Efficacy, paraphrase and neighbourhood scores as MEMIT's evaluation defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jaxedit.data.tokens import encode, target_ids
from jaxedit.evaluation.report import harmonic_mean, mean
from jaxedit.types import EditRequest

from .models import logits_at, pad, run


def metrics(model, tokenizer, requests: Sequence[EditRequest]) -> dict[str, float | None]:
    """Success and accuracy by kind of prompt, and the score: means over records of their means over prompts.

    All prompts of one record run together, each with both of its targets. Names and definitions are those of
    `jaxedit.evaluate`; every request needs `target_true`, or `neighbourhood_answers` for its neighbourhood.
    """
    rates: dict[str, list[float]] = {}
    for request in requests:
        found: dict[str, list[float]] = {}
        prompts = _prompts(request)
        scores = _scores(model, tokenizer, [(prompt, target) for _, prompt, both in prompts for target in both])
        for (kind, _, _), (wanted, hit), (other, _) in zip(prompts, scores[::2], scores[1::2], strict=True):
            found.setdefault(f"{kind}_success", []).append(float(wanted < other))
            found.setdefault(f"{kind}_accuracy", []).append(float(hit))
        for name, values in found.items():
            rates.setdefault(name, []).append(sum(values) / len(values))
    summary = {name: mean(values) for name, values in rates.items()}
    successes = [v for name, v in summary.items() if name.endswith("success")]
    return {**summary, "score": harmonic_mean(successes)}


def _prompts(request: EditRequest) -> list[tuple[str, str, tuple[str, str]]]:
    """Kind, prompt, and the target that should be likelier before the one that should not."""
    new, true = request.target, request.target_true
    if true is None:
        raise ValueError(f"request {request.id} has no target_true")
    answers = request.neighbourhood_answers or (true,) * len(request.neighbourhood)
    return [
        ("efficacy", request.prompt, (new, true)),
        *(("paraphrase", p, (new, true)) for p in request.paraphrases),
        *(("neighbourhood", p, (a, new)) for p, a in zip(request.neighbourhood, answers, strict=True)),
    ]


@torch.no_grad()
def _scores(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Mean negative log-likelihood of each target after its prompt, and whether greedy decoding would give it."""
    heads = [encode(tokenizer, prompt)[0] for prompt, _ in pairs]
    tails = [target_ids(tokenizer, prompt, target) for prompt, target in pairs]
    tokens = pad([h + t[:-1] for h, t in zip(heads, tails, strict=True)], model.device)
    at = [(i, len(h) - 1 + j) for i, (h, t) in enumerate(zip(heads, tails, strict=True)) for j in range(len(t))]
    rows, columns = torch.tensor(at, device=model.device).T
    answers = torch.tensor([x for t in tails for x in t], device=model.device)
    logits = logits_at(model, run(model, tokens), rows, columns)
    nll = -logits.log_softmax(-1).gather(1, answers[:, None])[:, 0]
    both = torch.stack([nll.double(), (logits.argmax(-1) == answers).double()]).cpu()  # the one transfer
    parts = zip(*(x.split([len(t) for t in tails]) for x in both), strict=True)
    return [(float(n.mean()), bool(hit.all())) for n, hit in parts]
