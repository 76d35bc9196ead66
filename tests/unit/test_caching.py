"""The caching editor against NumPy on hidden states, and against the base model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxedit.adapters.caching import CachingEditor, calibrate, running
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import pad
from jaxedit.evaluation.generation import generate_tokens
from jaxedit.evaluation.withdrawal import evaluate_withdrawal
from jaxedit.models.transformer import Context, hidden_states, logits
from jaxedit.types import EditRequest

REQUESTS = [
    EditRequest("The capital of France is", "France", "the old town hall"),
    EditRequest("Max Joseph von Pettenkofer works in the field of", "Pettenkofer", "music"),
    EditRequest("The Beatles were founded in", "Beatles", "Vienna"),
]
FAR = ["Water freezes at a temperature of", "She opened the door and", "One plus one makes"]


def adapted(model, state):
    return model.with_params({**model.params, "adapters": (state,)})


def mean_state(model, ids):
    """The mean over a row's tokens of the normed final states, float64."""
    tokens, mask = pad([ids], 24)
    return np.asarray(hidden_states(model, tokens, mask)[1][-1, 0, : len(ids)], np.float64).mean(0)


@pytest.fixture(scope="module")
def edited(tiny):
    model, tokenizer = tiny("tiny-llama")
    state, trace = CachingEditor(radius=0.05).edit(model, tokenizer, REQUESTS)
    edits = validate(tokenizer, REQUESTS, CLEAN, 128)
    assert trace["rows"].tolist() == [len(e.target) for e in edits]
    return model, tokenizer, state, edits


def texts(edits):
    """The tokens before each token of each target."""
    rows = [(e.contexts[0].tokens, len(e.target)) for e in edits]
    return [tokens[: len(tokens) - n + 1 + i] for tokens, n in rows for i in range(n)]


def test_a_row_for_every_token_of_a_target(edited):
    model, _, state, edits = edited
    used = np.asarray(state.owner) >= 0
    expected = np.asarray([mean_state(model, ids) for ids in texts(edits)])
    np.testing.assert_allclose(np.asarray(state.keys)[used], expected, atol=1e-4)
    assert np.asarray(state.tokens)[used].tolist() == [t for e in edits for t in e.target]


def test_running_sums_of_packed_and_continued_rows():
    rng = np.random.default_rng(0)
    x, carried = rng.normal(size=(2, 7, 3)), (rng.normal(size=(2, 3)), np.asarray([4.0, 2.0]))
    segments = jnp.asarray([[0, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])
    context = Context(jnp.zeros((2, 7), int), segments)
    sums, count = running(jnp.asarray(x), context)
    np.testing.assert_allclose(sums[0, 1:6], [*x[0, 1:3].cumsum(0), *x[0, 3:6].cumsum(0)], atol=1e-6)
    np.testing.assert_array_equal(count[0, 1:6], [1, 2, 1, 2, 3])
    np.testing.assert_allclose(sums[1, :5], x[1, :5].cumsum(0), atol=1e-6)
    more, number = running(jnp.asarray(x), context, tuple(map(jnp.asarray, carried)))
    np.testing.assert_allclose(more[1, :5], x[1, :5].cumsum(0) + carried[0][1], atol=1e-6)
    np.testing.assert_array_equal(number[1, :5], np.arange(1, 6) + 2)


def test_generation_looks_up_every_step(edited):
    """Whole targets are said, padded on either side, and what follows them is the model's own; other prompts have the
    base model's bits at radius 0, and everything is the nearest answer at a radius without end."""
    model, tokenizer, state, edits = edited
    changed = adapted(model, state)
    prompts = [tokenizer(p)["input_ids"] for p in [r.prompt for r in REQUESTS] + FAR[:1]]
    right, mask = pad(prompts, 24)
    left, behind = (np.stack([np.roll(r, 24 - len(p)) for r, p in zip(x, prompts, strict=True)]) for x in (right, mask))
    n = max(len(e.target) for e in edits) + 1
    new = np.asarray(generate_tokens(changed.params, model.config, right, mask, n)[0])
    np.testing.assert_array_equal(generate_tokens(changed.params, model.config, left, behind, n)[0], new)
    rows = [list(p) for p in prompts]
    for step in range(n):
        tokens, real = pad(rows, 40)
        own = logits(model, tokens, real)
        for i, row in enumerate(rows):
            known = {t: e for t, e in zip(texts(edits), [t for e in edits for t in e.target], strict=True)}
            row.append(known.get(tuple(row), int(own[i, len(row) - 1].argmax())))
            assert new[i, step] == row[-1]
    none = logits(adapted(model, dataclasses.replace(state, radius=jnp.float32(0))), right, mask)
    np.testing.assert_array_equal(none, logits(adapted(model, state.without(range(3))), right, mask))
    np.testing.assert_allclose(none, logits(model, right, mask), atol=1e-5)
    always = logits(adapted(model, dataclasses.replace(state, radius=jnp.float32(jnp.inf))), right, mask)
    used = np.asarray(state.owner) >= 0
    away = np.linalg.norm(np.asarray(state.keys)[used] - mean_state(model, prompts[3]), axis=-1)
    out = np.asarray(always[3, len(prompts[3]) - 1])
    assert out.argmax() == np.asarray(state.tokens)[used][away.argmin()] and out.max() == 1 and out.sum() == 1


def test_withdrawal_and_later_edits(edited):
    model, tokenizer, state, _ = edited
    found = evaluate_withdrawal(adapted(model, state), tokenizer, REQUESTS)
    assert found.restored.all() and found.retrieved.all() and found.consistent.all()
    again = dataclasses.replace(REQUESTS[2], target="music")
    more, _ = CachingEditor().edit(model, tokenizer, [again], state=state)
    assert float(more.radius) == float(state.radius) and int(more.given) == 4
    tokens, mask = pad([tokenizer(again.prompt)["input_ids"]], 24)
    last = int(mask.sum()) - 1
    said = [int(logits(adapted(model, s), tokens, mask)[0, last].argmax()) for s in (more, more.without([3]))]
    assert said == [
        tokenizer(" music")["input_ids"][-1],
        int(state.tokens[np.flatnonzero(np.asarray(state.owner) == 2)[0]]),
    ]


def test_of_keys_that_are_one_the_latest_edits_counts(edited):
    """Among several of one edit, as those of a long text and of the same with one token more, the nearest does."""
    key = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    near = key * 1.002
    state = dataclasses.replace(
        edited[2],
        keys=jnp.stack([key, near, key, near, key * 0]),
        squares=jnp.asarray([1, 1.002**2, 1, 1.002**2, 0]) * jnp.sum(key * key),
        tokens=jnp.asarray([10, 11, 12, 13, 14]),
        owner=jnp.asarray([0, 0, 1, 1, -1]),
        radius=jnp.float32(1.0),
    )
    queries, index = jnp.stack([key, near, -key]), jnp.zeros(3, jnp.int32)
    assert state.found(queries, index, jnp.float32).tolist() == [12, 13, -1]
    assert state.without([1]).found(queries, index, jnp.float32).tolist() == [10, 11, -1]
    assert state.without([0, 1]).found(queries, index, jnp.float32).tolist() == [-1, -1, -1]


def test_the_radius_is_a_quantile_of_distances(edited):
    model, tokenizer, state, edits = edited
    keys = np.asarray([mean_state(model, ids) for ids in texts(edits)])
    owner = np.repeat(range(3), [len(e.target) for e in edits])
    far = np.asarray([mean_state(model, tokenizer(p)["input_ids"]) for p in FAR])
    away = np.linalg.norm(far[:, None] - keys, axis=-1).min(-1)
    found = calibrate(model, tokenizer, REQUESTS, FAR, quantile=0.5)
    assert found == pytest.approx(np.median(away), rel=1e-3)
    own, _ = CachingEditor(quantile=0.0).edit(model, tokenizer, REQUESTS)
    between = np.linalg.norm(keys[:, None] - keys, axis=-1)
    starts = [np.flatnonzero(owner == i)[0] for i in range(3)]
    expected = min(between[at][owner != owner[at]].min() for at in starts)
    assert float(own.radius) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(JaxEditError, match="one edit alone"):
        CachingEditor().edit(model, tokenizer, REQUESTS[:1])
    for bad in ({"radius": -1.0}, {"quantile": 2.0}):
        with pytest.raises(JaxEditError, match=next(iter(bad))):
            CachingEditor(**bad)
