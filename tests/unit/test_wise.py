"""WISE: what its memories hold and when they are used, and merging, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import greedy, logits, prompts_of, same_bits, target_nll, with_adapters

from jaxedit.adapters.merging import slerp, ties
from jaxedit.adapters.wise import Wise, WiseState, _entries
from jaxedit.adapters.wise_memories import Shelf
from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.sites import Seen
from jaxedit.models.transformer import Context

QUICK = Wise(
    layers=(3,),
    steps=25,
    lr=0.3,
    limit=0.5,
    inside=4.0,
    outside=1.0,
    between=2.0,
    act_ratio=0.8,
    contexts=(4,),
    save_every=2,
    merge_every=4,
)


@pytest.fixture(scope="module")
def llama(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:4]


@pytest.fixture(scope="module")
def edited(llama):
    """Three edits: a full shard and one that is not."""
    model, tokenizer, requests = llama
    return QUICK.edit(model, tokenizer, requests[:3])


def state_of(deltas, least, **fields) -> WiseState:
    n = len(deltas)
    made = {"act_ratio": 0.5, "measure": "difference", "act": "silu"} | fields
    return WiseState(
        deltas=jnp.asarray(deltas, jnp.float32),
        least=jnp.asarray(least, jnp.float32),
        seeds=jnp.arange(n),
        merged=jnp.zeros(n, bool),
        memory=jnp.full(8, -1, jnp.int32),
        given=jnp.zeros((), jnp.int32),
        layers=(0,),
        **made,
    )


def test_ties_elects_signs_and_averages_those_that_agree():
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(6, 5)).astype(np.float32) * (rng.random((6, 5)) < 0.7) for _ in range(3)]
    merged = ties(deltas, 0.5)
    for i in np.ndindex(6, 5):
        votes = []
        for delta in deltas:
            larger = np.sum(np.abs(delta) > abs(delta[i]))
            votes.append(float(delta[i]) if larger < 15 else 0.0)
        sign = np.sign(sum(votes))
        agree = [v for v in votes if v and np.sign(v) == sign]
        assert merged[i] == pytest.approx(np.mean(agree) if agree else 0.0, abs=1e-6)
    assert np.array_equal(ties(deltas[:1], 1.0), deltas[0])


def test_ties_of_disjoint_shards_keeps_both():
    one, other = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    one[:2], other[2:] = 3.0, -5.0
    assert np.array_equal(ties([one, other], 1.0), one + other)
    assert np.array_equal(ties([one, other], 0.5), one + other)


def test_slerp_follows_the_arc():
    rng = np.random.default_rng(1)
    one, other = (rng.normal(size=(3, 4)) for _ in range(2))
    angle = np.arccos(np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))
    expected = (one + other) * np.sin(angle / 2) / np.sin(angle)
    np.testing.assert_allclose(slerp([one, other]), expected, rtol=1e-12)
    np.testing.assert_allclose(slerp([one, one]), one, rtol=1e-12)
    unit = [x / np.linalg.norm(x) for x in (one, other)]
    assert np.linalg.norm(slerp(unit)) == pytest.approx(1.0)


def test_full_shards_are_merged_in_turn():
    rng = np.random.default_rng(2)
    shelf = Shelf.of(state_of(np.zeros((1, 3, 2)), [np.inf]), 12)
    changes = []
    for edit in range(10):
        at = shelf.open(2, edit)
        if shelf.edits(at) == 0:
            changes.append(rng.normal(size=(3, 2)).astype(np.float32))
            shelf.deltas[at] = jnp.asarray(changes[-1])
        shelf.memory[edit], shelf.least[at] = at, min(shelf.least[at], edit)
        if shelf.edits(at) == 2:
            shelf.merge("ties", 1.0, 2, 4)
    assert shelf.memory[:10].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert shelf.merged.tolist()[:3] == [True, True, False]
    np.testing.assert_allclose(shelf.deltas[0], ties(changes[:2], 1.0))
    np.testing.assert_allclose(shelf.deltas[1], ties(changes[2:4], 1.0))
    assert shelf.least[:3].tolist() == [0, 4, 8]


@pytest.mark.parametrize("measure", ["difference", "activation"])
def test_an_input_gets_the_memory_that_moves_it_furthest(measure):
    rng = np.random.default_rng(3)
    deltas = rng.normal(size=(2, 6, 4))
    deltas[1] *= 1.3
    key, out = rng.normal(size=(5, 7, 6)) * rng.uniform(0.3, 2, (5, 1, 1)), rng.normal(size=(5, 7, 4))
    mask, ends = np.ones((5, 7), np.int32), np.asarray([4, 3, 6, 5, 4])
    mask[0, :2] = 0  # padded on the left
    context = Context.of_mask(mask).ending(ends)
    seen = Seen(jnp.zeros((5, 7, 4)), mlp_key=jnp.asarray(key, jnp.float32), mlp_out=jnp.asarray(out, jnp.float32))
    chosen = []
    for ratio in (0.2, 1.0, 2.0):
        state = state_of(deltas, [2.0, 3.5], act_ratio=ratio, measure=measure)
        (known, added), carry = jax.jit(lambda s: s.decide(seen, context, None))(state)
        for row in range(5):
            here = slice(2 if row == 0 else 0, ends[row] + 1)
            moved = [key[row, here] @ d for d in deltas]
            if measure == "activation":
                silu = [x / (1 + np.exp(-x)) for x in (out[row, here], *(out[row, here] + m for m in moved))]
                moved = [x - silu[0] for x in silu[1:]]
            far = [np.linalg.norm(m, axis=-1).mean() for m in moved]
            fires = [j for j in range(2) if far[j] > ratio * [2.0, 3.5][j]]
            best = max(fires, key=lambda j: far[j]) if fires else -1
            assert np.asarray(known[row, here]).tolist() == [best] * (ends[row] + 1 - here.start)
            assert int(carry[row]) == best
            if best >= 0:
                np.testing.assert_allclose(added[row, here], key[row, here] @ deltas[best], atol=1e-4)
        chosen.append(np.asarray(carry) >= 0)
    assert (chosen[0] >= chosen[1]).all() and (chosen[1] >= chosen[2]).all() and chosen[0].any()
    assert not chosen[2].all()


def test_only_the_chosen_entries_move_and_not_too_far(edited, llama):
    state, traces = edited
    shape = state.deltas.shape[1:]
    for at, first in ((0, 0), (1, 2)):
        entries = np.asarray(_entries(int(state.seeds[at]), shape, QUICK.share))
        delta = np.asarray(state.deltas[at])
        assert int(state.seeds[at]) == first and 0.15 < entries.mean() < 0.25
        assert not delta[~entries].any() and 0 < np.abs(delta).max() <= QUICK.limit
        assert state.least[at] == traces["distance"][[0, 1] if at == 0 else [2]].min()
    assert state.memory[:4].tolist() == [0, 0, 1, -1]
    last = [row[n - 1] for row, n in zip(traces["losses"], traces["steps"], strict=True)]
    assert (np.asarray(last) < 0.5 * traces["losses"][:, 0]).all()


def test_the_edited_model_says_the_latest_target(edited, llama):
    model, tokenizer, requests = llama
    base = target_nll(model, tokenizer, requests[2:3])[0]
    assert target_nll(with_adapters(model, edited[0]), tokenizer, requests[2:3])[0] < 0.5 * base


def test_without_memories_it_is_the_base_model(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    base, state = logits(model, rows, ends), edited[0]
    assert same_bits(base, logits(with_adapters(model, QUICK.empty(model)), rows, ends))
    assert same_bits(base, logits(with_adapters(model, state.without([0, 1, 2])), rows, ends))
    far = dataclasses.replace(state, least=state.least * 1e3)
    assert same_bits(base, logits(with_adapters(model, far), rows, ends))
    assert not same_bits(base, logits(with_adapters(model, state), rows, ends))


def test_edits_of_one_memory_go_together(edited):
    state, _ = edited
    with pytest.raises(JaxEditError, match="edits \\[1\\] are in the same memories"):
        state.without([0])
    left = state.without([2])
    assert left.memory[:3].tolist() == [0, 0, -1] and not np.asarray(left.deltas[1]).any()
    assert np.array_equal(left.deltas[0], state.deltas[0]) and np.isinf(left.least[1])


def test_going_on_fills_the_shard_and_merges(edited, llama):
    model, tokenizer, requests = llama
    state, _ = QUICK.edit(model, tokenizer, requests[3:], state=edited[0])
    assert state.memory[:4].tolist() == [0, 0, 0, 0] and state.merged.tolist() == [True, False]
    assert not np.asarray(state.deltas[1]).any() and int(state.given) == 4
    alone = np.asarray(_entries(0, state.deltas.shape[1:], QUICK.share)) & ~np.asarray(
        _entries(2, state.deltas.shape[1:], QUICK.share)
    )
    assert np.array_equal(np.asarray(state.deltas[0])[alone], np.asarray(edited[0].deltas[0])[alone])


def test_edits_one_by_one_are_those_made_together(edited, llama):
    """With the same unrelated texts, which no neighbourhood prompt is among."""
    model, tokenizer, requests = llama
    state = None
    for request in requests[:3]:
        state, _ = QUICK.edit(model, tokenizer, [dataclasses.replace(request, neighbourhood=())], state=state)
    together = edited[0]
    assert state.memory[:3].tolist() == together.memory[:3].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(state.seeds[:2], together.seeds[:2])
    for name in ("deltas", "least"):
        np.testing.assert_allclose(getattr(state, name)[:2], getattr(together, name)[:2], atol=1e-2)
    with pytest.raises(JaxEditError, match="measure="):
        dataclasses.replace(QUICK, measure="activation").edit(model, tokenizer, requests[:1], state=state)
    long = dataclasses.replace(QUICK, unrelated=("so " * 200,))
    with pytest.raises(RequestError, match="unrelated text"):
        long.edit(model, tokenizer, requests[:1])


def test_rows_are_routed_one_by_one_however_they_are_padded(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    mine = with_adapters(model, edited[0])
    together = logits(mine, rows, ends, 24)
    for out, left in zip(together, logits(mine, rows, ends, 24, left=True), strict=True):
        np.testing.assert_allclose(out, left, atol=1e-3)


def test_generation_with_a_cache_is_that_without(edited, llama):
    model, tokenizer, requests = llama
    rows, _ = prompts_of(tokenizer, requests)
    mine = with_adapters(model, edited[0])
    assert continue_rows(mine.params, mine.config, rows, 4) == greedy(mine, rows, 4)


def test_settings_that_make_no_sense_are_refused(llama):
    with pytest.raises(JaxEditError, match="multiple"):
        Wise(save_every=3, merge_every=4)
    with pytest.raises(JaxEditError, match="merge must be"):
        Wise(merge="mean")  # pyright: ignore
    with pytest.raises(JaxEditError, match="out of range"):
        Wise(layers=(6,)).empty(llama[0])
