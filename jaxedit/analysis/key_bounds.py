"""What an edit should reach and what it should miss, by the lemmas of REP (§4), beside what evaluation finds.

At a token with key k, an edit of n facts adds ``ΔWᵀk = Σ_e α_e(k) r_e`` to the value: r_e is what was to be added for
fact e, and

    α(k) = [kᵀ(A + KᵀK)⁻¹Kᵀ]

says with what weight each fact answers: of one fact alone ``kᵀA⁻¹k* / (1 + k*ᵀA⁻¹k*)``. This is the α of lemmas 4.6
and 4.7 with the scale that a real edit has, also one of many facts; as they stand, ``kᵀC⁻¹k*`` is not 1 at k = k*,
though that is where all of v* should arrive.

The lemmas ask for the change of the logit of the new target against the old one to exceed the gap ε₁ that there was
before. Three predictions of this change:

    reach   α(k) as a share of that at the edit's own prompt, times the change there: what the layers above make of the
            value is taken to be the same for all prompts.
    direct  the lemmas' path: from the changed values through the value projection of one attention layer, whose
            weights stay as they are, along the residual stream to the logits (summed over the layers above).
    linear  the derivative along ΔW, through everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxedit.analysis.key_paths import answers, strongest
from jaxedit.config import NeuronSubset
from jaxedit.data.tokens import encode, target_ids, token_at
from jaxedit.edit import EditResult
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad
from jaxedit.evaluation.report import PromptRecord, Report
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Decoder
from jaxedit.solvers.prepare import operators
from jaxedit.types import EditRequest

PREDICTIONS = ("gap", "reach", "direct", "linear")


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """An edit's p prompts: the rewrite prompt, paraphrases and neighbourhood of each request, in the order of a Report.

    request ``[p]``, kinds, prompts: which. tokens: the text of the token where α is largest, and `at_subject` ``[p]``,
    whether that is the decisive one (False where the subject is not in the prompt).
    alpha ``[layers, p]``: the weight of the request's own fact there, at keys of the edited model.
    gap ``[p]``: by how many nats the old target's logit is above the new one's before the edit, ε₁ (ε₃ of lemma 4.7).
    change, direct, linear ``[p]``: of that difference, in favour of the new target: what it is, and as predicted.
    ceiling ``[p]``: the Cauchy-Schwarz bound of lemma 4.4 on `direct`, from the norm of the value change at the token
    where α is largest.
    Targets are compared at the first token in which they differ. All float64, computed in float32 (float64).
    """

    layers: tuple[int, ...]
    request: np.ndarray
    kinds: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: tuple[str, ...]
    at_subject: np.ndarray
    alpha: np.ndarray
    gap: np.ndarray
    change: np.ndarray
    direct: np.ndarray
    linear: np.ndarray
    ceiling: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """The share of the edit that arrives ``[p]``: α (its mean over layers) over that at the request's own prompt,
        ``kᵀA⁻¹k* / k*ᵀA⁻¹k*`` of one fact alone."""
        alpha = self.alpha.mean(0)
        return alpha / self._own(alpha)

    def _own(self, values: np.ndarray) -> np.ndarray:
        """For each prompt the value ``[p]`` at its request's rewrite prompt."""
        own, first = np.zeros(self.request.max() + 1), self.rows("efficacy")
        own[self.request[first]] = values[first]
        return own[self.request]

    def rows(self, kind: str) -> np.ndarray:
        """The prompts of one kind, by their indices."""
        return np.flatnonzero(np.asarray(self.kinds) == kind)

    def margin(self, by: str = "reach") -> np.ndarray:
        """By how many nats the new target should be above the old one after the edit ``[p]``, by one of `PREDICTIONS`;
        "gap" is the prediction that nothing changes."""
        if by not in PREDICTIONS:
            raise JaxEditError(f"by must be one of {', '.join(PREDICTIONS)}, got {by!r}")
        reach = self.reach * self._own(self.change)
        return {"gap": 0.0, "reach": reach, "direct": self.direct, "linear": self.linear}[by] - self.gap

    def heard(self, by: str = "reach", margin: float = 0.0) -> np.ndarray:
        """At which prompts the edit will be heard ``[p]``: the new target above the old one by more than `margin` nats,
        ε₂. (At 2.2 nats it has 90 % of the probability of the two.)"""
        return self.margin(by) > margin

    def verdicts(self, by: str = "reach", margin: float = 0.0) -> list[Verdict]:
        """Per request: which paraphrases the edit will miss, and which neighbours it will reach where the base model
        prefers the old target."""
        return self.verdicts_of(self.heard(by, margin))

    def verdicts_of(self, heard: np.ndarray) -> list[Verdict]:
        """The verdicts that say in which prompts the edit is heard ``[p]``."""
        missed = set(self.rows("paraphrase")[~heard[self.rows("paraphrase")]].tolist())
        reached = {i for i in self.rows("neighbourhood").tolist() if heard[i] and self.gap[i] > 0}
        requests = self.request.tolist()
        return [
            Verdict(
                r, *(tuple(self.prompts[i] for i in sorted(some) if requests[i] == r) for some in (missed, reached))
            )
            for r in sorted(set(requests))
        ]


class Verdict(NamedTuple):
    """Of one request, by its index: paraphrases that it misses, and neighbourhood prompts that it reaches."""

    request: int
    misses: tuple[str, ...]
    reaches: tuple[str, ...]


class Agreement(NamedTuple):
    """How well one prediction tells which of `prompts` prompts an edit is heard in; `heard` is their share.

    auc: of the margins: the chance that of two prompts the one that is heard has the larger margin. accuracy: of the
    verdicts. change: rank correlation (Spearman) of the predicted change with the change that evaluation finds; None
    for "gap". What has no meaning, as an AUC where all prompts are heard, is NaN.
    """

    kind: str
    by: str
    prompts: int
    heard: float
    auc: float
    accuracy: float
    change: float | None


def edit_bounds(
    base: Decoder,
    result: EditResult,
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    max_neighbours: int | None = None,
    batch_tokens: int = 4096,
) -> Bounds:
    """Evaluate the lemmas' bounds on a real edit of `base` with these requests.

    α is exact for one edited layer and the solvers Ridge, EqualityConstrained and NullSpace without a regulariser;
    with several layers it is measured at each. max_neighbours: use the first so many neighbourhood prompts of each
    request, as in `evaluate`. batch_tokens: tokens, padding included, in one pass.

    Raises RequestError naming every prompt that cannot be run or whose two targets are the same, JaxEditError where
    the result is of other requests.
    """
    rows = _rows(tokenizer, requests, max_neighbours, base.config.max_positions)
    directions = _directions(result, len(requests)).astype(wide(base.dtype))
    n, layers = len(rows), result.info.solved.layers
    deltas = tuple((result.patch.deltas[l].left, result.patch.deltas[l].right) for l in layers)
    alpha, place, numbers = np.zeros((len(layers), n)), np.zeros(n, int), np.zeros((5, n))
    for batch in batches([(bucket(len(r.tokens), MIN_LENGTH),) for r in rows], batch_tokens):
        some, index = batch.take(rows), batch.index
        tokens, mask = pad([r.tokens for r in some], batch.shape[0])
        columns = directions[:, [r.request for r in some]]
        found, at = strongest(result.model.params, base.config, tokens, mask, columns, layers)
        pairs = np.asarray([r.pair for r in some], np.int32)
        said = answers(base.params, base.config, tokens, mask, pairs, at, deltas, layers)
        alpha[:, index], place[index] = np.asarray(found)[:, : len(index)], np.asarray(at)[: len(index)]
        numbers[:, index] = np.asarray(said)[:, : len(index)]
    before, after, direct, line, ceiling = numbers
    return Bounds(
        layers=layers,
        request=np.asarray([r.request for r in rows]),
        kinds=tuple(r.kind for r in rows),
        prompts=tuple(r.prompt for r in rows),
        tokens=tuple(tokenizer.decode([r.tokens[at]]) for r, at in zip(rows, place, strict=True)),
        at_subject=np.asarray([r.decisive == at for r, at in zip(rows, place, strict=True)]),
        alpha=alpha,
        gap=-before,
        change=after - before,
        direct=direct,
        linear=line,
        ceiling=ceiling,
    )


class _Row(NamedTuple):
    """One prompt to be run: its tokens (and those that both targets begin with), the two tokens in which the new and
    the old target then differ, and the index of the decisive token, -1 where there is none."""

    request: int
    kind: str
    prompt: str
    tokens: tuple[int, ...]
    pair: tuple[int, int]
    decisive: int


def _rows(tokenizer, requests: Sequence[EditRequest], most: int | None, limit: int) -> list[_Row]:
    """All prompts in the order of `evaluate`, or RequestError naming those that cannot be run."""
    made, problems = [], []
    for i, r in enumerate(requests):
        asked = [("efficacy", r.prompt, r.target_true), *(("paraphrase", p, r.target_true) for p in r.paraphrases)]
        near = list(zip(r.neighbourhood, r.answers_nearby, strict=True))[:most]
        for kind, prompt, answer in [*asked, *(("neighbourhood", p, answer) for p, answer in near)]:
            where = f"request {i} (id {r.id}), {kind} prompt {prompt!r}"
            if answer is None:
                problems.append(f"{where}: has no target_true, which the bounds compare the target with")
                continue
            new, old = (target_ids(tokenizer, prompt, t) for t in (r.target, answer))
            common = next((j for j, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), None)
            ids, offsets = encode(tokenizer, prompt)
            if common is None:
                problems.append(f"{where}: one target begins with the other, so no logits tell them apart")
            elif len(ids) + common > limit:
                problems.append(f"{where}: has {len(ids) + common} tokens; the model takes {limit}")
            else:
                start = r.subject_start if kind == "efficacy" else prompt.rfind(r.subject)
                end = -1 if start is None or start < 0 else start + len(r.subject) - 1
                decisive = -1 if end < 0 else token_at(tokenizer, prompt, ids, offsets, end)
                pair = new[common], old[common]
                made.append(_Row(i, kind, prompt, (*ids, *new[:common]), pair, decisive))
    if problems:
        raise RequestError(problems)
    return made


def _directions(result: EditResult, n: int) -> np.ndarray:
    """The columns of ``(A + KᵀK)⁻¹Kᵀ``, ``[layers, n, d_ff]``, of the last n edits of a result."""
    method, factor = result.info.solved, result.factor
    if isinstance(method.solver, NeuronSubset):
        raise JaxEditError("NeuronSubset edits in rounds, each with other keys; there is no α for it")
    keys = [result.keys[l][-n:] for l in method.layers]
    if factor is None or any(factor[l].protected != len(result.keys[l]) - n for l in method.layers):
        raise JaxEditError(f"the result's factor is not what the last {n} of its edits were solved with")
    size = method.at_once or n
    parts = [operators(factor, [k[at : at + size] for k in keys], method.layers)[0] for at in range(0, n, size)]
    return np.concatenate(parts, 2).swapaxes(1, 2)


def agreement(bounds: Bounds, report: Report, undecided: bool = False) -> list[Agreement]:
    """How well the verdicts predict what `evaluate` finds at paraphrases and in the neighbourhood: is the new target
    likelier than the old one in the edited model?

    undecided: leave out prompts at which the base model already prefers the new target, where nothing is to be heard.
    Raises JaxEditError where the report is of other prompts.
    """
    before, after = _preferences(bounds, report)
    made = []
    for kind in ("paraphrase", "neighbourhood"):
        rows = bounds.rows(kind)
        rows = rows[before[rows] < 0] if undecided else rows
        heard, change = after[rows] > 0, (after - before)[rows]
        for by in PREDICTIONS:
            margin = bounds.margin(by)[rows]
            predicted = margin + bounds.gap[rows]
            made.append(
                Agreement(
                    *(kind, by, len(rows), _mean(heard), area_under_curve(margin, heard)),
                    accuracy=_mean((margin > 0) == heard),
                    change=None if by == "gap" else rank_correlation(predicted, change),
                )
            )
    return made


def verdicts_found(bounds: Bounds, report: Report) -> list[Verdict]:
    """What `evaluate` finds, in the form of `Bounds.verdicts`: is the new target likelier than the old one in the
    edited model? Raises JaxEditError where the report is of other prompts."""
    return bounds.verdicts_of(_preferences(bounds, report)[1] > 0)


def _preferences(bounds: Bounds, report: Report) -> np.ndarray:
    """`_preference` of each of the bounds' prompts, ``[2, p]``."""
    records = [(r.index, p) for r in report.records for p in r.prompts]
    if [(i, p.prompt) for i, p in records] != list(zip(bounds.request.tolist(), bounds.prompts, strict=True)):
        raise JaxEditError("the report is of other prompts than the bounds; give both the same max_neighbours")
    return np.asarray([_preference(p) for _, p in records]).T


def _preference(p: PromptRecord) -> tuple[float, float]:
    """By how many nats a token the base and the edited model find the new target likelier than the old one."""
    return tuple(float("nan") if s.nll_true is None else s.nll_true - s.nll_new for s in (p.base, p.edited))  # type: ignore


def area_under_curve(scores, positive) -> float:
    """The chance that a positive has a larger score than a negative, ties counting half; NaN without both."""
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((_ranks(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def rank_correlation(a, b) -> float:
    """Spearman's correlation of two series, ties at their mean rank; NaN where one does not vary."""
    a, b = (_ranks(np.asarray(x, np.float64)) for x in (a, b))
    if len(a) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values at their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _mean(x) -> float:
    return float(np.mean(x)) if len(x) else float("nan")
