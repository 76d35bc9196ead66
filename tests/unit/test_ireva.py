"""iReVa against NumPy and against training one neuron after another, and what withdrawing its edits leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxedit.adapters.ireva import IReVa
from jaxedit.adapters.ireva_retrofit import out_of_scope
from jaxedit.adapters.ireva_values import rows_of, solved_values
from jaxedit.adapters.rows import where_wanted
from jaxedit.adapters.training import mlp_entry
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import pad
from jaxedit.evaluation.comparison import Comparison
from jaxedit.evaluation.generation import generate_tokens
from jaxedit.evaluation.withdrawal import _final_states, edit_scores, evaluate_withdrawal
from jaxedit.models.transformer import (
    Context,
    after_mlp,
    embed,
    key_of_input,
    layer,
    logits,
    mlp_output,
    run,
    unembed,
)
from jaxedit.types import EditRequest

REQUESTS = [
    EditRequest("The capital of France is", "France", "the old town hall", paraphrases=("France has its capital in",)),
    EditRequest("Max Joseph von Pettenkofer works in the field of", "Pettenkofer", "music"),
    EditRequest("The mother tongue of Danielle Darrieux is", "Darrieux", "English and Welsh"),
    EditRequest("The Beatles were founded in", "Beatles", "Vienna"),
]
NEAR = "Water freezes at a temperature of"
SETTINGS = IReVa(alpha=4.0)
LENGTH = 24


def adapted(model, state):
    return model.with_params({**model.params, "adapters": (state,)})


@pytest.fixture(scope="module")
def edited(tiny):
    """``(model, tokenizer, neurons, tokens of the edits)``, without retrofitting."""
    model, tokenizer = tiny("tiny-gpt2")
    state, trace = SETTINGS.edit(model, tokenizer, REQUESTS)
    edits = validate(tokenizer, REQUESTS, CLEAN, 128)
    assert trace["rows"].tolist() == [len(e.target) for e in edits]
    assert max(trace["rows"]) > 2
    return model, tokenizer, state, edits


def entries(model, edit):
    """What the MLP of layer 4 reads at the places where the target's tokens are predicted, one pass a prefix."""
    tokens, n = edit.contexts[0].tokens, len(edit.target)
    found = []
    for i in range(n):
        row = tokens[: len(tokens) - n + 1 + i]
        padded, mask = pad([row], 32)
        found.append(
            np.asarray(mlp_entry(model.params, model.config, padded, Context.of_mask(mask), 4)[0][0])[len(row) - 1]
        )
    return np.asarray(found, np.float64)


def standard(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-8)


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def test_neurons_are_the_prompts_keys_and_the_targets_rows(edited):
    model, _, state, edits = edited
    used = np.flatnonzero(np.asarray(state.owner) >= 0)
    counts = [len(e.target) for e in edits]
    np.testing.assert_array_equal(state.owner[used], np.repeat(range(4), counts))
    assert state.layers == (4,) and int(state.given) == 4
    x = np.concatenate([entries(model, e) for e in edits])
    np.testing.assert_allclose(state.keys[used], standard(x), atol=1e-3)
    np.testing.assert_allclose((np.asarray(state.keys[used], np.float64) ** 2).sum(-1), 63, rtol=1e-5)
    np.testing.assert_allclose(state.biases[used], 0.75 * 63, rtol=1e-5)
    rows = model.params["embed"]["tokens"] if model.config.tied else model.params["unembed"]["w"]
    np.testing.assert_array_equal(state.values[used], rows[np.concatenate([e.target for e in edits])])
    own = np.diag(np.asarray(state.potentials(jnp.asarray(x)))[:, used])
    np.testing.assert_allclose(own, 0.25 * 63, rtol=1e-3)


@pytest.mark.parametrize(
    ("pool", "gate"), [("max", "activation"), ("sum", "activation"), ("max", "hard"), ("sum", "hard")]
)
def test_what_neurons_add(edited, pool, gate):
    """Against float64 NumPy, at inputs near and far; exactly nothing far away. In pieces it is the same."""
    state = dataclasses.replace(edited[2], pool=pool, gate=gate)
    used = np.asarray(state.owner) >= 0
    k, v, b = (np.asarray(x, np.float64)[used] for x in (state.keys, state.values, state.biases))
    rng = np.random.default_rng(0)
    mixed = np.asarray([0.0, 0.3, 0.6, 0.9, 1.2, 3])[:, None, None] * rng.normal(size=(6, *k.shape)) + k
    x = (mixed.reshape(-1, 64) * 3 + 1).astype(np.float32)
    z = standard(x.astype(np.float64)) @ k.T - b
    a = np.where((gate == "hard") & (z <= 0), 0, gelu(z))
    if pool == "sum":
        expected = 4.0 * a @ v
    else:
        best = a.argmax(-1)
        expected = 4.0 * a[np.arange(len(x)), best][:, None] * v[best]
    index = jnp.arange(len(x))
    found = np.asarray(jax.jit(lambda s, x: s.added(x, index))(state, x))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=5e-3)
    far = (z <= -7.5).all(-1)  # where tanh is -1 in float32
    assert far.any() and (z > 0).any() and (found[far] == 0).all()
    wanted = jnp.asarray(rng.random((3, len(x) // 3)) < 0.3)
    folded = jnp.asarray(x[: wanted.size]).reshape(3, -1, 64)
    some = jax.jit(lambda s, x: where_wanted(s.added, x, wanted, 16, most=7))(state, folded)
    np.testing.assert_allclose(some[wanted], found[: wanted.size].reshape(3, -1, 64)[wanted], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_solved_values(tiny, name):
    """Against float64 NumPy on the rows as the final norm lets them be read. More tokens than by their own rows are
    raised most."""
    model, _ = tiny(name)
    config, scale = model.config, np.asarray(model.params["final_norm"]["scale"], np.float64)
    table = np.asarray((model.params["embed"]["tokens"] if config.tied else model.params["unembed"]["w"]), np.float64)
    ids = np.asarray([3, 40, 7])
    found = np.asarray(solved_values(model.params, config, ids))
    read = table * scale
    read = read - read.mean(-1, keepdims=True) if config.norm == "layer" else read
    moments = read.T @ read / len(read)
    wanted = np.linalg.solve(moments + 1e-4 * np.trace(moments) / len(moments) * np.eye(len(moments)), read[ids].T).T
    wanted *= np.sqrt(np.mean(np.sum(table**2, -1))) / np.linalg.norm(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3)
    every = np.arange(len(read))
    every_one, own = (np.asarray(f(model.params, config, every)) @ read.T for f in (solved_values, rows_of))
    assert (every_one.argmax(-1) == every).mean() > (own.argmax(-1) == every).mean()
    state, _ = IReVa(values="solved").edit(model, tiny(name)[1], REQUESTS)
    first = validate(tiny(name)[1], REQUESTS, CLEAN, 128)[0].target[0]
    np.testing.assert_allclose(state.values[0], solved_values(model.params, config, np.asarray([first]))[0], rtol=1e-4)


def test_edits_are_said_and_nothing_else_changes(edited):
    """Generation with a cache says what passes over whole texts do; earlier tokens of prompts are as before."""
    model, tokenizer, state, edits = edited
    state = dataclasses.replace(state, alpha=0.4)
    changed = adapted(model, state)
    prompts = [tokenizer(r.prompt)["input_ids"] for r in REQUESTS] + [tokenizer(NEAR)["input_ids"]]
    right, mask = pad(prompts, LENGTH)
    left = np.stack([np.roll(row, LENGTH - len(p)) for row, p in zip(right, prompts, strict=True)])
    n = max(len(e.target) for e in edits)
    new = np.asarray(generate_tokens(changed.params, model.config, right, mask, n)[0])
    behind = np.stack([np.roll(row, LENGTH - len(p)) for row, p in zip(mask, prompts, strict=True)])
    np.testing.assert_array_equal(generate_tokens(changed.params, model.config, left, behind, n)[0], new)
    said = sum(tuple(row[: len(e.target)]) == e.target for row, e in zip(new, edits, strict=False))
    assert said >= 1
    whole, real = pad([p + row.tolist()[:-1] for p, row in zip(prompts, new, strict=True)], 40)
    ends = np.asarray([len(p) - 1 for p in prompts])

    def full(params, tokens, mask):
        context = Context.of_mask(mask).ending(ends)
        h = run(params, model.config, embed(params, model.config, tokens, context), context, 0, model.config.n_layer)
        return unembed(params, model.config, h)

    out = np.asarray(jax.jit(full)(changed.params, whole, real))
    base = np.asarray(logits(model, whole, real))
    for i, p in enumerate(prompts):
        np.testing.assert_array_equal(out[i, len(p) - 1 : len(p) - 1 + n].argmax(-1), new[i])
        np.testing.assert_allclose(out[i, : len(p) - 1], base[i, : len(p) - 1], atol=1e-5)
    assert np.abs(out[0] - base[0]).max() > 1
    only = dataclasses.replace(state, positions="last")
    short = np.asarray(generate_tokens(adapted(model, only).params, model.config, right, mask, n)[0])
    np.testing.assert_array_equal(short[:, 0], new[:, 0])
    assert (short != new).any()


def test_what_does_not_fire_leaves_every_bit(edited):
    """The same program with all edits withdrawn, with a weight of zero, and with keys that nothing reaches."""
    model, tokenizer, state, _ = edited
    rows = [tokenizer(r.prompt)["input_ids"] for r in REQUESTS]
    tokens, mask = pad(rows, LENGTH)
    none = logits(adapted(model, state.without(range(4))), tokens, mask)
    np.testing.assert_array_equal(
        logits(adapted(model, dataclasses.replace(state, biases=state.biases * 2)), tokens, mask), none
    )
    np.testing.assert_array_equal(logits(adapted(model, dataclasses.replace(state, alpha=0.0)), tokens, mask), none)
    np.testing.assert_allclose(none, logits(model, tokens, mask), atol=1e-5)
    before = _final_states._cache_size()
    evaluate_withdrawal(adapted(model, state), tokenizer, REQUESTS)
    evaluate_withdrawal(adapted(model, state.without([0])), tokenizer, REQUESTS)
    assert _final_states._cache_size() == before + 1


def test_withdrawing_each_row_is_withdrawing_one_at_a_time(edited):
    """Of prompts that are alike, one's neurons answer the other when that is withdrawn, unless it is masked."""
    model, tokenizer, _, _ = edited
    alike = [*REQUESTS, EditRequest("The capital of France is not", "France", "music")]
    alike += [EditRequest("So the capital of France is not", "France", "Vienna")]
    state, _ = SETTINGS.edit(model, tokenizer, alike)
    changed = adapted(model, state)
    together = evaluate_withdrawal(changed, tokenizer, alike)
    apart = evaluate_withdrawal(changed, tokenizer, alike, withdraw=lambda held, gone: held.without(gone))
    for name in ("changed", "retrieved", "consistent", "restored"):
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name))
    np.testing.assert_allclose(together.difference, apart.difference, atol=1e-4)
    assert together.changed.all() and together.restored[1] and not together.restored.all()
    masked = evaluate_withdrawal(changed, tokenizer, alike, withdraw=lambda held, gone: held.without(gone, "mask"))
    assert masked.restored.all() and masked.consistent.all() and masked.retrieved.all()
    assert together.summary()["consistency"] == together.consistent.mean()
    with pytest.raises(JaxEditError, match="are not held"):
        state.without([0]).without([0])


def test_edits_in_two_calls(edited):
    """The same as all at once. A later edit of a prompt wins; without it the earlier one is back."""
    model, tokenizer, state, edits = edited
    first, _ = SETTINGS.edit(model, tokenizer, REQUESTS[:1])
    both, _ = SETTINGS.edit(model, tokenizer, REQUESTS[1:], state=first)
    for name in ("keys", "values", "biases", "owner"):
        np.testing.assert_allclose(getattr(both, name), getattr(state, name), atol=1e-5)
    again = dataclasses.replace(REQUESTS[3], target="music")
    more, _ = SETTINGS.edit(model, tokenizer, [again], state=state)
    assert len(more.owner) == len(state.owner) and int(more.given) == 5
    x, index = jnp.asarray(entries(model, edits[3])[:1], jnp.float32), jnp.zeros(1, jnp.int32)
    row = np.flatnonzero(np.asarray(more.owner) == 4)[0]
    np.testing.assert_allclose(more.added(x, index)[0], 4.0 * gelu(0.25 * 63) * more.values[row], rtol=1e-3)
    np.testing.assert_allclose(more.without([4]).added(x, index), state.added(x, index), rtol=1e-5)
    assert not np.allclose(more.added(x, index), state.added(x, index), atol=0.1)
    moved, _ = SETTINGS.edit(model, tokenizer, REQUESTS[:3], state=more.without([0, 1, 2, 3]))
    assert np.asarray(moved.owner)[np.asarray(moved.owner) >= 0].tolist()[0] == 4
    with pytest.raises(JaxEditError, match="theta"):
        IReVa(alpha=4.0, theta=0.5).edit(model, tokenizer, REQUESTS[:1], state=state)


def test_a_later_edit_wins_over_keys_that_differ_by_rounding(edited):
    """Passes of different shapes leave states of a bfloat16 model 3 % apart."""
    model, tokenizer, state, edits = edited
    more, _ = SETTINGS.edit(model, tokenizer, [dataclasses.replace(REQUESTS[3], target="music")], state=state)
    row = np.flatnonzero(np.asarray(more.owner) == 4)[0]
    noise = np.random.default_rng(0).normal(size=64)
    off = standard(np.asarray(more.keys[row]) + 0.03 * np.sqrt(63) * noise / np.linalg.norm(noise))
    more = dataclasses.replace(more, keys=more.keys.at[row].set(off))
    x = jnp.asarray(entries(model, edits[3])[:1], jnp.bfloat16)
    found = np.asarray(more.added(x, jnp.zeros(1, jnp.int32))[0])
    assert np.abs(found / np.asarray(more.values[row]) - 4.0 * gelu(0.25 * 63)).max() < 0.5


def test_scores():
    base = {"efficacy": 0.2, "paraphrase": 0.25, "neighbourhood": 0.25}
    edited = {"efficacy": 1.0, "paraphrase": 1.0, "neighbourhood": 0.5}
    before, after = edit_scores(Comparison((), base, edited, {}))
    assert before == pytest.approx({"es": 0.2, "ps": 0.25, "ns": 0.25, "score": 3 / 13, "capped": 3 / 13})
    assert after == pytest.approx({"es": 1, "ps": 1, "ns": 0.5, "score": 3 / 4, "capped": 3 / 6})


def one_after_another(model, settings, edits, scope):
    """The published loop in float64: passes over the whole prompt, one neuron at a time, AdamW by hand."""
    params, config = model.params, model.config
    table = np.asarray(params["embed"]["tokens"] if config.tied else params["unembed"]["w"])
    firsts = [standard(entries(model, e))[0] for e in edits]
    keys, values, biases = [], [], []
    act = jax.nn.silu if config.act == "silu" else lambda z: jax.nn.gelu(z, approximate=True)

    @jax.jit
    def loss(own, start, bias, frozen, row, last, answer, away):
        context = Context.of_mask(jnp.arange(row.shape[1])[None] <= last)
        x, stream = mlp_entry(params, config, row, context, 4)
        p = layer(params, 4)
        s = x[0, last]
        s = (s - s.mean()) / jnp.sqrt(jnp.var(s, ddof=1) + 1e-8)
        k, v, b = frozen
        add = act(k @ s - b) @ v + act(own[0] @ s - bias) * own[1]
        out = mlp_output(p, key_of_input(p, config, x)).at[0, last].add(settings.alpha * add)
        h = run(params, config, after_mlp(p, config, stream, out), context, 5, config.n_layer)
        nll = -jax.nn.log_softmax(unembed(params, config, h)[0, last])[answer]
        rec = settings.rec_weight * (start @ (own[0] - start)) ** 2
        reached = away @ own[0] - bias
        irr = settings.irr_weight * jnp.where(reached > 0, reached, 0).sum() / (away != 0).any(-1).sum()
        return nll + rec + irr, jnp.stack([nll, rec, irr])

    for i, edit in enumerate(edits):
        texts = []
        for row in scope.texts[i]:
            padded, mask = pad([row], LENGTH)
            x = mlp_entry(params, config, padded, Context.of_mask(mask), 4)[0]
            texts.append(standard(np.asarray(x[0, : len(row)])))
        away = np.concatenate([*texts, [firsts[j] for j in scope.others[i]]])
        away = np.pad(away, [(0, 128 - len(away)), (0, 0)])
        tokens, n = edit.contexts[0].tokens, len(edit.target)
        starts = standard(entries(model, edit))
        for j in range(n):
            row, last = pad([tokens], 32)[0], len(tokens) - n + j
            own = np.stack([starts[j], table[edit.target[j]]])
            bias = settings.theta * (starts[j] ** 2).sum()
            m, u = np.zeros_like(own), np.zeros_like(own)
            spare = 24 - len(keys)
            frozen = [
                np.pad(np.asarray(x).reshape(len(keys), *w), [(0, spare)] + [(0, 0)] * len(w))
                for x, w in ((keys, (64,)), (values, (64,)), (biases, ()))
            ]
            for t in range(1, settings.steps + 1):
                grad, _ = jax.grad(loss, has_aux=True)(
                    jnp.asarray(own), starts[j], bias, tuple(map(jnp.asarray, frozen)), row, last, edit.target[j], away
                )
                grad = np.asarray(grad)
                own = own * (1 - settings.lr * settings.weight_decay)
                m, u = 0.9 * m + 0.1 * grad, 0.99 * u + 0.01 * grad**2
                own = own - settings.lr * (m / (1 - 0.9**t)) / (np.sqrt(u / (1 - 0.99**t)) + 1e-8)
            keys.append(own[0])
            values.append(own[1])
            biases.append(bias)
    return np.asarray(keys), np.asarray(values)


@pytest.mark.parametrize("theta", [0.75, 0.2])
def test_training_together_is_training_one_after_another(tiny, theta):
    """In float64. Neurons fire at each other's prompts in this model, and are trained until that is consistent."""
    settings = IReVa(alpha=0.3, theta=theta, retrofit=True, rec_weight=1e-2, irr_weight=1e-2, steps=3, together=3)
    with jax.enable_x64(True):
        model, tokenizer = tiny("tiny-gpt2")
        model = model.with_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params))
        edits = validate(tokenizer, REQUESTS, CLEAN, 128)
        state, trace = settings.edit(model, tokenizer, REQUESTS, seed=3)
        used = np.asarray(state.owner) >= 0
        keys, values = one_after_another(model, settings, edits, out_of_scope(model, tokenizer, REQUESTS, 3))
        np.testing.assert_allclose(np.asarray(state.keys)[used], keys, atol=1e-6)
        np.testing.assert_allclose(np.asarray(state.values)[used], values, atol=1e-6)
        assert trace["losses"].shape == (4, 3, 3) and (trace["losses"][:, 0, 1] == 0).all()
        assert trace["losses"][:, 2, 0].sum() < trace["losses"][:, 0, 0].sum()
        assert trace["crosstalk"].max() > 0.01


def test_bad_settings(edited):
    model, tokenizer, state, _ = edited
    for bad in ({"theta": 1.0}, {"layers": (1, 2)}, {"pool": "mean"}, {"alpha": -1.0}, {"steps": 0}, {"betas": (1, 0)}):
        with pytest.raises(JaxEditError, match=next(iter(bad))):
            IReVa(**bad)
    with pytest.raises(JaxEditError, match="layer 9"):
        IReVa(layers=(9,)).edit(model, tokenizer, REQUESTS)
    with pytest.raises(JaxEditError, match="without adapters"):
        SETTINGS.edit(adapted(model, state), tokenizer, REQUESTS)
