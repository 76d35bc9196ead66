"""Text for key statistics: documents from files, lists or the hub, and token rows packed from them."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxedit.errors import JaxEditError

PACKAGED = Path(__file__).parent / "packaged" / "corpus.txt.gz"
_FIELDS = ("text", "content", "Text")
_SUFFIXES = (".txt", ".jsonl", ".json")
_DOCUMENTS_AT_ONCE = 64  # tokenised together; few enough not to read far past what is needed
_OPEN_ROWS = 32  # rows that a document may still be put into
_PIECES_AT_ONCE = 256  # laid out together

Corpus = str | os.PathLike | Sequence[str] | None
Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def read_corpus(source: Corpus = None) -> Iterator[str]:
    """The documents of a corpus, read lazily and in a fixed order; blank ones are left out.

    source:
        * a .txt file: paragraphs separated by blank lines are documents; a .jsonl file of objects; a .json
          list of texts or objects. Objects hold the document under "text", "content" or "Text". UTF-8,
          possibly gzipped (.txt.gz);
        * a directory: all .txt, .jsonl and .json files below it, sorted by path;
        * a list of texts;
        * None or "packaged": 911 paragraphs of English Wikipedia, about 150,000 tokens;
        * "name:config:split" (or "name:config", split train): a dataset of the Hugging Face hub, streamed
          with the `datasets` package, for instance "wikitext:wikitext-103-raw-v1:train". The config may be
          empty.

    Raises JaxEditError where the source does not exist or cannot be read, naming the file and line.
    """
    kind, found = _locate(source)
    if kind == "files":
        documents = itertools.chain.from_iterable(_read_file(path) for path, _ in found)
    elif kind == "list":
        documents = iter(found)
    else:
        documents = _read_dataset(*found)
    return (text for text in documents if text.strip())


def corpus_hash(source: Corpus = None) -> str:
    """Hash of a corpus's content: the files' bytes, the texts, or what the hub says about a dataset."""
    kind, found = _locate(source)
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    if kind == "files":
        for path, name in found:
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    elif kind == "list":
        for text in found:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}\0".encode() + data)
    else:
        name, config, split = found
        builder = _dataset(name, config)
        version = getattr(builder.info, "version", None)
        digest.update(repr((name, builder.config_id, str(version), builder.hash, split)).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """Hash of what decides how text becomes tokens. Padding and truncation do not; they vary by call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
        content["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def pack_documents(tokenizer, docs: Iterable[str], length: int, max_tokens: int) -> Iterator[Row]:
    """Token rows ``(tokens, positions, segments)``, int32 ``[length]`` each, of `max_tokens` tokens in all.

    Each document is a segment of its own, numbered from 1 in every row; segment 0 is padding. Positions start
    again with each document, so it is seen as if it stood alone. It carries the special tokens that the
    tokenizer adds (BOS at its start). Documents longer than `length` are cut into pieces, each a segment.
    The document at which `max_tokens` is reached is cut there; fewer tokens come out only where the corpus
    has fewer.

    A few hundred documents at a time are laid out, the longest first, each in the fullest row that has room for it,
    so hardly anything is padding. The order depends on nothing but the arguments.
    """
    if length < 1 or max_tokens < 1:
        raise JaxEditError(f"length and max_tokens must be at least 1, got {length} and {max_tokens}")
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    rows: list[tuple[int, list[list[int]]]] = []  # open ones: how full, and their pieces
    pieces = _pieces(tokenizer, docs, length, max_tokens)
    while some := list(itertools.islice(pieces, _PIECES_AT_ONCE)):
        for piece in sorted(some, key=len, reverse=True):
            fitting = [i for i, (size, _) in enumerate(rows) if size + len(piece) <= length]
            at = max(fitting, key=lambda i: rows[i][0], default=len(rows))
            size, held = rows.pop(at) if fitting else (0, [])
            rows.append((size + len(piece), [*held, piece]))
        rows.sort(key=lambda row: -row[0])
        while rows and (len(rows) > _OPEN_ROWS or rows[0][0] == length):
            yield _row(rows.pop(0)[1], length)
    for _, held in rows:
        yield _row(held, length)


def _pieces(tokenizer, docs: Iterable[str], length: int, max_tokens: int) -> Iterator[list[int]]:
    left, docs = max_tokens, iter(docs)
    while texts := list(itertools.islice(docs, _DOCUMENTS_AT_ONCE)):
        # `verbose` would log a warning for documents longer than the model's context, which are cut anyway
        for ids in tokenizer(texts, return_token_type_ids=False, verbose=False)["input_ids"]:
            ids = ids[:left]
            left -= len(ids)
            yield from (list(ids[i : i + length]) for i in range(0, len(ids), length))
            if left == 0:
                return


def _row(pieces: list[list[int]], length: int) -> Row:
    tokens, positions, segments = (np.zeros(length, np.int32) for _ in range(3))
    at = 0
    for number, piece in enumerate(pieces, 1):
        span = slice(at, at + len(piece))
        tokens[span], positions[span], segments[span] = piece, np.arange(len(piece)), number
        at += len(piece)
    return tokens, positions, segments


def _locate(source: Corpus) -> tuple[str, Any]:
    """What a source is: ("files", [(path, name)]), ("list", texts) or ("dataset", (name, config, split))."""
    if source is None or source == "packaged":
        return "files", [(PACKAGED, "packaged.txt.gz")]
    if not isinstance(source, (str, os.PathLike)):
        return "list", _texts(source)
    name = os.fspath(source)
    if "\n" in name or len(name) > 1000:
        raise JaxEditError("a corpus given as one text must be the path of a file; pass texts as a list")
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in _SUFFIXES)
        if not files:
            raise JaxEditError(f"corpus {path}: the directory holds no {', '.join(_SUFFIXES)} files")
        return "files", [(p, p.relative_to(path).as_posix()) for p in files]
    if path.is_file():
        if _suffix(path) not in _SUFFIXES:
            raise JaxEditError(f"corpus {path} ends in {path.suffix!r}; use {', '.join(_SUFFIXES)}")
        return "files", [(path, _suffix(path))]  # a file that is moved or renamed is still the same corpus
    parts = name.split(":")
    if isinstance(source, str) and len(parts) in (2, 3) and parts[0]:
        return "dataset", (parts[0], parts[1] or None, parts[2] if len(parts) == 3 else "train")
    raise JaxEditError(
        f"no corpus at {name}: there is no such file or directory, and it is not 'packaged' or the name of a "
        "dataset ('name:config:split')"
    )


def _texts(source: Any) -> Sequence[str]:
    if not isinstance(source, Sequence):
        raise JaxEditError(f"a corpus in memory must be a list of texts, got {type(source).__name__}")
    for i, text in enumerate(source):
        if not isinstance(text, str):
            raise JaxEditError(f"corpus: document {i} is {type(text).__name__}, expected text")
    return source


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path) -> Any:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def _read_file(path: Path) -> Iterator[str]:
    read = {".txt": _paragraphs, ".jsonl": _json_lines, ".json": _json_list}[_suffix(path)]
    try:
        with _open(path) as file:
            yield from read(file, path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise JaxEditError(f"corpus {path} cannot be read as UTF-8 text: {error}") from None


def _paragraphs(file: Iterable[str], path: Path) -> Iterator[str]:
    for blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(lines).strip()


def _json_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"corpus {path}: line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise JaxEditError(f"{where} is not JSON: {error}") from None
        yield _document(record, where)


def _json_list(file: Any, path: Path) -> Iterator[str]:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        raise JaxEditError(f"corpus {path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise JaxEditError(f"corpus {path} holds {type(records).__name__}, expected a list of texts or objects")
    for i, record in enumerate(records):
        yield _document(record, f"corpus {path}: record {i}")


def _document(record: Any, where: str) -> str:
    if isinstance(record, dict):
        name = next((f for f in _FIELDS if f in record), None)
        if name is None:
            raise JaxEditError(f"{where} has none of the fields {', '.join(_FIELDS)}; it has {', '.join(record)}")
        record, where = record[name], f"{where}: field {name!r}"
    if not isinstance(record, str):
        raise JaxEditError(f"{where} is {type(record).__name__}, expected text")
    return record


def _dataset(name: str, config: str | None):
    """The builder of a dataset, which knows its version before anything is read."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] (an optional extra)
    except ImportError:
        raise JaxEditError(
            f"corpus {name!r} is no local file; datasets from the hub need the `datasets` package: "
            "pip install 'jaxedit[datasets]'"
        ) from None
    try:
        return datasets.load_dataset_builder(name, config)
    except Exception as error:  # the hub client raises a different type for each way of not being reachable
        raise JaxEditError(
            f"corpus {name!r} is neither a local file nor a dataset that can be loaded: {error}"
        ) from error


def _read_dataset(name: str, config: str | None, split: str) -> Iterator[str]:
    builder = _dataset(name, config)
    try:
        records = builder.as_streaming_dataset(split=split)
    except (ValueError, KeyError) as error:
        raise JaxEditError(f"corpus {name!r} has no split {split!r}: {error}") from error
    for i, record in enumerate(records):
        yield _document(record, f"corpus {name}:{config or ''}:{split}: record {i}")
