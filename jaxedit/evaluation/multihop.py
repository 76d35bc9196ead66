"""MQuAKE: are the consequences of edits answered too, by questions over several facts?

Metrics of Zhong et al. 2023, "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions". Answers
are generated greedily; equal prompts are generated once. The published repository has no code that evaluates edited
models; how an answer is cut out of what a model says is stated at `Asking`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from jaxedit.data.mquake import Hop, MQuakeRecord
from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.comparison import Comparison, Measured, RecordScores
from jaxedit.evaluation.generation import continue_rows, eos_ids
from jaxedit.evaluation.specificity import check_models
from jaxedit.models.transformer import Decoder

METRICS = (
    *("edit_success", "hop_accuracy", "instance_accuracy", "question_accuracy", "multihop_accuracy"),
    *("original_instance_accuracy", "original_multihop_accuracy"),
)
_POOLED = ("edit_success", "hop_accuracy", "question_accuracy")
# What the line that answers must match from its start, "{}" standing for the answers sought.
_PATTERNS = {"exact": r"(?:{})\.?\Z", "prefix": r"(?:{})(?!\w)", "contains": r".*(?<!\w)(?:{})(?!\w)"}


@dataclasses.dataclass(frozen=True)
class Asking:
    """How models are asked, and when they are right.

    question: the text that a multi-hop question is put into, one ``{}`` in it, with whatever examples or request for
        a chain of thought come before. Text before and after the ``{}`` may hold any other brace.
    hop: the same for single hops that no edit states; None: these too are asked as a text to be continued (cloze), as
        edited facts always are.
    marker: the answer is what stands behind this text where the model first says it ("Answer:" behind a chain of
        thought), and there is none where it does not. It concerns `question` only.
    match: the answer is the first line that is not blank. "exact": it is one of those sought, but for a full stop at
        the end; "prefix": it begins with one, as whole words; "contains": it holds one, as whole words. Letter case
        counts.
    max_new_tokens: how much is generated; an answer that is longer is not right.
    """

    question: str = "{}"
    hop: str | None = None
    marker: str | None = None
    match: Literal["exact", "prefix", "contains"] = "prefix"
    max_new_tokens: int = 32

    def __post_init__(self):
        for name in ("question", "hop"):
            text = getattr(self, name)
            if text is not None and text.count("{}") != 1:
                raise JaxEditError(f"{name} must hold exactly one '{{}}', where the question goes; got {text!r}")
        if self.match not in _PATTERNS:
            raise JaxEditError(f"match must be one of {', '.join(_PATTERNS)}, got {self.match!r}")


def evaluate_multihop(
    base: Decoder, edited: Decoder, tokenizer, records: Sequence[MQuakeRecord], asking: Asking | None = None
) -> Comparison:
    """Ask both models what the edits state, every hop, and every multi-hop question.

    edit_success (edit-wise): the share of all edits whose new target continues the edit's prompt.
    hop_accuracy: the share of all hops of the chains after the edits that are answered.
    instance_accuracy (instance-wise): the share of records all of whose hops after the edits are answered.
    question_accuracy: the share of all multi-hop questions answered with the new answer or an alias of it.
    multihop_accuracy: the share of records of which any question is.
    original_instance_accuracy, original_multihop_accuracy: the same with the chain and the answer before the edits,
        which is what the base model is measured by in the paper.

    edited: the model with all the records' edits, or with one record's where records are edited one by one.

    Raises JaxEditError where the models differ in architecture or there are no records, and RequestError naming
    prompts that do not fit the model's context with the generated tokens.
    """
    asking = asking or Asking()
    check_models(base, edited, tokenizer)
    if not records:
        raise JaxEditError("there are no records to evaluate")
    asked = [_asked(record, asking) for record in records]
    prompts = list(dict.fromkeys(prompt for some in asked for _, prompt, _ in some))
    says = [_answers(model, tokenizer, prompts, asking.max_new_tokens) for model in (base, edited)]
    made = []
    for i, (record, some) in enumerate(zip(records, asked, strict=True)):
        measured = []
        for metric, prompt, sought in some:
            marker = asking.marker if metric.endswith("question_accuracy") else None
            said = says[0][prompt], says[1][prompt]
            base_right, right = (float(answered(text, sought, asking.match, marker)) for text in said)
            measured.append(Measured(metric, prompt, sought[0], base_right, right, said))
        made.append(RecordScores(i, record.id, (*measured, *_whole(measured))))
    return Comparison.of(made, METRICS, _POOLED)


def answered(text: str, sought: Sequence[str], match: str = "prefix", marker: str | None = None) -> bool:
    """Does what a model said give one of the answers? See `Asking`."""
    said = text if marker is None else text.partition(marker)[2]
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    pattern = _PATTERNS[match].replace("{}", "|".join(map(re.escape, sought)))
    return re.match(pattern, line) is not None


def _asked(record: MQuakeRecord, asking: Asking) -> list[tuple[str, str, tuple[str, ...]]]:
    """(metric, prompt, answers) of everything a model is asked about a record."""
    edits = {request.prompt for request in record.requests}

    def ask(hop: Hop) -> str:
        return hop.cloze if asking.hop is None or hop.cloze in edits else asking.hop.replace("{}", hop.question)

    asked = [("edit_success", request.prompt, (request.target,)) for request in record.requests]
    asked += [("hop_accuracy", ask(hop), hop.answers) for hop in record.new_hops]
    asked += [("original_hop_accuracy", ask(hop), hop.answers) for hop in record.hops]
    for question in record.questions:
        prompt = asking.question.replace("{}", question)
        asked.append(("question_accuracy", prompt, record.new_answers))
        asked.append(("original_question_accuracy", prompt, record.answers))
    return asked


def _whole(measured: Sequence[Measured]) -> list[Measured]:
    """What concerns a record as a whole: all hops, any question."""
    made = []
    for prefix in ("", "original_"):
        for part, metric, rule in (("hop", "instance", min), ("question", "multihop", max)):
            some = [(m.base, m.edited) for m in measured if m.metric == f"{prefix}{part}_accuracy"]
            if some:
                both = (rule(side) for side in zip(*some, strict=True))
                made.append(Measured(f"{prefix}{metric}_accuracy", None, None, *both))
    return made


def _answers(model: Decoder, tokenizer, prompts: Sequence[str], steps: int) -> dict[str, str]:
    """What the model says after each prompt, greedily."""
    rows = [encode(tokenizer, prompt)[0] for prompt in prompts]
    most = model.config.max_positions - steps
    problems = [
        f"prompt {prompt[-80:]!r} has {len(row)} tokens; with {steps} new ones the model takes 1 to {most}"
        for prompt, row in zip(prompts, rows, strict=True)
        if not 0 < len(row) <= most
    ]
    if problems:
        raise RequestError(problems)
    new = continue_rows(model.params, model.config, rows, steps, eos_ids=eos_ids(model, tokenizer))
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return {prompt: tokenizer.decode(ids, **plain) for prompt, ids in zip(prompts, new, strict=True)}
