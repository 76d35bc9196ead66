"""What CounterFact records hold beside the edit: prompts for free generation, and keys to reference texts."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxedit.data.requests import load_records, read_each, read_record, text_field, text_fields
from jaxedit.errors import RequestError
from jaxedit.types import EditRequest


@dataclasses.dataclass(frozen=True)
class CounterFactRecord:
    """One edit. generation_prompts: to be continued freely. relation, target_id: Wikidata's, of the new target."""

    request: EditRequest
    generation_prompts: tuple[str, ...]
    relation: str
    target_id: str


def read_counterfact(source: Any) -> list[CounterFactRecord]:
    """Read CounterFact (Meng et al. 2022, "Locating and Editing Factual Associations in GPT") with what fluency and
    consistency are measured on; `read_requests` reads the edits alone.

    source: the path of a .json or .jsonl file, or a list of records.
    Raises RequestError with the problems of all records, among them those without generation_prompts.
    """
    return read_each(source, _record)


def _record(entry: Any) -> CounterFactRecord:
    request, problems = read_record(entry)
    if request is None:
        raise RequestError(problems)
    try:
        rewrite = entry.get("requested_rewrite", entry)
        prompts = text_fields(entry.get("generation_prompts"))
        if not prompts:
            raise ValueError("there are no generation prompts")
        relation, target_id = text_field(rewrite.get("relation_id")), str(rewrite["target_new"].get("id"))
    except (AttributeError, ValueError) as error:
        raise RequestError([f"generation_prompts, relation_id or target_new: {error}"]) from None
    return CounterFactRecord(request, prompts, relation, target_id)


def read_references(source: Any) -> dict[tuple[str, str], tuple[str, ...]]:
    """Reference texts by (relation, target id), from a file in the form of CounterFact's attribute snippets: a list of
    ``{relation_id, target_id, samples: [{text, …}, …]}``.

    Raises RequestError naming every entry that has another form.
    """
    name, entries = load_records(source)
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    problems = []
    for where, entry in entries:
        try:
            key = entry["relation_id"], entry["target_id"]
            found[key] = found.get(key, ()) + tuple(text_field(sample["text"]) for sample in entry["samples"])
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{name}: {where}: expected {{relation_id, target_id, samples: [{{text}}]}} ({error})")
    if problems:
        raise RequestError(problems)
    return found
