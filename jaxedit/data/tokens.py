"""From requests to token rows: the decisive token, context templates, and rows packed for one pass.

A row is one prompt as the model sees it. All rows of an edit (the prompt in every context, and the "{} is a" row
of the KL term) are packed into one sequence with a segment each, so nothing is spent on padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxedit.errors import JaxEditError, RequestError
from jaxedit.types import EditRequest

CLEAN = (("{}",),)
CHUNK_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Row:
    """Token ids of one prompt: `lookup` is the index of its decisive token, the last `n_target` are the target's."""

    tokens: tuple[int, ...]
    lookup: int
    n_target: int = 0


@dataclasses.dataclass(frozen=True)
class EditTokens:
    """One request, tokenised: `contexts` hold prompt + target[:-1] in each template, `essence` is "{} is a".

    goal: "say" the target, "forget" it, or "keep" what the model does with the prompt as it is.
    """

    contexts: tuple[Row, ...]
    essence: Row
    target: tuple[int, ...]
    goal: str = "say"


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows packed into sequences of one length, int32 ``[n, s]``; segment 0 is padding.

    lookup: ``[n, rows]`` index of each row's decisive token in the packed sequence.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    lookup: np.ndarray

    def as_tuple(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.positions, self.segments, self.lookup


def encode(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids of `text` with the tokenizer's own special tokens, and character offsets (None if it has none)."""
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer(text)["input_ids"]), None
    out = tokenizer(text, return_offsets_mapping=True, return_token_type_ids=False)
    return list(out["input_ids"]), [tuple(o) for o in out["offset_mapping"]]


class Memo:
    """A tokenizer that has tokenised everything in one call: with short texts the calls are what costs."""

    is_fast = False

    def __init__(self, tokenizer, texts: Sequence[str]):
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
        texts = list(dict.fromkeys(texts))
        self.known = dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))

    def __call__(self, text: str, **options):
        known = None if options else self.known.get(text)
        return self.tokenizer(text, **options) if known is None else {"input_ids": known}


def token_at(tokenizer, text: str, ids: Sequence[int], offsets, char: int) -> int:
    """Index of the token that holds the end of character `char` of `text`.

    A character may be split over several tokens (bytes of a non-ASCII letter): the last of them is meant.
    """
    if offsets is None:
        return len(tokenizer(text[: char + 1])["input_ids"]) - 1
    found = [i for i, (a, b) in enumerate(offsets) if a <= char < b]
    if not found:
        raise JaxEditError(f"no token of {text!r} holds character {char} ({text[char]!r})")
    return found[-1]


def spaced(target: str) -> str:
    """The target as it continues a prompt, with a space between the two."""
    return target if target[:1].isspace() else " " + target


def target_ids(tokenizer, prompt: str, target: str) -> list[int]:
    """The tokens that continue `prompt` with `target` (one space between them).

    Read off the joined text where it begins with the prompt's tokens, which is right for every tokenizer;
    otherwise the target is tokenised alone.
    """
    tail = spaced(target)
    head = encode(tokenizer, prompt)[0]
    joined = encode(tokenizer, prompt + tail)[0]
    if joined[-1:] == [tokenizer.eos_token_id] != head[-1:]:
        joined = joined[:-1]
    if len(joined) > len(head) and joined[: len(head)] == head:
        return joined[len(head) :]
    return list(tokenizer(tail, add_special_tokens=False)["input_ids"])


def prompt_row(tokenizer, request: EditRequest, template: str = "{}", tail: Sequence[int] = ()) -> Row:
    """The request's prompt in a context template, followed by the tokens `tail`."""
    before, after = template.split("{}")
    text = before + request.prompt + after
    if request.subject_start is None:
        raise RequestError([f"subject {request.subject!r} does not occur in prompt {request.prompt!r}"])
    return _row(tokenizer, text, len(before) + request.subject_start + len(request.subject) - 1, tail)


def _row(tokenizer, text: str, char: int, tail: Sequence[int]) -> Row:
    ids, offsets = encode(tokenizer, text)
    return Row((*ids, *tail), token_at(tokenizer, text, ids, offsets, char), len(tail))


def edit_tokens(tokenizer, request: EditRequest, templates: Sequence[Sequence[str]]) -> EditTokens:
    """Tokenise one request in every template. `templates` are grouped; the grouping sets the weights of keys."""
    target = target_ids(tokenizer, request.prompt, request.target)
    rows = [prompt_row(tokenizer, request, t, target[:-1]) for group in templates for t in group]
    essence = _row(tokenizer, request.subject + " is a", len(request.subject) - 1, ())
    return EditTokens(tuple(rows), essence, tuple(target))


def check_templates(templates) -> tuple[tuple[str, ...], ...]:
    """Normalise context templates to groups of texts that hold exactly one ``{}``. The first must be "{}" itself."""
    if isinstance(templates, str):
        raise JaxEditError("templates must be a list of texts (or of lists of texts), not one text")
    groups = [(t,) if isinstance(t, str) else tuple(t) for t in templates]
    if groups and all(len(g) == 1 for g in groups) and len(groups) > 1:
        groups = [groups[0], tuple(g[0] for g in groups[1:])]
    flat = [t for g in groups for t in g]
    bad = [t for t in flat if t.count("{}") != 1]
    if bad or not flat:
        raise JaxEditError(f"each context template must hold exactly one '{{}}'; these do not: {bad}")
    if flat[0] != "{}":
        raise JaxEditError(f"the first context template must be the clean prompt '{{}}', got {flat[0]!r}")
    return tuple(groups)


def template_weights(templates: Sequence[Sequence[str]], average: str = "by_group") -> np.ndarray:
    """Weight of each context in a key ``[p]`` (see `Method.key_average`)."""
    contexts = sum(map(len, templates))
    match average:
        case "flat":
            return np.full(contexts, 1 / contexts)
        case "clean":
            return np.eye(contexts)[0]
        case _:
            return np.concatenate([np.full(len(g), 1 / (len(g) * len(templates))) for g in templates])


def pack(edits: Iterable[Sequence[Row]], until_lookup: bool = False) -> Packed:
    """Pack each edit's rows into one sequence; `until_lookup` drops what comes after the decisive token.

    Lengths are rounded up, by a quarter at most, so that few programs serve many batches.
    """
    edits = [list(rows) for rows in edits]
    cut = [[r.tokens[: r.lookup + 1] if until_lookup else r.tokens for r in rows] for rows in edits]
    longest = max(sum(map(len, rows)) for rows in cut)
    length = round_up(longest, max(8, 2 ** (longest.bit_length() - 1) // 4))
    shape = (len(edits), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    lookup = np.zeros((len(edits), len(edits[0])), np.int32)
    for i, (rows, texts) in enumerate(zip(edits, cut, strict=True)):
        at = 0
        for j, (row, ids) in enumerate(zip(rows, texts, strict=True)):
            tokens[i, at : at + len(ids)] = ids
            positions[i, at : at + len(ids)] = np.arange(len(ids))
            segments[i, at : at + len(ids)] = j + 1
            lookup[i, j] = at + row.lookup
            at += len(ids)
    return Packed(tokens, positions, segments, lookup)


def chunks(columns: Sequence[np.ndarray], length: int) -> list[tuple[np.ndarray, ...]]:
    """Cut arrays that share their first axis into slices of one size, about `CHUNK_TOKENS` tokens each.

    length: tokens in a row. The last slice is filled up by repeating the last row, so that every slice has the same
    shape and one compiled function serves all; whoever joins the results cuts them to the number of rows.
    """
    n = len(columns[0])
    size = min(n, max(1, CHUNK_TOKENS // length))
    padded = [np.pad(x, [(0, -n % size)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in columns]
    return [tuple(x[at : at + size] for x in padded) for at in range(0, len(padded[0]), size)]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def validate(tokenizer, requests: Sequence[EditRequest], templates, max_positions: int) -> list[EditTokens]:
    """Tokenise all requests, or raise RequestError naming every one that cannot be carried out."""
    problems: list[str] = []
    made: list[EditTokens] = []
    if not requests:
        raise RequestError(["there are no edit requests"])
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    for i, request in enumerate(requests):
        where = f"request {i}" + (f" (id {request.id})" if request.id is not None else "")
        found = _text_problems(request)
        if not found:
            tokens = edit_tokens(tokenizer, request, templates)
            longest = max(len(r.tokens) for r in tokens.contexts)
            if not tokens.target:
                found = [f"target {request.target!r} has no tokens"]
            elif longest > max_positions:
                found = [f"prompt and target have {longest} tokens in context; the model takes {max_positions}"]
            made.append(tokens)
        problems += [f"{where}: {p}" for p in found]
    problems += _conflicts(requests)
    if problems:
        raise RequestError(problems)
    return made


def _text_problems(request: EditRequest) -> list[str]:
    found = []
    start = request.subject_start
    if not request.subject.strip():
        found.append("subject is empty")
    elif start is None or request.prompt[start : start + len(request.subject)] != request.subject:
        found.append(f"subject {request.subject!r} does not occur in prompt {request.prompt!r}")
    if not request.target.strip():
        found.append("target is empty")
    return found


def _conflicts(requests: Sequence[EditRequest]) -> list[str]:
    """Edits that are given twice, or that ask for two targets at once."""
    seen: dict[str, int] = {}
    problems = []
    for i, request in enumerate(requests):
        first = seen.setdefault(" ".join(request.prompt.split()), i)
        if first == i:
            continue
        if request.target.strip() == requests[first].target.strip():
            problems.append(f"request {i} repeats request {first}: {request.prompt!r} -> {request.target!r}")
        else:
            problems.append(
                f"requests {first} and {i} contradict each other: {request.prompt!r} -> "
                f"{requests[first].target!r} and {request.target!r}"
            )
    return problems
