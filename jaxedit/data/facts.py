"""Facts that a model may know: what causal tracing is done on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxedit.data.requests import read_requests
from jaxedit.errors import RequestError
from jaxedit.types import EditRequest

_KEYS = {"known_id", "subject", "attribute", "template", "prediction", "prompt", "relation_id"}


@dataclasses.dataclass(frozen=True)
class Fact:
    """A prompt that a model which knows the fact continues with `attribute`.

    subject: the entity, exactly as it stands in `prompt`; subject_start: its character offset there, by default its
    last occurrence. Raises RequestError where a text is empty or the subject is not in the prompt.
    """

    prompt: str
    subject: str
    attribute: str
    subject_start: int | None = None
    id: str | int | None = None

    def __post_init__(self):
        for name in ("prompt", "subject", "attribute"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError([f"fact {self.id!r}: {name} is {value!r}, expected text"])
        start = self.prompt.rfind(self.subject) if self.subject_start is None else self.subject_start
        if start < 0 or not self.prompt.startswith(self.subject, start):
            raise RequestError(
                [f"fact {self.id!r}: subject {self.subject!r} does not stand in the prompt {self.prompt!r}"]
            )
        object.__setattr__(self, "subject_start", start)


def facts_from_requests(requests: Sequence[EditRequest]) -> list[Fact]:
    """The facts that edit requests replace: each prompt with its true target; the others are left out.

    Raises RequestError where no request has a true target.
    """
    known = [r for r in requests if r.target_true]
    if not known:
        raise RequestError(["none of the requests has a target_true, so there is no fact to trace"])
    return [Fact(r.prompt, r.subject, r.target_true or "", r.subject_start, r.id) for r in known]


def read_known_facts(path: str | Path) -> list[Fact]:
    """Facts from a .json (a list) or .jsonl file.

    Records are those of ROME's "known facts" (Meng et al. 2022): prompt, subject and attribute; known_id, template,
    prediction and relation_id may be there too. A file whose first record has no attribute is read by
    `read_requests`, and its true targets are the attributes.

    Raises RequestError naming every record that cannot be used, with its place in the file, counted from 0.
    """
    records = _records(Path(path))
    if records is None or not (isinstance(records[0], dict) and "attribute" in records[0]):
        return facts_from_requests(read_requests(path))
    facts: list[Fact] = []
    problems: list[str] = []
    for i, record in enumerate(records):
        try:
            facts.append(_fact(record))
        except RequestError as error:
            problems += [f"{path}: record {i}: {problem}" for problem in error.problems]
    if problems:
        raise RequestError(problems)
    return facts


def _records(path: Path) -> list[Any] | None:
    """The records of a JSON file, or None where `read_requests` is to read it, or to say why it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else None
        value = json.loads(text) if value is None else value
    except (OSError, ValueError):
        return None
    return value if isinstance(value, list) and value else None


def _fact(record: Any) -> Fact:
    if not isinstance(record, dict):
        raise RequestError([f"is {type(record).__name__}, expected an object with prompt, subject and attribute"])
    unknown = sorted(record.keys() - _KEYS)
    missing = [key for key in ("prompt", "subject", "attribute") if key not in record]
    problems = [f"unknown keys {unknown}; the known ones are {sorted(_KEYS)}"] if unknown else []
    problems += [f"{key} is missing" for key in missing]
    if problems:
        raise RequestError(problems)
    return Fact(record["prompt"], record["subject"], record["attribute"], id=record.get("known_id"))
