"""MELO: its index against one written in NumPy, and what its blocks do to a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import greedy, logits, prompts_of, same_bits, target_nll, with_adapters

from jaxedit.adapters.melo import Melo
from jaxedit.adapters.melo_index import GAP, Index
from jaxedit.adapters.rows import owners
from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.models.sites import Seen
from jaxedit.models.transformer import Context

ROUNDING = 1e-3
QUICK = Melo(index=2, layers=(3, 5), radius=1e-3, batch=2, steps=20, lr=0.02)


@pytest.fixture(scope="module")
def llama(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, read_requests(goldens / "tiny-llama" / "facts.json")[:5]


@pytest.fixture(scope="module")
def edited(llama):
    return QUICK.edit(*llama)


def index_of(n: int, d: int) -> Index:
    free = np.full(n, -1, np.int32)
    return Index(
        centres=np.zeros((n, d), np.float32),
        radii=np.zeros(n, np.float32),
        labels=np.full((n, 1), -1, np.int32),
        live=np.zeros(n, bool),
        points=np.zeros((n, d), np.float32),
        cluster=free.copy(),
        block=free.copy(),
        owner=free.copy(),
        given=0,
    )


def insert(index: Index, queries, labels, radius, block) -> list[str]:
    queries, labels = np.asarray(queries, np.float32), np.asarray(labels, np.int32)[:, None]
    return index.insert_batch(queries, labels, radius, block, ROUNDING)


def oracle(batches, radius):
    """Clusters as [centre, radius, label, [(point, block)]], in float64."""
    clusters: list[list] = []
    for t, (queries, labels) in enumerate(batches):
        apart = [[np.linalg.norm(q - c[0]) for c in clusters] for q in queries]
        radii = None
        for q, y, near in zip(queries, labels, apart, strict=True):
            i = int(np.argmin(near)) if near else -1
            radii = [c[1] for c in clusters]
            if i < 0 or near[i] > radii[i] + radius:
                clusters.append([q, radius, y, [(q, t)]])
            elif clusters[i][2] == y:
                held = [*clusters[i][3], (q, t)]
                centre = np.mean([p for p, _ in held], 0)
                widest = max(np.linalg.norm(p - centre) for p, _ in held)
                clusters[i] = [centre, max(radius, widest + ROUNDING * np.linalg.norm(q)), y, held]
            else:
                centre, _, label, held = clusters[i]
                inner = near[i] / 2 - 1e-5
                kept = [(p, b) for p, b in held if np.linalg.norm(p - centre) <= inner]
                clusters[i] = [centre, inner, label, kept or [(centre, -1)]]
                clusters.append([q, near[i] / 2 + 1e-5, y, [(q, t)]])
    return clusters


def test_index_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(4, 2)), rng.integers(0, 3, 4)) for _ in range(12)]
    index, cases = index_of(64, 2), []
    for t, (queries, labels) in enumerate(batches):
        cases += insert(index, queries, labels, 0.3, t)
    assert set(cases) == {"new", "split", "joined"}
    expected = oracle(batches, 0.3)
    assert index.live.sum() == len(expected)
    for at, (centre, radius, label, held) in enumerate(expected):
        np.testing.assert_allclose(index.centres[at], centre, atol=1e-5)
        assert index.radii[at] == pytest.approx(radius, abs=1e-5) and index.labels[at, 0] == label
        rows = np.flatnonzero(index.cluster == at)
        mine = sorted((*index.points[r].round(4).tolist(), int(index.block[r])) for r in rows)
        theirs = sorted((*np.float32(p).round(4).tolist(), b) for p, b in held)
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_a_split_leaves_a_point_without_a_block():
    index = index_of(8, 1)
    assert insert(index, [[0.0], [0.2]], [1, 1], 1.0, 0) == ["new", "new"]  # of one batch: not compared
    assert insert(index, [[0.4]], [2], 1.0, 1) == ["split"]
    assert index.radii[:3] == pytest.approx([1.0, 0.1 - GAP, 0.1 + GAP], abs=1e-6)
    far = index_of(8, 1)
    insert(far, [[0.0]], [1], 1.0, 0)
    insert(far, [[1.0]], [1], 1.0, 1)  # the centre moves to 0.5
    assert insert(far, [[0.9]], [2], 1.0, 2) == ["split"]
    assert far.block[far.cluster == 0].tolist() == [-1] and far.points[0].tolist() == [0.5]
    assert insert(far, [[0.9]], [3], 1.0, 3) == ["overwritten"]
    assert far.free_block() == 0


def test_edits_are_learnt(edited, llama):
    model, tokenizer, requests = llama
    state, traces = edited
    assert traces["case"].tolist() == [0] * 5 and traces["block"].tolist() == [0, 0, 1, 1, 2]
    found = target_nll(with_adapters(model, state), tokenizer, requests)
    base = target_nll(model, tokenizer, requests)
    np.testing.assert_allclose(traces["losses"][[0, 2, 4], 0], [base[:2].mean(), base[2:4].mean(), base[4]], atol=1e-3)
    assert found.mean() < 0.5 * base.mean()
    np.testing.assert_allclose(
        [found[:2].mean(), found[2:4].mean(), found[4]], traces["losses"][[0, 2, 4], -1], atol=0.3
    )


def test_blocks_trained_at_once_are_those_trained_alone(edited, llama):
    model, tokenizer, requests = llama
    state = None
    for at in (0, 2, 4):
        state, _ = QUICK.edit(model, tokenizer, requests[at : at + 2], state=state)
    for name in ("a", "b", "centres", "points"):
        np.testing.assert_allclose(getattr(state, name)[:3], getattr(edited[0], name)[:3], atol=2e-3)
    assert state.block[:5].tolist() == edited[0].block[:5].tolist() == [0, 0, 1, 1, 2]


def test_without_clusters_or_with_empty_blocks_it_is_the_base_model(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    base = logits(model, rows, ends)
    state = edited[0]
    assert same_bits(base, logits(with_adapters(model, QUICK.empty(model)), rows, ends))
    assert same_bits(base, logits(with_adapters(model, dataclasses.replace(state, b=state.b * 0)), rows, ends))
    elsewhere, at = [tokenizer("Water boils at a hundred degrees")["input_ids"]], [3]
    assert same_bits(logits(model, elsewhere, at), logits(with_adapters(model, state), elsewhere, at))


def test_a_withdrawn_edit_leaves_the_base_model_on_its_prompt(edited, llama):
    model, tokenizer, requests = llama
    state, _ = edited
    rows, ends = prompts_of(tokenizer, requests)
    base, all_in, out = (
        logits(m, rows, ends) for m in (model, with_adapters(model, state), with_adapters(model, state.without([1])))
    )
    assert np.array_equal(base[1], out[1]) and not np.array_equal(base[1], all_in[1])
    assert same_bits([x for i, x in enumerate(all_in) if i != 1], [x for i, x in enumerate(out) if i != 1])
    with pytest.raises(JaxEditError, match="edits \\[9\\] are not held"):
        state.without([9])


def test_a_point_withdrawn_from_a_cluster_asks_for_no_block():
    index = index_of(8, 1)
    insert(index, [[0.0]], [1], 1.0, 0)
    insert(index, [[0.5]], [1], 1.0, 1)
    index.withdraw(1)
    assert index.block[:2].tolist() == [0, -1] and index.live[0]
    index.withdraw(0)
    assert not index.live.any() and (index.cluster < 0).all()


def test_an_edit_made_again_takes_its_points_place():
    """Also where there is one without a block: the nearest of two in one place would be the earlier."""
    index = index_of(8, 1)
    insert(index, [[1.0]], [1], 1.0, 0)
    insert(index, [[1.5]], [1], 1.0, 1)
    index.withdraw(0)
    assert insert(index, [[1.0]], [1], 1.0, 2) == ["joined"]
    assert insert(index, [[1.5]], [1], 1.0, 3) == ["joined"]
    rows = index.cluster == 0
    assert sorted(zip(index.points[rows, 0].tolist(), index.block[rows].tolist(), strict=True)) == [(1.0, 2), (1.5, 3)]
    assert owners(index.owner).tolist() == [2, 3]


def test_rows_of_a_mixed_batch_use_their_own_blocks(edited, llama):
    model, tokenizer, requests = llama
    rows, ends = prompts_of(tokenizer, requests)
    mine = with_adapters(model, edited[0])
    together = logits(mine, rows, ends, 24)
    for out, left in zip(together, logits(mine, rows, ends, 24, left=True), strict=True):
        np.testing.assert_allclose(out, left, atol=1e-3)
    alone = logits(mine, rows[3:4], ends[3:4], 24)[0]
    np.testing.assert_allclose(together[3], alone, atol=1e-3)


def test_tokens_of_one_row_may_use_different_blocks(edited):
    state, rng = edited[0], np.random.default_rng(0)
    d_ff, d_model = state.a.shape[2], state.b.shape[3]
    key, out = (jnp.asarray(rng.normal(size=(2, 3, d)), jnp.float32) for d in (d_ff, d_model))
    decision = np.asarray([[0, -1, 2], [1, 1, 1]])
    seen = Seen(out, mlp_key=key, mlp_out=out)
    context = Context.of_mask(np.ones((2, 3), np.int32))
    found = np.asarray(jax.jit(lambda x: state.change(5, seen, context, x))(jnp.asarray(decision)))
    for i in range(2):
        for j in range(3):
            at, expected = decision[i, j], np.asarray(out[i, j], np.float64)
            if at >= 0:
                a, b = (np.asarray(x[at, 1], np.float64) for x in (state.a, state.b))
                expected = expected + QUICK.alpha / QUICK.rank * (np.asarray(key[i, j], np.float64) @ a @ b)
            np.testing.assert_allclose(found[i, j], expected, atol=1e-4)


def test_generation_with_a_cache_is_that_without(edited, llama):
    model, tokenizer, requests = llama
    rows, _ = prompts_of(tokenizer, requests)
    mine = with_adapters(model, edited[0])
    assert continue_rows(mine.params, mine.config, rows[:3], 4) == greedy(mine, rows[:3], 4)


def test_settings_that_make_no_sense_are_refused(llama):
    with pytest.raises(JaxEditError, match="rank"):
        Melo(rank=0)
    with pytest.raises(JaxEditError, match="below"):
        Melo(index=4, layers=(4,)).empty(llama[0])
    with pytest.raises(JaxEditError, match="to go on from has layers="):
        Melo(index=2, layers=(4,)).edit(*llama[:2], llama[2][:1], state=QUICK.empty(llama[0]))
