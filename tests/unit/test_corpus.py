"""Corpora: every source gives its documents, and packing keeps every token in a place of its own."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxedit.data.corpus import corpus_hash, pack_documents, read_corpus, tokenizer_hash
from jaxedit.errors import JaxEditError

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXT = "First line\nsecond line.\n\n \n\nAnother paragraph.\n\n\nThe last.\n"
DOCUMENTS = ["First line\nsecond line.", "Another paragraph.", "The last."]


class Letters:
    """A tokenizer of one token a character, after a BOS."""

    def __call__(self, texts, **_):
        return {"input_ids": [[1, *map(ord, t)] for t in texts]}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_is_split_at_blank_lines(tmp_path):
    assert list(read_corpus(write(tmp_path / "a.txt", TEXT))) == DOCUMENTS
    assert list(read_corpus(str(write(tmp_path / "b.txt", "\ufeff" + TEXT.replace("\n", "\r\n"))))) == DOCUMENTS
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT)
    assert list(read_corpus(tmp_path / "c.txt.gz")) == DOCUMENTS


@pytest.mark.parametrize("field", ["text", "content", "Text"])
def test_json_lines_and_lists(tmp_path, field):
    lines = "\n".join(json.dumps({"id": 1, field: t}) for t in [*DOCUMENTS, "  "]) + "\n\n"
    assert list(read_corpus(write(tmp_path / "a.jsonl", lines))) == DOCUMENTS
    records = [DOCUMENTS[0], *({field: t} for t in DOCUMENTS[1:])]
    assert list(read_corpus(write(tmp_path / "a.json", json.dumps(records)))) == DOCUMENTS


def test_a_directory_is_read_in_order_of_path(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a" / "z.jsonl", '{"text": "one"}')
    write(tmp_path / "c.json", '["three"]')
    write(tmp_path / "README.md", "not this")
    assert list(read_corpus(tmp_path)) == ["one", "two", "three"]


def test_texts_in_memory_pass_through():
    assert list(read_corpus(DOCUMENTS)) == DOCUMENTS


def test_the_packaged_corpus():
    documents = list(read_corpus())
    assert len(documents) == 911
    assert documents == list(read_corpus("packaged"))
    assert 600_000 < sum(map(len, documents)) < 700_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "y"}\n', "a.jsonl: line 3 has no.*it has body"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl: line 1: field 'text' is int"),
        ("a.jsonl", "3\n", "a.jsonl: line 1 is int"),
        ("a.json", '{"text": "x"}', "a.json holds dict"),
        ("a.json", "[1]", "a.json: record 0 is int"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.csv", "x", "ends in '.csv'"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, message):
    with pytest.raises(JaxEditError, match=message):
        list(read_corpus(write(tmp_path / name, content)))


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(JaxEditError, match="a.txt cannot be read as UTF-8"):
        list(read_corpus(tmp_path / "a.txt"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-20])
    with pytest.raises(JaxEditError, match="b.txt.gz cannot be read"):
        list(read_corpus(tmp_path / "b.txt.gz"))


@pytest.mark.parametrize("source", ["nowhere.txt", "two\nlines", "x" * 2000, 3, [1], iter(["a"])])
def test_sources_that_are_none(source):
    with pytest.raises(JaxEditError):
        read_corpus(source)


def test_an_empty_directory(tmp_path):
    with pytest.raises(JaxEditError, match="holds no"):
        read_corpus(tmp_path)


def test_a_dataset_is_streamed(monkeypatch):
    asked = []

    def builder(name, config):
        asked.append((name, config))
        records = [{"text": t} for t in DOCUMENTS]
        return SimpleNamespace(
            info=SimpleNamespace(version="1.0.0"),
            config_id=config,
            hash="abc",
            as_streaming_dataset=lambda split: asked.append(split) or records,
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset_builder=builder))
    assert list(read_corpus("wikitext:wikitext-103-raw-v1:test")) == DOCUMENTS
    assert asked == [("wikitext", "wikitext-103-raw-v1"), "test"]
    assert corpus_hash("wikitext:a:train") == corpus_hash("wikitext:a")
    assert corpus_hash("wikitext:a:train") != corpus_hash("wikitext:a:test")


def test_a_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(JaxEditError, match="pip install"):
        list(read_corpus("wikitext:wikitext-103-raw-v1:train"))


def test_the_hash_is_of_the_content(tmp_path):
    first, second = write(tmp_path / "1" / "a.txt", TEXT), write(tmp_path / "2" / "b.txt", TEXT)
    assert corpus_hash(first) == corpus_hash(second)
    assert corpus_hash(first) != corpus_hash(write(tmp_path / "c.txt", TEXT + "More."))
    assert corpus_hash(["ab", "c"]) != corpus_hash(["a", "bc"])
    assert corpus_hash() == corpus_hash("packaged")


documents = st.lists(st.text(st.characters(codec="ascii"), min_size=0, max_size=20), max_size=90)


@given(documents, st.integers(1, 12), st.integers(1, 400))
def test_packing_places_every_token_once(docs, length, max_tokens):
    rows = list(pack_documents(Letters(), docs, length, max_tokens))
    left, expected = max_tokens, []
    for doc in docs:
        ids = [1, *map(ord, doc)][:left]
        left -= len(ids)
        expected += [tuple(ids[i : i + length]) for i in range(0, len(ids), length)]
    found = []
    for tokens, positions, segments in rows:
        assert tokens.shape == positions.shape == segments.shape == (length,)
        assert {x.dtype for x in (tokens, positions, segments)} == {np.dtype(np.int32)}
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))
            assert np.array_equal(positions[at], np.arange(len(at)))
            found.append(tuple(tokens[at].tolist()))
        assert not tokens[segments == 0].any()
    assert sorted(found) == sorted(expected)


def test_packing_stops_at_max_tokens_and_reads_no_further_than_needed():
    read = []
    docs = (read.append(i) or "abcdefghi" for i in range(100_000))
    rows = list(pack_documents(Letters(), docs, 32, 1003))
    assert sum((segments > 0).sum() for _, _, segments in rows) == 1003
    assert len(read) < 300


def test_little_of_a_packed_row_is_padding():
    random = np.random.default_rng(0)
    docs = ["x" * n for n in random.integers(40, 300, 600)]
    filled = np.mean([(segments > 0).mean() for _, _, segments in pack_documents(Letters(), docs, 512, 10**9)])
    assert filled > 0.97


def test_bad_sizes_and_no_tokenizer():
    for length, most in ((0, 5), (5, 0)):
        with pytest.raises(JaxEditError, match="at least 1"):
            list(pack_documents(Letters(), ["a"], length, most))
    with pytest.raises(JaxEditError, match="tokenizer"):
        list(pack_documents(None, ["a"], 5, 5))


def test_the_tokenizer_hash_ignores_padding():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-llama")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != before
