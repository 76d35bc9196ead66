"""zsRE as MEMIT evaluates it (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): token by token.

Published: one row for each target token, the prompt followed by the target's earlier tokens; a row counts where the
likeliest token at its end is the target's next one. Here all these rows are one pass over prompt and target, which
predicts the same. The published code decodes each token of the target and takes the first token of what that text is
tokenised to, which differs for characters of several tokens and for tokenizers that add a beginning-of-text token;
here the tokens are those of the target as it continues the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.comparison import Comparison, Measured, RecordScores
from jaxedit.evaluation.predictions import predict
from jaxedit.evaluation.report import harmonic_mean
from jaxedit.models.transformer import Decoder
from jaxedit.types import EditRequest

METRICS = ("efficacy", "paraphrase", "neighbourhood", "neighbourhood_agreement")


def evaluate_zsre(
    base: Decoder, edited: Decoder, tokenizer, requests: Sequence[EditRequest], *, batch_tokens: int = 8192
) -> Comparison:
    """Measure both models on every prompt of every request. Means are over a prompt's tokens, then a record's prompts,
    then records; published, over all tokens of a record at once, which have one paraphrase and one neighbour.

    efficacy, paraphrase: the share of the target's tokens that are predicted at the prompt, and at paraphrases.
    neighbourhood: the share of tokens of the neighbourhood prompt's own answer that are predicted (published).
    neighbourhood_agreement: the share of them that both models predict alike, right or wrong; it says how
        much changed where the base model did not know the answer either. It has no value for the base alone.
    score: the harmonic mean of the first three.

    Raises JaxEditError where the models differ in architecture or there are no requests, and RequestError naming
    requests whose neighbourhood prompts have no answers, or prompts that do not fit the model with their targets.
    """
    if not requests:
        raise JaxEditError("there are no requests to evaluate")
    problems = [f"request {i} (id {r.id}): {p}" for i, r in enumerate(requests) if (p := _problem(r))]
    if problems:
        raise RequestError(problems)
    asked = [_asked(request) for request in requests]
    found = iter(predict(base, edited, tokenizer, [x[1:] for some in asked for x in some], batch_tokens))
    records = []
    for i, (request, some) in enumerate(zip(requests, asked, strict=True)):
        measured = []
        for (metric, prompt, answer), p in zip(some, found, strict=False):
            measured.append(Measured(metric, prompt, answer, *p.accuracy))
            if metric == "neighbourhood":
                measured.append(Measured("neighbourhood_agreement", prompt, answer, None, p.agreement))
        records.append(RecordScores(i, request.id, tuple(measured)))
    made = Comparison.of(records, METRICS)
    for side in (made.base, made.edited):
        side["score"] = harmonic_mean([side[metric] for metric in METRICS[:3]])
    made.counts["score"] = len(requests)
    return made


def _problem(request: EditRequest) -> str | None:
    answers = request.answers_nearby
    if len(answers) == len(request.neighbourhood) and None not in answers:
        return None
    return f"{len(request.neighbourhood)} neighbourhood prompts need an answer each, or target_true"


def _asked(request: EditRequest) -> list[tuple[str, str, str]]:
    """(metric, prompt, answer) of every prompt."""
    asked = [("efficacy", request.prompt, request.target)]
    asked += [("paraphrase", p, request.target) for p in request.paraphrases]
    near = zip(request.neighbourhood, request.answers_nearby, strict=True)
    return asked + [("neighbourhood", p, answer) for p, answer in near if answer is not None]
