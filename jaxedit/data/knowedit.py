"""KnowEdit records: an edit with the questions it should carry over to, and those it should leave alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxedit.data.requests import kind_of, read_each, read_record
from jaxedit.errors import RequestError
from jaxedit.types import EditRequest

_WIKIBIO = {"concept": "subject", "text": "prompt", "labels": "target_new"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A prompt and the answers that are right, the first one the main one."""

    prompt: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class KnowEditRecord:
    """One edit. `locality` and `portability`: probes by kind, such as Relation_Specificity or Reasoning."""

    request: EditRequest
    locality: dict[str, tuple[Probe, ...]]
    portability: dict[str, tuple[Probe, ...]]


def read_knowedit(source: Any) -> list[KnowEditRecord]:
    """Read KnowEdit (Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models").

    source: the path of a .json or .jsonl file, or a list of records, as for `read_requests`, which reads the edit
        itself; WikiBio's names concept, text and labels stand for subject, prompt and target_new. A ground_truth
        may be a text, a list of alternatives, or a list of lists of aliases; all of them count as answers. As in the
        published evaluation, a question without an answer is left out, and so is a kind without questions.

    Raises RequestError with the problems of all records.
    """
    return read_each(source, _record)


def _record(entry: Any) -> KnowEditRecord:
    if not isinstance(entry, Mapping):
        return _checked(entry, {}, {})
    entry = dict(entry)
    if "concept" in entry:
        entry = {_WIKIBIO.get(key, key): value for key, value in entry.items()}
    found = {part: _probes(part, entry.pop(part, None) or {}) for part in ("locality", "portability")}
    near = {
        kind: [{"prompt": p.prompt, "ground_truth": p.answers[0]} for p in probes]
        for kind, probes in found["locality"].items()
    }
    return _checked(entry | {"locality": near}, **found)


def _checked(entry: Any, locality, portability) -> KnowEditRecord:
    request, problems = read_record(entry)
    if request is None:
        raise RequestError(problems)
    return KnowEditRecord(request, locality, portability)


def _probes(part: str, kinds: Any) -> dict[str, tuple[Probe, ...]]:
    made = {}
    try:
        for kind, items in kinds.items():
            probes = [Probe(item["prompt"], tuple(dict.fromkeys(_answers(item["ground_truth"])))) for item in items]
            made[kind] = tuple(p for p in probes if p.answers)
            if not all(isinstance(p.prompt, str) and p.prompt.strip() for p in made[kind]):
                raise ValueError("a prompt is missing")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        shape = "kinds, each a list of {prompt, ground_truth}"
        raise RequestError([f"{part}: expected an object of {shape} ({error}); mend or remove it"]) from None
    return {kind: probes for kind, probes in made.items() if probes}


def _answers(value: Any) -> Iterator[str]:
    """Texts in any nesting of lists; blank ones and None are no answers."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _answers(item)
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"ground_truth is {kind_of(value)}, expected text")
    elif value is not None and value.strip():
        yield value
