"""Edit requests from files and in-memory records, in the formats that the field publishes them in."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxedit.errors import RequestError
from jaxedit.types import EditRequest

T = TypeVar("T")

# Where each format keeps the fields of an EditRequest, as "key" or "key|alias", "-" where it has none.
_FIELDS = "prompt subject target target_true paraphrases neighbourhood neighbourhood_answers id subject_start"
_FORMATS = {
    "plain": "prompt subject target|target_new target_true|ground_truth paraphrases"
    " neighbourhood|neighborhood neighbourhood_answers|neighborhood_answers id|case_id subject_start",
    "template": "prompt subject target_new target_true paraphrase_prompts neighborhood_prompts"
    " neighborhood_prompts_answers id|case_id -",
    "mend": "src subject alt answers rephrase loc loc_ans id|case_id -",
    "easyedit": "prompt subject target_new ground_truth rephrase_prompt locality_prompt locality_ground_truth"
    " id|case_id -",
}
# Keys that the formats are known to have and an EditRequest does not use, or that _flatten takes apart.
_EXTRA = {
    "plain": "",
    "template": "relation_id pararel_idx attribute_prompts generation_prompts",
    "mend": "pred cond filtered_rephrases portability",
    "easyedit": "cond locality portability",
}
_CSV_LISTS = {"paraphrases", "neighbourhood", "neighborhood", "neighbourhood_answers", "neighborhood_answers"}
_CSV_LISTS |= {"paraphrase_prompts", "neighborhood_prompts", "neighborhood_prompts_answers"}


def read_requests(source: Any, *, skip_malformed: bool = False) -> list[EditRequest]:
    """Read edit requests from a file or from in-memory records.

    source: the path of a .json, .jsonl, .csv or .tsv file in UTF-8; or an iterable of dicts and EditRequests
        (the latter pass through); or a single one. A JSON object may hold the list under one key. In CSV,
        list columns are separated by ``|``, an empty cell is an absent field, and ids stay text.

    The format is detected on each record by itself:

    * plain: prompt, subject, target (or target_new), and optionally target_true (or ground_truth),
      paraphrases, neighbourhood, neighbourhood_answers, subject_start, id (or case_id). The prompt contains
      the subject, or one ``{}`` in its place. Text is kept as it stands.
    * CounterFact (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"), its bare
      ``requested_rewrite`` records, and the flat multi-CounterFact and zsRE records derived from it. The
      prompt is always a template. An empty target_true is none.
    * zsRE as prepared for MEND (Mitchell et al. 2022, "Fast Model Editing at Scale"): the target is the
      counterfactual ``alt``, target_true the first of ``answers``.
    * KnowEdit (Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models"):
      target_true is the first ground_truth; the prompts of every locality category become the neighbourhood.
      An EditRequest has no place for portability, which is left out.
    * EasyEdit's list records (Wang et al. 2023, "EasyEdit: An Easy-to-use Knowledge Editing Framework for
      Large Language Models"): rephrase_prompt, locality_prompt, locality_ground_truth.

    In the published formats white space around subjects and targets is removed, and where a filled-in prompt
    spells the subject in other letter case, the subject takes the prompt's spelling (its last occurrence).

    Raises RequestError for a source that cannot be read or holds no records, and for malformed records: all
    problems at once, each as "file: record index: field: what is wrong and what to do", counted from 0. A key
    that the record's format does not know is a problem, so that a misspelt field is never lost. With
    `skip_malformed`, malformed records are dropped and a warning sums them up; it is still an error if none
    is left.
    """
    name, entries = load_records(source)
    if not entries:
        raise RequestError([f"{name}: holds no records; give at least one edit request"])
    requests: list[EditRequest] = []
    problems: list[str] = []
    for where, record in entries:
        if not isinstance(record, EditRequest):
            record, found = read_record(record)
            problems += [f"{name}: {where}: {problem}" for problem in found]
        if record is not None:
            requests.append(record)
    if problems and not (skip_malformed and requests):
        raise RequestError(problems)
    if problems:
        head = f"{name}: skipped {len(entries) - len(requests)} malformed of {len(entries)} records"
        more = f"; and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        warnings.warn(f"{head}: {'; '.join(problems[:3])}{more}", stacklevel=2)
    return requests


# Sources: each gives (where, record) pairs, so that a problem can name the place.


class _Unreadable(str):
    """Stands for a record that could not even be parsed; the text says why."""


def load_records(source: Any) -> tuple[str, list[tuple[str, Any]]]:
    if isinstance(source, (EditRequest, Mapping)):
        return "records", _number([source] if isinstance(source, EditRequest) else _unwrap(source))
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray)):
            return "records", _number(source)
        raise RequestError([f"records: is {kind_of(source)}, expected a path or a list of records"])
    name, suffix = os.fspath(source), Path(source).suffix.lower()
    try:
        text = Path(source).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RequestError([f"{name}: no such file; check the path"]) from None
    except UnicodeDecodeError as error:
        raise RequestError([f"{name}: not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except (OSError, ValueError) as error:
        raise RequestError([f"{name}: cannot be read ({error}); check the path"]) from None
    if suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        raise RequestError([f"{name}: unknown file type; expected .json, .jsonl, .csv or .tsv"])
    if not text.strip():
        raise RequestError([f"{name}: the file is empty; give at least one edit request"])
    return name, (_load_json if suffix.startswith(".json") else _load_csv)(name, text, suffix)


def _number(records: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"record {i}", record) for i, record in enumerate(records)]


def _unwrap(value: Mapping) -> Iterable[Any]:
    """The list that an object holds under one key, unless the object is itself a record."""
    lists = [v for v in value.values() if isinstance(v, list) and (not v or any(isinstance(r, Mapping) for r in v))]
    return lists[0] if len(lists) == 1 and _detect(value) is None else [value]


def _load_json(name: str, text: str, suffix: str) -> list[tuple[str, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # JSON Lines is common under the name .json too: there the first line is a whole object.
        if suffix == ".jsonl" or isinstance(_parse(text.lstrip().split("\n", 1)[0]), dict):
            # Not splitlines(), which would also cut inside a text that holds U+2028 or the like.
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            return [(f"record {i} (line {n})", _parse(line)) for i, (n, line) in enumerate(lines)]
        place = f"line {error.lineno} column {error.colno} ({error.msg})"
        problem = f"not valid JSON at {place}; the file may be cut short, fetch or write it again"
        raise RequestError([f"{name}: {problem}"]) from None
    if not isinstance(value, (list, dict)):
        raise RequestError([f"{name}: holds {kind_of(value)}, expected a list of records"])
    return _number(_unwrap(value) if isinstance(value, dict) else value)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return _Unreadable(f"not valid JSON ({error.msg} at column {error.colno}); mend or remove the line")


def _load_csv(name: str, text: str, suffix: str) -> list[tuple[str, Any]]:
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        problem = f"not valid CSV at line {reader.line_num} ({error}); check the quotes"
        raise RequestError([f"{name}: {problem}"]) from None
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    needed = ["subject", "src", "alt"] if "src" in header else ["prompt", "subject", "target target_new"]
    missing = [names.replace(" ", " or ") for names in needed if not set(names.split()) & set(header)]
    problems = [f"{name}: header: no column {names}; the columns are {_names(header)}" for names in missing]
    if len(set(header)) != len(header):
        problems.append(f"{name}: header: a column name occurs twice; the columns are {_names(header)}")
    if problems:
        raise RequestError(problems)
    return [(f"record {i} (line {n})", _from_row(header, row)) for i, (n, row) in enumerate(rows[1:])]


def _from_row(header: list[str], row: list[str]) -> Any:
    if len(row) != len(header):
        cells = f"the row has {len(row)} cells and the header {len(header)}"
        return _Unreadable(f"{cells}; quote the cells that hold the separator")
    record: dict[str, Any] = {key: cell for key, cell in zip(header, row, strict=True) if cell}
    for key in _CSV_LISTS & record.keys():
        record[key] = [part.strip() for part in record[key].split("|")]
    if record.get("subject_start", "").isdecimal():
        record["subject_start"] = int(record["subject_start"])
    return record


# Records.


def _detect(record: Mapping) -> str | None:
    keys = record.keys()
    if "requested_rewrite" in keys:
        return "template"
    if "src" in keys:
        return "mend"
    if "target_new" in keys:
        if {"locality", "portability", "rephrase_prompt", "locality_prompt", "locality_ground_truth"} & keys:
            return "easyedit"
        nested = any(isinstance(record.get(key), Mapping) for key in ("target_new", "target_true"))
        if nested or {"paraphrase_prompts", "neighborhood_prompts"} & keys:
            return "template"
    found = ("prompt" in keys, "subject" in keys, bool({"target", "target_new"} & keys))
    return "plain" if sum(found) >= 2 else None


def read_each(source: Any, read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of each record of a file or list; it raises RequestError or ValueError where it cannot.

    Raises RequestError with the problems of all records.
    """
    name, entries = load_records(source)
    records, problems = [], []
    for where, entry in entries:
        try:
            records.append(read(entry))
        except ValueError as error:
            found = error.problems if isinstance(error, RequestError) else [str(error)]
            problems += [f"{name}: {where}: {problem}" for problem in found]
    if not entries:
        problems.append(f"{name}: holds no records")
    if problems:
        raise RequestError(problems)
    return records


def read_record(record: Any) -> tuple[EditRequest | None, list[str]]:
    """The request, or None and the problems of the record."""
    if isinstance(record, _Unreadable):
        return None, [f"record: {record}"]
    if not isinstance(record, Mapping):
        return None, [f"record: is {kind_of(record)}, expected an object with named fields"]
    kind = _detect(record)
    if kind is None:
        known = "plain (prompt, subject, target), CounterFact, multi-CounterFact, MEND, KnowEdit, EasyEdit"
        return None, [f"record: in no known format, has the keys {_names(record)}; expected one of {known}"]
    known_keys = re.findall(r"\w+", f"{_FORMATS[kind]} {_EXTRA[kind]}")
    try:
        record = record if kind == "plain" else _flatten(record)
    except ValueError as error:
        return None, [str(error)]
    hint = f"rename or remove it, the known keys are {_names(known_keys)}"
    problems = [f"{key}: unknown key; {hint}" for key in record if key not in known_keys]
    fields: dict[str, Any] = {}
    for field, names in zip(_FIELDS.split(), _FORMATS[kind].split(), strict=True):
        if names == "-":
            continue
        given = [key for key in names.split("|") if record.get(key) is not None] or names.split("|")[:1]
        if len(given) > 1:
            problems.append(f"{given[1]}: stands for the same as {given[0]!r}; give one of them")
        try:
            fields[field] = _READERS.get(field, text_field)(record.get(given[0]))
        except ValueError as error:
            problems.append(f"{given[0]}: {error}")
    if kind != "plain":
        fields |= {key: fields[key].strip() for key in ("subject", "target") if key in fields}
    problems += _check(fields, kind)
    if problems:
        return None, problems
    make: Callable[..., EditRequest] = EditRequest.from_template if kind == "template" else EditRequest
    return make(fields.pop("prompt"), **fields), []


def _flatten(record: Mapping) -> dict[str, Any]:
    """The record with what the published formats nest brought to the top."""
    flat = dict(record)
    if "requested_rewrite" in flat:
        rewrite = flat.pop("requested_rewrite")
        if not isinstance(rewrite, Mapping):
            raise ValueError(f"requested_rewrite: is {kind_of(rewrite)}, expected an object with one edit")
        flat |= rewrite
    for key in ("target_new", "target_true"):
        if isinstance(flat.get(key), Mapping):  # {"str": text, "id": Wikidata id}
            flat[key] = flat[key].get("str")
    if flat.get("locality") is not None:
        if "locality_prompt" in flat:
            raise ValueError("locality: stands for the same as 'locality_prompt'; give one of them")
        try:
            items = [item for category in flat["locality"].values() for item in category]
            flat["locality_prompt"] = [item["prompt"] for item in items]
            flat["locality_ground_truth"] = [_answer(item["ground_truth"]) for item in items]
        except (AttributeError, KeyError, TypeError, ValueError):
            shape = "categories, each a list of {prompt, ground_truth}"
            raise ValueError(f"locality: expected an object of {shape}; mend or remove it") from None
    return flat


def _check(fields: dict[str, Any], kind: str) -> list[str]:
    """Problems between fields. Repairs letter case, except in a user's own records."""
    problems = []
    prompts, answers = len(fields.get("neighbourhood", ())), len(fields.get("neighbourhood_answers", ()))
    if answers and answers != prompts and "neighbourhood" in fields:
        hint = "give one answer a prompt, or none"
        problems.append(f"neighbourhood_answers: {answers} answers for {prompts} prompts; {hint}")
    if "prompt" not in fields or "subject" not in fields:
        return problems
    prompt, subject, start = fields["prompt"], fields["subject"], fields.get("subject_start")
    holes = prompt.count("{}")
    if kind == "template":
        if holes != 1:
            problems.append(f"prompt: {prompt!r} holds {holes} '{{}}'; put one where the subject stands")
    elif start is not None:
        if not prompt.startswith(subject, start):
            problems.append(f"subject_start: {subject!r} does not stand at {start} of {prompt!r}; correct it")
    elif subject not in prompt and holes != 1:
        spellings = re.findall(re.escape(subject), prompt, re.IGNORECASE)
        if spellings and kind != "plain":
            fields["subject"] = spellings[-1]
        else:
            hint = f"write it as there, {spellings[-1]!r}" if spellings else "copy it from there"
            problems.append(f"subject: {subject!r} is not in the prompt {prompt!r}; {hint}")
    return problems


# Fields: each reader returns the value, or raises ValueError saying what is wrong with it.


def text_field(value: Any) -> str:
    if value is None:
        raise ValueError("missing; every record needs it")
    if not isinstance(value, str):
        raise ValueError(f"is {kind_of(value)}, expected text")
    if not value.strip():
        raise ValueError("empty; write it out")
    return value


def text_fields(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"is {kind_of(value)}, expected a list of texts")
    bad = [f"item {i} is {kind_of(v)}" for i, v in enumerate(value) if not (isinstance(v, str) and v.strip())]
    if bad:
        raise ValueError(f"{', '.join(bad)}; expected texts that are not empty")
    return tuple(value)


def _answer(value: Any) -> str | None:
    """One answer, the first of a list (or of lists of aliases); None where there is none."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value is None or value == "" else text_field(value)


def _id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
        raise ValueError(f"is {kind_of(value)}, expected text or a whole number")
    return value


def _start(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"is {kind_of(value)}, expected how many characters stand before the subject")
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "target_true": _answer,
    "paraphrases": text_fields,
    "neighbourhood": text_fields,
    "neighbourhood_answers": text_fields,
    "subject_start": _start,
    "id": _id,
}


def kind_of(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(repr, keys))) or "none"
