"""Adapters at their sites: against biases that do the same, and cached passes against passes over the whole text."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxedit.evaluation.batching import pad
from jaxedit.evaluation.generation import generate_tokens
from jaxedit.evaluation.predictions import likeliest
from jaxedit.evaluation.scoring import score
from jaxedit.evaluation.specificity import last_hidden
from jaxedit.models.sites import Adapter, Site, answering, at_prompt_end, take_digits, with_digits
from jaxedit.models.transformer import Context, embed, hidden_states, logits, run, unembed

LENGTH = 24
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12], [900]]


def register(cls, *static):
    fields = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, [f for f in fields if f not in static], list(static))


@dataclasses.dataclass(frozen=True)
class Constant:
    """Adds a vector everywhere."""

    vector: Any
    layers: tuple[int, ...]
    site: Site
    asks: int | None = None
    asks_at: Site | None = None

    def decide(self, seen, context, carried):
        raise AssertionError("nothing is decided")

    def change(self, layer, seen, context, decision):
        return getattr(seen, self.site) + self.vector


@dataclasses.dataclass(frozen=True)
class Gated:
    """Adds a vector, as much of it as a probe reads at the prompt's last token, from that token on."""

    probe: Any
    vector: Any
    layers: tuple[int, ...]
    site: Site
    asks: int | None
    asks_at: Site | None

    def decide(self, seen, context, carried):
        return at_prompt_end(jnp.tanh(getattr(seen, self.asks_at) @ self.probe), context, carried)

    def change(self, layer, seen, context, decision):
        add = decision[..., None] * self.vector
        return getattr(seen, self.site) + jnp.where(answering(context)[..., None], add, 0)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Predicts one token where the sine of a probe of the final state, summed over all tokens so far, is positive."""

    probe: Any
    token: Any
    layers: tuple[int, ...]
    site: Site = "logits"
    asks: int | None = None
    asks_at: Site | None = "logits"

    def decide(self, seen, context, carried):
        real = context.segments > 0
        sums = jnp.cumsum(jnp.where(real, seen.logits @ self.probe, 0), 1)
        sums = sums if carried is None else sums + carried[:, None]
        return sums, sums[:, -1]

    def change(self, layer, seen, context, decision):
        return jnp.where((jnp.sin(decision) > 0) & answering(context), self.token, -1)


STATIC = ("layers", "site", "asks", "asks_at")
for cls in (Constant, Gated, Speaker):
    register(cls, *STATIC)


def adapted(model, *adapters):
    return model.with_params({**model.params, "adapters": adapters})


def several(model, speak=True, seed=0):
    """The model with an adapter at every site, two of them in one layer, one asked below where it acts."""
    c, rng = model.config, np.random.default_rng(seed)

    def some(n, scale):
        return jnp.asarray(rng.normal(size=n) * scale, jnp.float32)

    made = [
        Gated(some(c.d_model, 0.3), some(c.d_model, 0.5), (2,), "mlp_in", 1, "mlp_in"),
        Gated(some(c.d_ff, 1), some(c.d_ff, 0.5), (2, 4), "mlp_key", 2, "mlp_key"),
        Gated(some(c.d_model, 0.3), some(c.d_model, 0.5), (3,), "mlp_out", 3, "mlp_in"),
        Gated(some(c.d_model, 0.3), some(c.d_model, 2), (3,), "block_out", 3, "block_out"),
    ]
    if speak:
        made.append(Speaker(some(c.d_model, 0.3), jnp.int32(77), (c.n_layer - 1,), asks=c.n_layer - 1))
    assert all(isinstance(a, Adapter) for a in made)
    return adapted(model, *made)


def full(model, rows, ends, length=LENGTH):
    """Logits ``[b, length, vocab]`` of whole texts whose prompts end at `ends`."""
    tokens, mask = pad(rows, length)
    return np.asarray(_full(model.params, model.config, tokens, Context.of_mask(mask).ending(np.asarray(ends))))


def _full_logits(params, config, tokens, context):
    h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    return unembed(params, config, h)


_full = jax.jit(_full_logits, static_argnums=1)


@pytest.mark.parametrize("site", ["mlp_in", "mlp_key", "mlp_out", "block_out"])
def test_a_constant_is_a_bias(decoder, site):
    """In a GPT-2 block a constant at any site is a change of a bias in that layer."""
    model, rng = decoder("tiny-gpt2"), np.random.default_rng(1)
    blocks = model.params["blocks"]
    at = jnp.zeros(model.config.n_layer).at[3].set(1)[:, None]
    vector = jnp.asarray(rng.normal(size=model.config.d_ff if site == "mlp_key" else model.config.d_model), jnp.float32)
    if site == "mlp_in":
        changed = {"mlp_norm": blocks["mlp_norm"] | {"bias": blocks["mlp_norm"]["bias"] + at * vector}}
    else:
        add = vector @ blocks["down"]["w"][3] if site == "mlp_key" else vector
        changed = {"down": blocks["down"] | {"b": blocks["down"]["b"] + at * add}}
    biased = model.with_params(model.params | {"blocks": blocks | changed})
    tokens = np.arange(1, 13).reshape(2, 6)
    found = logits(adapted(model, Constant(vector, (3,), site)), tokens)
    np.testing.assert_allclose(found, logits(biased, tokens), atol=2e-4)
    assert np.abs(found - logits(model, tokens)).max() > 0.1


def test_a_model_without_adapters_runs_as_before(decoder):
    """One scan over the layers, and the same program whether the tuple is empty or absent."""
    model = decoder("tiny-llama")
    tokens, mask = pad(ROWS, 8)
    context = Context.of_mask(mask)
    h = embed(model.params, model.config, tokens, context)

    def program(params, h, context):
        return run(params, model.config, h, context, 0, model.config.n_layer)

    plain = jax.make_jaxpr(program)(model.params, h, context)
    assert [e.primitive.name for e in plain.jaxpr.eqns].count("scan") == 1
    empty = adapted(model).params
    assert str(jax.make_jaxpr(program)(empty, h, context)) == str(plain)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gptj"])
def test_generation_with_a_cache_is_without(decoder, name):
    """Rows of different lengths, padded on either side."""
    model, n = several(decoder(name)), 6
    ends = [len(row) - 1 for row in ROWS]
    slow = [list(row) for row in ROWS]
    for _ in range(n):
        out = full(model, slow, ends)
        for i, row in enumerate(slow):
            row.append(int(out[i, len(row) - 1].argmax()))
    slow = [row[-n:] for row in slow]
    right, left = np.zeros((2, len(ROWS), 8), np.int32)
    for i, row in enumerate(ROWS):
        right[i, : len(row)] = left[i, 8 - len(row) :] = row
    for tokens in (right, left):
        new = generate_tokens(model.params, model.config, tokens, tokens > 0, n)[0]
        np.testing.assert_array_equal(new, slow)
    speaks = sum(row.count(77) for row in slow)
    assert 0 < speaks < n * len(ROWS)
    plain = generate_tokens(decoder(name).params, model.config, right, right > 0, n)[0]
    assert (np.asarray(plain) != slow).any()


def test_metrics_are_those_of_whole_texts(decoder):
    """`score`, `likeliest` and `last_hidden` run prompts and answers in pieces, or merge rows."""
    model = several(decoder("tiny-llama"))
    answers = [[30, 31, 32], [33], [34, 35], [36, 37], [38], [39, 40, 41]]
    tokens, mask = pad(ROWS, 8)
    targets, real = pad(answers, 4)
    last, nll, hit = score(model.params, model.config, tokens, mask, targets, real)
    rows = [ROWS[i // 2] + answer for i, answer in enumerate(answers)]
    ends = [len(ROWS[i // 2]) - 1 for i in range(len(answers))]
    whole = full(model, rows, ends)
    asked = [tuple(ROWS[i // 2] + a[:-1]) for i, a in enumerate(answers)]
    (best,) = likeliest((model,), [(ids, len(a)) for ids, a in zip(asked, answers, strict=True)])
    for i, answer in enumerate(answers):
        at = whole[i, ends[i] : ends[i] + len(answer)]
        log_p = np.asarray(jax.nn.log_softmax(at))[np.arange(len(answer)), answer]
        assert nll[i // 2, i % 2] == pytest.approx(-log_p.mean(), rel=1e-4)
        assert hit[i // 2, i % 2] == (at.argmax(-1) == answer).all()
        np.testing.assert_array_equal(best[i], at.argmax(-1))
    mine = last_hidden(model.params, model.config, tokens, mask)
    for h in (mine, last):
        found = np.asarray(unembed(model.params, model.config, h))
        np.testing.assert_allclose(found, whole[::2][np.arange(3), ends[::2]], atol=1e-4)


def test_hidden_states_have_no_digits(decoder):
    model = several(decoder("tiny-llama"))
    out, states = hidden_states(model, np.asarray([ROWS[1]]))
    assert states.shape[-1] == model.config.d_model
    np.testing.assert_allclose(out, logits(model, np.asarray([ROWS[1]])), atol=1e-5)


def test_an_empty_stretch_of_layers_changes_nothing(decoder):
    model = several(decoder("tiny-llama"))
    context = Context.of_mask(np.ones((2, 3), int))
    h = jnp.ones((2, 3, model.config.d_model))
    for at in (0, 3, model.config.n_layer):
        np.testing.assert_array_equal(run(model.params, model.config, h, context, at, at), h)


def test_decisions_of_packed_prompts():
    """Each token gets what was decided at the end of its own prompt, or what was carried where that is past."""
    rng = np.random.default_rng(3)
    decision, carried = rng.normal(size=(2, 7, 3)), rng.normal(size=(2, 3))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    ends = jnp.asarray([[1, 1, 1, 4, 4, 0, 0], [-1] * 7])
    context = Context(jnp.zeros((2, 7), int), segments, ends=ends)
    found, carry = at_prompt_end(jnp.asarray(decision), context, jnp.asarray(carried))
    expected = np.stack([decision[0, ends[0]], np.repeat(carried[1:], 7, 0)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(carry, [decision[0, 4], carried[1]], rtol=1e-6)
    free = Context(jnp.zeros((2, 7), int), segments)
    np.testing.assert_allclose(at_prompt_end(jnp.asarray(decision), free, None)[0], decision, rtol=1e-6)
    wanted = [[0, 1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(answering(context), np.asarray(wanted, bool))
    np.testing.assert_array_equal(answering(context, True), [[0, 1, 0, 0, 1, 0, 0], [0] * 7])


def test_packed_rows_are_rows_apart(decoder):
    """Two prompts, each with an answer, end to end in one row."""
    model = several(decoder("tiny-llama"), speak=False)
    one, other = [*ROWS[0], 20, 21], [*ROWS[1], 22]
    a, b = len(one), len(one + other)
    tokens = pad([one + other], LENGTH)[0]
    positions = np.concatenate([np.arange(a), np.arange(b - a), np.zeros(LENGTH - b, int)])[None]
    segments = np.asarray([[1] * a + [2] * (b - a) + [0] * (LENGTH - b)])
    ends = np.where(segments == 1, len(ROWS[0]) - 1, a + len(ROWS[1]) - 1)
    context = Context(jnp.asarray(positions), jnp.asarray(segments)).ending(ends)
    packed = np.asarray(_full(model.params, model.config, tokens, context))[0]
    apart = full(model, [one, other], [len(ROWS[0]) - 1, len(ROWS[1]) - 1])
    np.testing.assert_allclose(packed[:a], apart[0, :a], atol=1e-4)
    np.testing.assert_allclose(packed[a:b], apart[1, : b - a], atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_digits_carry_every_token(dtype):
    ids = jnp.asarray([[-1, 0, 1, 254, 255, 256, 65534, 65535, 65536, 256**3 - 2]])
    h = jnp.ones((1, ids.shape[1], 4), dtype)
    back, found = take_digits(with_digits(h, ids), 4)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(back, h)
    assert take_digits(h, 4)[1] is None


def test_gradient_through_adapters(decoder):
    """Along one direction in every parameter of the adapters, against a difference quotient in float64."""
    with jax.enable_x64(True):
        model = several(decoder("tiny-llama"), speak=False)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params)
        tokens, mask = pad(ROWS, 8)
        context = Context.of_mask(mask).as_prompts()

        def loss(adapters):
            out = _full_logits({**params, "adapters": adapters}, model.config, tokens, context)
            return jnp.sum(jax.nn.log_softmax(out)[:, 0, 3])

        loss = jax.jit(loss)
        adapters = params["adapters"]
        rng = np.random.default_rng(5)
        way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), adapters)
        slopes = jax.tree.map(lambda g, w: jnp.sum(g * w), jax.grad(loss)(adapters), way)
        slope, step = sum(jax.tree.leaves(slopes)), 1e-5
        there = loss(jax.tree.map(lambda x, w: x + step * w, adapters, way))
        back = loss(jax.tree.map(lambda x, w: x - step * w, adapters, way))
        assert float(slope) == pytest.approx(float((there - back) / (2 * step)), rel=1e-6)
        assert all(abs(float(s)) > 1e-9 for s in jax.tree.leaves(slopes))
