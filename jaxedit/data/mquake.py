"""MQuAKE records: edits, and multi-hop questions whose answer changes as a consequence of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxedit.data.requests import read_each, read_record, text_field, text_fields
from jaxedit.errors import RequestError
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True)
class Hop:
    """One fact of a chain, as a question and as a text to be continued, and the answers that are right."""

    question: str
    cloze: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MQuakeRecord:
    """`questions` ask for the end of a chain of facts. Any of `answers` was right before the edits, any of
    `new_answers` is right after them.

    requests: the edits. hops, new_hops: the chain before and after them; a record may lack them.
    """

    id: str | int | None
    requests: tuple[EditRequest, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    new_answers: tuple[str, ...]
    hops: tuple[Hop, ...] = ()
    new_hops: tuple[Hop, ...] = ()


def read_mquake(source: Any) -> list[MQuakeRecord]:
    """Read MQuAKE (Zhong et al. 2023, "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop
    Questions").

    source: the path of a .json or .jsonl file, or a list of records. Answers are followed by their aliases, those of
    MQuAKE-T also by ``answer_extended``; repetitions are left out. All edits to be made, each fact once, are
    ``list(dict.fromkeys(q for r in records for q in r.requests))``.

    Raises RequestError with the problems of all records.
    """
    return read_each(source, _record)


def _record(entry: Any) -> MQuakeRecord:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("requested_rewrite"), list):
        raise ValueError("expected an object with a list of edits under 'requested_rewrite'")
    requests, problems = [], []
    for i, rewrite in enumerate(entry["requested_rewrite"]):
        if isinstance(rewrite, Mapping):
            rewrite = {key: value for key, value in rewrite.items() if key != "question"}
        request, found = read_record({"requested_rewrite": rewrite})
        problems += [f"requested_rewrite {i}: {problem}" for problem in found]
        requests += [] if request is None else [request]
    if problems:
        raise RequestError(problems)
    questions = _field(entry, "questions", text_fields)
    if not requests or not questions:
        raise ValueError("a record needs at least one edit under 'requested_rewrite' and one of 'questions'")
    return MQuakeRecord(
        entry.get("case_id"),
        tuple(requests),
        questions,
        _answers(entry, "answer"),
        _answers(entry, "new_answer"),
        _hops(entry, "single_hops"),
        _hops(entry, "new_single_hops"),
    )


def _hops(entry: Mapping, key: str) -> tuple[Hop, ...]:
    hops = entry.get(key) or ()
    if not isinstance(hops, (list, tuple)) or not all(isinstance(hop, Mapping) for hop in hops):
        raise ValueError(f"{key}: expected a list of {{question, cloze, answer, answer_alias}}")
    return tuple(
        Hop(_field(hop, "question", text_field), _field(hop, "cloze", text_field), _answers(hop, "answer"))
        for hop in hops
    )


def _answers(entry: Mapping, key: str) -> tuple[str, ...]:
    found = [
        _field(entry, key, text_field),
        *_field(entry, f"{key}_alias", text_fields),
        *_field(entry, f"{key}_extended", text_fields),
    ]
    return tuple(dict.fromkeys(text.strip() for text in found))


def _field(entry: Mapping, key: str, reader) -> Any:
    try:
        return reader(entry.get(key))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
