"""KnowEdit's metrics: does an edit carry over to what follows from it (portability), and stop there (locality)?

As in EasyEdit (Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models"): accuracy is
the share of an answer's tokens that are the likeliest, the earlier ones given (teacher forcing), and locality the share
of the tokens in the place of a locality answer that the two models predict alike, whether right or wrong. KnowEdit's
fourth metric, fluency, is `jaxedit.evaluation.fluency`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxedit.data.knowedit import KnowEditRecord
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.comparison import Comparison, Measured, RecordScores
from jaxedit.evaluation.predictions import Predicted, predict
from jaxedit.models.transformer import Decoder

Asked = tuple[str, str, tuple[str, ...]]


def evaluate_knowedit(
    base: Decoder,
    edited: Decoder,
    tokenizer,
    records: Sequence[KnowEditRecord],
    *,
    aliases: bool = True,
    batch_tokens: int = 8192,
) -> Comparison:
    """Measure both models on every prompt of every record.

    edit_success, rephrase: accuracy of the new target at the edit's prompt and at rephrased ones.
    portability, locality: mean over a record's kinds of the mean over the kind's prompts, then over the records that
        have any (as published). ``portability/Reasoning`` and the like: one kind, over the records that have it.
        Locality has no value for the base alone.

    aliases: of several right answers take the one that the model predicts best, each model its own; False: only the
        first, as published. Locality always uses the first.

    Raises JaxEditError where the models differ in architecture or there are no records, and RequestError naming
    prompts that do not fit the model with their answers.
    """
    if not records:
        raise JaxEditError("there are no records to evaluate")
    asked = [_asked(record, aliases) for record in records]
    pairs = [(prompt, a) for some in asked for _, prompt, answers in some for a in answers]
    found = iter(predict(base, edited, tokenizer, pairs, batch_tokens))
    made = []
    for i, (record, some) in enumerate(zip(records, asked, strict=True)):
        measured = [_measured(metric, prompt, answers, found) for metric, prompt, answers in some]
        for part in ("portability", "locality"):
            measured += _overall(part, measured)
        made.append(RecordScores(i, record.request.id, tuple(measured)))
    kinds = sorted({m.metric for r in made for m in r.measured if "/" in m.metric})
    metrics = ["edit_success", "rephrase"]
    for part in ("portability", "locality"):
        metrics += [part, *(kind for kind in kinds if kind.startswith(part + "/"))]
    return Comparison.of(made, metrics)


def _asked(record: KnowEditRecord, aliases: bool) -> list[Asked]:
    """(metric, prompt, answers) of every prompt."""
    request, most = record.request, None if aliases else 1
    asked: list[Asked] = [("edit_success", request.prompt, (request.target,))]
    asked += [("rephrase", p, (request.target,)) for p in request.paraphrases]
    for kind, probes in record.portability.items():
        asked += [(f"portability/{kind}", p.prompt, p.answers[:most]) for p in probes]
    for kind, probes in record.locality.items():
        asked += [(f"locality/{kind}", p.prompt, p.answers[:1]) for p in probes]
    return asked


def _measured(metric: str, prompt: str, answers: Sequence[str], found) -> Measured:
    predicted: list[Predicted] = [next(found) for _ in answers]
    if metric.startswith("locality/"):
        return Measured(metric, prompt, answers[0], None, predicted[0].agreement)
    base, edited = zip(*(p.accuracy for p in predicted), strict=True)
    best = max(range(len(answers)), key=edited.__getitem__)
    return Measured(metric, prompt, answers[best], max(base), edited[best])


def _overall(part: str, measured: Sequence[Measured]) -> list[Measured]:
    """The record's value of each of its kinds, as measurements whose mean is the record's value."""
    kinds: dict[str, list[Measured]] = {}
    for m in measured:
        if m.metric.startswith(part + "/"):
            kinds.setdefault(m.metric, []).append(m)
    return [
        Measured(part, None, None, _mean([m.base for m in some]), _mean([m.edited for m in some]))
        for some in kinds.values()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
