"""GRACE: its codebook against one written in NumPy, and what it does to a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import (
    adapted_logits,
    greedy,
    logits,
    prompts_of,
    same_bits,
    target_nll,
    trees_equal,
    with_adapters,
)

from jaxedit.adapters.codebook import Distances, decide_at_ends, nearest
from jaxedit.adapters.grace import Grace, rounds
from jaxedit.adapters.grace_book import GAP, Book
from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.transformer import Context

ROUNDING = 1e-3
QUICK = Grace(layers=(3,), radius=0.5, steps=8, lr=0.5, include_query=True)


@pytest.fixture(scope="module")
def llama(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:5]


@pytest.fixture(scope="module")
def edited(llama):
    model, tokenizer, requests = llama
    return QUICK.edit(model, tokenizer, requests)


def book_of(n: int, d: int) -> Book:
    free = np.full(n, -1, np.int32)
    return Book(
        keys=np.zeros((n, d), np.float32),
        values=np.zeros((n, d), np.float32),
        radii=np.zeros(n, np.float32),
        labels=np.full((n, 1), -1, np.int32),
        owner=free.copy(),
        row=free.copy(),
        resized=free.copy(),
        before=np.zeros(n, np.float32),
        given=0,
    )


def insert_all(book: Book, queries, labels, radius=1.0) -> list[str]:
    distances = Distances(np.asarray(queries, np.float32), book.keys)
    return [book.insert(np.asarray([y], np.int32), radius, i, distances, ROUNDING)[0] for i, y in enumerate(labels)]


def oracle(queries, labels, radius):
    """Keys, radii and labels of the paper's codebook, in float64."""
    keys, radii, held = [], [], []
    for q, y in zip(np.asarray(queries, np.float64), labels, strict=True):
        apart = [np.sqrt(np.sum((q - k) ** 2)) for k in keys]
        i = int(np.argmin(apart)) if apart else -1
        if i < 0 or apart[i] > radius + radii[i]:
            keys, radii, held = [*keys, q], [*radii, radius], [*held, y]
        elif held[i] != y:
            radii[i] = apart[i] / 2 - 1e-5
            keys, radii, held = [*keys, q], [*radii, apart[i] / 2], [*held, y]
        elif apart[i] > radii[i]:
            radii[i] = apart[i] + ROUNDING * np.sqrt(np.sum(q**2))
    return np.asarray(keys), np.asarray(radii), held


@pytest.mark.parametrize(
    ("query", "label", "case", "radii"),
    [
        ((2.5, 0), 1, "new", [1.0, 1.0]),
        ((1.5, 0), 2, "split", [0.75 - GAP, 0.75]),
        ((0.5, 0), 2, "split", [0.25 - GAP, 0.25]),
        ((0.5, 0), 1, "inside", [1.0]),
        ((1.5, 0), 1, "covered", [1.5 * (1 + ROUNDING)]),
        ((2.0, 0), 1, "covered", [2.0 * (1 + ROUNDING)]),  # as far as both radii: still the close branch
        ((0.0, 0), 2, "overwritten", [1.0]),
    ],
)
def test_a_second_edit_is_new_or_splits_or_joins(query, label, case, radii):
    book = book_of(8, 2)
    assert insert_all(book, [(0, 0), query], [1, label]) == ["new", case]
    assert np.allclose(book.radii[book.owner >= 0], radii)
    if case == "overwritten":
        assert book.labels[0] == label and book.row[:2].tolist() == [-1, 0]


def test_codebook_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    queries, labels = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    book = book_of(64, 3)
    cases = insert_all(book, queries, labels, radius=0.4)
    assert {"new", "split", "covered", "inside"} <= set(cases)
    keys, radii, held = oracle(queries, labels, 0.4)
    live = book.owner >= 0
    np.testing.assert_allclose(book.keys[live], keys, rtol=1e-6)
    np.testing.assert_allclose(book.radii[live], radii, rtol=1e-4)
    assert book.labels[live, 0].tolist() == held


def test_withdrawing_the_last_edit_gives_the_codebook_before_it():
    rng = np.random.default_rng(1)
    queries, labels = rng.normal(size=(30, 2)), rng.integers(0, 3, 30)
    one, other = book_of(32, 2), book_of(32, 2)
    insert_all(one, queries, labels, 0.4)
    for edit in range(29, 11, -1):
        one.withdraw(edit)
    insert_all(other, queries[:12], labels[:12], 0.4)
    for field in ("keys", "radii", "labels", "owner", "row", "resized"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field


def test_a_ball_gets_back_its_radius_in_whatever_order_edits_go():
    for order in ((1, 2), (2, 1)):
        book = book_of(8, 2)
        insert_all(book, [(0, 0), (1.5, 0), (0, 0.4)], [1, 2, 3])
        for edit in order:
            book.withdraw(edit)
        assert book.radii[0] == 1 and book.owner.tolist() == [0] + [-1] * 7


def test_a_replaced_edit_leaves_no_trace():
    """The ball that it had split has its radius again, once the edit in its place is gone too."""
    book = book_of(8, 2)
    assert insert_all(book, [(1, 0), (2.5, 0), (2.5005, 0)], [1, 2, 3]) == ["new", "split", "overwritten"]
    assert book.row[:3].tolist() == [0, -1, 1] and np.allclose(book.radii[:2], 0.75, atol=1e-3)
    book.withdraw(2)
    assert book.radii[0] == 1 and book.owner.tolist() == [0] + [-1] * 7


def test_nearest_key_is_found_where_a_product_alone_would_err():
    rng = np.random.default_rng(2)
    keys = (300 + rng.normal(size=(40, 64))).astype(np.float32)
    keys[20:] = keys[:20]
    queries = keys[:20] + 1e-3 * rng.normal(size=(20, 64)).astype(np.float32)
    row, distance = jax.jit(nearest)(queries, keys, np.arange(40) != 3)
    expected = np.linalg.norm(queries[:, None].astype(np.float64) - keys[None], axis=-1)
    assert np.asarray(row).tolist() == [23 if i == 3 else i for i in range(20)]
    np.testing.assert_allclose(distance, expected[np.arange(20), row], rtol=1e-3)


def test_only_the_prompts_last_token_is_asked():
    queries = jnp.arange(12).reshape(2, 6, 1)
    ask = jax.jit(lambda c, carried: decide_at_ends(lambda q: q[:, 0].astype(jnp.int32), queries, c, carried))
    context = Context.of_mask(np.ones((2, 6), np.int32))
    for ends in ([[3] * 6, [5] * 6], [[1, 1, 4, 4, 4, 5], [5] * 6]):
        known, carry = ask(context.ending(jnp.asarray(ends)), None)
        assert known.tolist() == [ends[0], [6 + e for e in ends[1]]]
        assert carry.tolist() == [ends[0][-1], 6 + ends[1][-1]]
    assert ask(context, None)[0].tolist() == np.arange(12).reshape(2, 6).tolist()
    carried = jnp.asarray([70, 80])
    assert ask(context.ending([-1, -1]), carried)[0].tolist() == [[70] * 6, [80] * 6]
    assert ask(context.ending([-1, 2]), carried)[0].tolist() == [[70] * 6, [8] * 6]
    mixed = jnp.asarray([[-1, -1, 3, 3, 3, 3], [-1] * 6])
    assert ask(context.ending(mixed), carried)[0].tolist() == [[70, 70, 3, 3, 3, 3], [80] * 6]


def test_edits_of_one_row_take_turns():
    assert [r.tolist() for r in rounds(np.asarray([0, 1, 0, 2, 1, 0]))] == [[0, 1, 3], [2, 4], [5]]


def test_edits_are_learnt(edited, llama):
    model, tokenizer, requests = llama
    state, traces = edited
    assert traces["case"].tolist() == [0] * 5 and traces["losses"].shape == (5, 8)
    assert (traces["losses"][:, -1] < 0.1).all()
    assert state.owner[:5].tolist() == list(range(5))


def test_the_edited_model_says_the_targets(edited, llama):
    model, tokenizer, requests = llama
    found = target_nll(with_adapters(model, edited[0]), tokenizer, requests)
    np.testing.assert_allclose(found, edited[1]["losses"][:, -1], atol=0.05)  # one step later
    assert (found < 0.1).all()


def test_edits_one_by_one_are_those_made_together(edited, llama):
    model, tokenizer, requests = llama
    state = None
    for request in requests:
        state, _ = QUICK.edit(model, tokenizer, [request], state=state)
    together, _ = edited
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one[:5] if one.ndim else one, other[:5] if other.ndim else other, atol=2e-3)


def test_no_ball_means_the_base_model(edited, llama):
    model, tokenizer, requests = llama
    state, _ = edited
    rows, ends = prompts_of(tokenizer, requests)
    base = logits(model, rows, ends)
    no_radius = dataclasses.replace(state, radii=state.radii * 0)
    assert same_bits(base, logits(with_adapters(model, no_radius), rows, ends))
    assert same_bits(base, logits(with_adapters(model, QUICK.empty(model)), rows, ends))
    elsewhere, at = [tokenizer("Water boils at a hundred degrees")["input_ids"]], [3]
    assert same_bits(logits(model, elsewhere, at), logits(with_adapters(model, state), elsewhere, at))


def test_a_withdrawn_edit_leaves_the_base_model_on_its_prompt(edited, llama):
    model, tokenizer, requests = llama
    state, _ = edited
    rows, ends = prompts_of(tokenizer, requests)
    base, all_in, one_out = (
        logits(m, rows, ends) for m in (model, with_adapters(model, state), with_adapters(model, state.without([2])))
    )
    assert np.array_equal(base[2], one_out[2])
    assert not any(np.array_equal(b, a) for b, a in zip(base, all_in, strict=True))
    assert same_bits([x for i, x in enumerate(all_in) if i != 2], [x for i, x in enumerate(one_out) if i != 2])
    again, _ = QUICK.edit(model, tokenizer, [requests[2]], state=state.without([2]))
    assert again.owner[:5].tolist() == [0, 1, 5, 3, 4]
    with pytest.raises(JaxEditError, match="edits \\[7\\] are not held"):
        state.without([7])


@pytest.mark.parametrize("replace", ["prompt", "last", "all"])
def test_generation_with_a_cache_is_that_without(edited, llama, replace):
    model, tokenizer, requests = llama
    state = dataclasses.replace(edited[0], replace=replace, include_query=replace == "prompt")
    rows, _ = prompts_of(tokenizer, requests)
    mine = with_adapters(model, state)
    assert continue_rows(mine.params, mine.config, rows[:3], 4) == greedy(mine, rows[:3], 4)


def test_padding_does_not_matter(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    mine = with_adapters(model, edited[0])
    right = logits(mine, rows, ends, 24)
    for left, out in zip(right, logits(mine, rows, ends, 24, left=True), strict=True):
        np.testing.assert_allclose(left, out, atol=1e-3)
    for together, row, end in zip(right[:2], rows, ends, strict=False):
        np.testing.assert_allclose(together, logits(mine, [row], [end])[0], atol=1e-3)


def test_first_projection_and_last_token(tiny, goldens):
    model, tokenizer = tiny("tiny-gpt2")
    requests = read_requests(goldens / "tiny-gpt2" / "facts.json")[:2]
    up = Grace(layers=(3,), linear="up", replace="last", steps=5, lr=0.5, start="warm")
    state, traces = up.edit(model, tokenizer, requests)
    # A warm value is what the map says anyway: the first loss is the base model's
    rows, ends = prompts_of(tokenizer, requests)
    np.testing.assert_allclose(traces["losses"][:, 0], target_nll(model, tokenizer, requests), atol=1e-4)
    assert (traces["losses"][:, -1] < traces["losses"][:, 0]).all()
    assert np.array_equal(
        logits(with_adapters(model, state.without([0, 1])), rows, ends)[0], logits(model, rows, ends)[0]
    )
    with pytest.raises(JaxEditError, match="gated"):
        up.empty(tiny("tiny-llama")[0])


def test_a_state_of_the_same_size_runs_the_same_program(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    logits(with_adapters(model, edited[0]), rows, ends)
    before = adapted_logits._cache_size()
    logits(with_adapters(model, edited[0].without([1])), rows, ends)
    assert adapted_logits._cache_size() == before
    assert trees_equal(edited[0].without([]), edited[0])


def test_settings_that_make_no_sense_are_refused(llama):
    with pytest.raises(JaxEditError, match="include_query"):
        Grace(replace="last", include_query=True)
    with pytest.raises(JaxEditError, match="no effect"):
        Grace(layers=(5,)).empty(llama[0])
    with pytest.raises(JaxEditError, match="layers=.3,."):
        dataclasses.replace(QUICK, layers=(2,)).edit(*llama[:2], llama[2][:1], state=QUICK.empty(llama[0]))
