"""From text to token rows: the decisive token, targets, templates, packing, and which requests are refused."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxedit.data.tokens import (
    CLEAN,
    Row,
    check_templates,
    chunks,
    edit_tokens,
    encode,
    pack,
    prompt_row,
    target_ids,
    template_weights,
    validate,
)
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.targets.anchor_plan import buckets, places
from jaxedit.types import EditRequest

often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = {"": 0, "bos": 1, "bos and eos": 1}


def special_tokenizer(folder, kind: str):
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    single = {"": "$A", "bos": "<|endoftext|> $A", "bos and eos": "<|endoftext|> $A <|endoftext|>"}[kind]
    made.post_processor = TemplateProcessing(single=single, special_tokens=[("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=list(SPECIAL))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(goldens, kind):
    return special_tokenizer(goldens / "tiny-llama", kind)


@pytest.fixture(scope="module")
def plain(goldens):
    return special_tokenizer(goldens / "tiny-llama", "")


def token_bytes(tokenizer, token: int) -> bytes:
    """The bytes that one token of a byte-level vocabulary stands for."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in kept]
    table = {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}
    return bytes(table[c] for c in tokenizer.convert_ids_to_tokens(token))


def ends_at(tokenizer, row: Row, bos: int) -> tuple[int, int]:
    """First and last byte offsets of the decisive token, counted by putting the tokens' bytes together."""
    lengths = [len(token_bytes(tokenizer, t)) for t in row.tokens[bos : row.lookup + 1]]
    return sum(lengths[:-1]), sum(lengths)


def covers_last_character(tokenizer, row: Row, text: str, last: int, bos: int) -> bool:
    """Whether the decisive token holds the last byte of character `last`."""
    byte = len(text[: last + 1].encode()) - 1
    first, after = ends_at(tokenizer, row, bos)
    return first <= byte < after


CASES = {
    "at the start": ("Marie Curie was born in", "Marie Curie"),
    "at the end": ("The capital of the country of France", "France"),
    "the whole prompt": ("Rome", "Rome"),
    "twice": ("Paris is Paris and the river is", "Paris"),
    "in braces": ("In {set} notation {x} the mother tongue of Bach {y} is", "Bach"),
    "inside a word": ("The Bachelor of Bachs is", "Bach"),
    "accent": ("The voice of Beyoncé is", "Beyoncé"),
    "breve": ("The party of Erdoğan is", "Erdoğan"),
    "no spaces": ("首都は東京です", "東京"),
    "emoji": ("The flag 🇫🇷 of 👩‍🚀 is", "👩‍🚀"),
    "combining accent": ("Cafe\u0301 is in", "Cafe\u0301"),
    "trailing punctuation": ("The works of Dr. No. are", "Dr. No."),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", ["{}", "The first season of this. {}", "日本. {} and"])
def test_decisive_token(tokenizer, kind, case, template):
    prompt, subject = CASES[case]
    request = EditRequest(prompt, subject, "x")
    assert request.subject_start == prompt.rfind(subject)
    row = prompt_row(tokenizer, request, template)
    text = template.replace("{}", prompt)
    last = template.index("{}") + prompt.rfind(subject) + len(subject) - 1
    assert covers_last_character(tokenizer, row, text, last, SPECIAL[kind])
    assert list(row.tokens) == tokenizer(text)["input_ids"]
    assert (row.tokens[0] == 0) == (kind != "")


def test_given_occurrence(plain):
    prompt = "Paris is Paris and the river is"
    first, last = (prompt_row(plain, EditRequest(prompt, "Paris", "x", subject_start=s)) for s in (0, None))
    assert first.lookup < last.lookup
    assert covers_last_character(plain, first, prompt, 4, 0)
    assert covers_last_character(plain, last, prompt, 13, 0)


def test_template_and_written_out_prompt_agree(plain):
    made = EditRequest.from_template("Is {} the home of Rome?", "Rome", "no")
    assert made.prompt == "Is Rome the home of Rome?"
    assert made.subject_start == 3
    row = prompt_row(plain, made)
    assert covers_last_character(plain, row, made.prompt, 6, 0)


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("aé東🇫 {}'\u0301"), max_size=12
)


@often
@given(before=words, subject=words.filter(str.strip), after=words, head=words, tail=words)
@pytest.mark.parametrize("special", list(SPECIAL))
def test_decisive_token_of_any_text(goldens, special, before, subject, after, head, tail):
    tokenizer = special_tokenizer(goldens / "tiny-llama", special)
    assume("{}" not in before + subject + after and "{}" not in head + tail)
    template = f"{head}{{}}{tail}"
    assume(template.count("{}") == 1)
    request = EditRequest(before + subject + after, subject, "x", subject_start=len(before))
    text = head + request.prompt + tail
    row = prompt_row(tokenizer, request, template)
    last = len(head) + len(before) + len(subject) - 1
    assert covers_last_character(tokenizer, row, text, last, SPECIAL[special])


class Slow:
    """A tokenizer without offsets, as SentencePiece ones are in Python: one token a word, "▁" where a word begins."""

    is_fast = False
    eos_token_id = -1

    def __call__(self, text, add_special_tokens=True):
        ids = [sum(map(ord, word)) for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_tokenizer_without_offsets():
    row = prompt_row(Slow(), EditRequest("The works of Jane Austen are", "Jane Austen", "x"), "Well then. {}")
    assert row.lookup == 7
    assert row.tokens[row.lookup] == sum(map(ord, "Austen"))
    assert target_ids(Slow(), "The works are", "very good") == [sum(map(ord, w)) for w in ("very", "good")]


@pytest.mark.parametrize("target", ["Paris", " Paris", "New York City", "東京", "é"])
@pytest.mark.parametrize("prompt", ["The capital is", "In 首都", "Beyoncé"])
def test_target_continues_the_prompt(tokenizer, kind, prompt, target):
    found = target_ids(tokenizer, prompt, target)
    assert found == target_ids(tokenizer, prompt, " " + target.strip())
    head = encode(tokenizer, prompt)[0][SPECIAL[kind] :]
    head = head[:-1] if kind == "bos and eos" else head
    text = b"".join(token_bytes(tokenizer, t) for t in (*head, *found))
    assert text.decode() == f"{prompt} {target.strip()}"
    assert 0 not in found


def test_rows_of_an_edit(plain):
    request = EditRequest("The capital of France is", "France", "New York City")
    templates = (("{}",), ("So it is. {}", "And. {}"))
    edit = edit_tokens(plain, request, templates)
    assert len(edit.target) > 1
    assert len(edit.contexts) == 3
    for row, template in zip(edit.contexts, ("{}", "So it is. {}", "And. {}"), strict=True):
        prompt = plain(template.replace("{}", request.prompt))["input_ids"]
        assert list(row.tokens) == prompt + list(edit.target[:-1])
        assert row.n_target == len(edit.target) - 1
    assert list(edit.essence.tokens) == plain("France is a")["input_ids"]
    assert covers_last_character(plain, edit.essence, "France is a", 5, 0)


# Packing


rows = st.integers(1, 9).flatmap(
    lambda n: st.builds(
        lambda tokens, lookup: Row(tuple(tokens), lookup),
        st.lists(st.integers(1, 99), min_size=n, max_size=n),
        st.integers(0, n - 1),
    )
)


@often
@given(
    data=st.data(),
    n=st.integers(1, 5),
    width=st.integers(1, 4),
    until_lookup=st.booleans(),
)
def test_pack_keeps_every_row(data, n, width, until_lookup):
    edits = [[data.draw(rows) for _ in range(width)] for _ in range(n)]
    packed = pack(edits, until_lookup)
    assert packed.tokens.shape == packed.positions.shape == packed.segments.shape
    assert packed.tokens.shape[1] % 8 == 0
    assert packed.lookup.shape == (n, width)
    longest = 0
    for i, edit in enumerate(edits):
        used = 0
        for j, row in enumerate(edit):
            kept = row.tokens[: row.lookup + 1] if until_lookup else row.tokens
            here = np.flatnonzero(packed.segments[i] == j + 1)
            np.testing.assert_array_equal(here, used + np.arange(len(kept)))
            np.testing.assert_array_equal(packed.tokens[i, here], kept)
            np.testing.assert_array_equal(packed.positions[i, here], np.arange(len(kept)))
            assert packed.lookup[i, j] == here[row.lookup]
            used += len(kept)
        assert not packed.segments[i, used:].any()
        longest = max(longest, used)
    assert packed.tokens.shape[1] - longest < max(8, longest / 4)


@often
@given(n=st.integers(1, 40), length=st.sampled_from([1, 3000, 8192, 16_384, 50_000]))
def test_chunks_have_one_shape_and_lose_nothing(n, length):
    column, table = np.arange(n), np.arange(2 * n).reshape(n, 2)
    parts = chunks((column, table), length)
    assert len({p[0].shape for p in parts}) == 1
    assert parts[0][0].shape[0] * length <= max(16_384, length)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts])[:n], column)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts])[:n], table)
    assert (np.concatenate([p[0] for p in parts])[n:] == n - 1).all()


@often
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    growth=st.sampled_from([1.0, 1.25, 3.0]),
    tokens=st.sampled_from([1, 300, 2000]),
)
def test_buckets_hold_every_edit_once(sizes, growth, tokens):
    found = buckets(sizes, growth, tokens)
    assert sorted(i for members in found for i in members) == list(range(len(sizes)))
    held = [[sizes[i] for i in members] for members in found]
    assert [x for bucket in held for x in bucket] == sorted(sizes, reverse=True)
    for bucket in held:
        # beyond one step's tokens all are about as large as the first
        beyond = [x for x, total in zip(bucket, np.cumsum(bucket), strict=True) if total > tokens]
        assert all(bucket[0] <= growth * x + 4 for x in beyond)
    # a bucket more would have been needed: no two neighbours fit into one
    for a, b in zip(held, held[1:], strict=False):
        assert sum(a) + b[0] > tokens and a[0] > growth * b[0] + 4


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6), spare=st.integers(0, 3))
def test_places_lay_items_end_to_end(counts, spare):
    length, most = sum(counts) + spare, 4
    if length == 0:
        return
    at = places(jnp.asarray(counts), length, most)
    expected = [(i, j) for i, n in enumerate(counts) for j in range(n)]
    assert [tuple(map(int, x)) for x in zip(at.owner, at.index, strict=True)][: len(expected)] == expected
    assert list(at.used) == [True] * len(expected) + [False] * spare
    for place, (i, j) in enumerate(expected):
        assert at.slots[i, j] == place and at.back[place] == i * most + j
    missing = [int(at.slots[i, j]) for i, n in enumerate(counts) for j in range(n, most)]
    assert len(set(missing)) == len(missing) and all(m >= length for m in missing)
    assert all(int(b) >= len(counts) * most for b in at.back[len(expected) :])


# Templates


def test_template_weights():
    groups = check_templates([["{}"], [f"{w}. {{}}" for w in "abcde"]])
    np.testing.assert_allclose(template_weights(groups), [0.5, *[0.1] * 5], rtol=1e-15)
    np.testing.assert_allclose(template_weights(CLEAN), [1.0])


@often
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_template_weights_sum_to_one(sizes):
    weights = template_weights([["{}"] * size for size in sizes])
    assert len(weights) == sum(sizes)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(weights[0], 1 / (len(sizes) * sizes[0]))


def test_flat_templates_are_grouped_as_published():
    assert check_templates(["{}", "A. {}", "B. {}"]) == (("{}",), ("A. {}", "B. {}"))
    assert check_templates([["{}"], ["A. {}", "B. {}"]]) == (("{}",), ("A. {}", "B. {}"))
    assert check_templates(["{}"]) == check_templates([["{}"]]) == (("{}",),)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("{}", "list of texts"),
        ([], "exactly one"),
        (["{}", "no placeholder"], "no placeholder"),
        (["{}", "{} and {}"], "{} and {}"),
        (["A. {}"], "clean prompt '{}', got 'A. {}'"),
        ([["A. {}"], ["{}"]], "clean prompt"),
    ],
)
def test_bad_templates(templates, message):
    with pytest.raises(JaxEditError) as caught:
        check_templates(templates)
    assert message in str(caught.value)


# What is refused


def test_validate_names_every_bad_request(plain):
    requests = [
        EditRequest("The capital of France is", "France", "Rome", id="good"),
        EditRequest("The capital of France is", "Spain", "Rome", id="wrong subject"),
        EditRequest("The river of Spain is", "Spain", "  "),
        EditRequest("The song of France is", "", "x"),
        EditRequest("The capital of  France is ", "France", "Oslo"),
        EditRequest("The capital of France is", "France", " Rome"),
        EditRequest("The " + "very " * 130 + "big France is", "France", "Rome"),
        EditRequest("The home of France is", "France", "Rome", subject_start=2),
    ]
    with pytest.raises(RequestError) as caught:
        validate(plain, requests, CLEAN, 128)
    problems = caught.value.problems
    for part in (
        "request 1 (id wrong subject): subject 'Spain' does not occur in prompt 'The capital of France is'",
        "request 2: target is empty",
        "request 3: subject is empty",
        "requests 0 and 4 contradict each other",
        "request 5 repeats request 0",
        "request 6: prompt and target have",
        "request 7: subject 'France' does not occur",
    ):
        assert sum(p.startswith(part) for p in problems) == 1, part
        assert part in str(caught.value)
    assert sum(p.startswith("request 1 repeats request 0") for p in problems) == 1  # its prompt and target do
    assert len(problems) == 8


def test_the_longest_context_counts(plain):
    request = EditRequest("The capital of France is", "France", "Rome")
    n = len(plain(request.prompt)["input_ids"]) + len(target_ids(plain, request.prompt, "Rome")) - 1
    assert len(validate(plain, [request], CLEAN, n)) == 1
    with pytest.raises(RequestError, match=f"{n} tokens in context; the model takes {n - 1}"):
        validate(plain, [request], CLEAN, n - 1)
    with pytest.raises(RequestError, match="tokens in context"):
        validate(plain, [request], (("{}",), ("Well. {}",)), n)


def test_no_requests_and_no_tokenizer(plain):
    with pytest.raises(RequestError, match="no edit requests"):
        validate(plain, [], CLEAN, 128)
    with pytest.raises(JaxEditError, match="without a tokenizer"):
        validate(None, [EditRequest("Rome is", "Rome", "x")], CLEAN, 128)
