"""Forward passes against logits and hidden states that transformers computed, and the ways of cutting a pass up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxedit.models.transformer import Context, Past, embed, hidden_states, logits, run, unembed
from jaxedit.targets.anchor_room import KEPT

TRAINED = ("tiny-llama", "tiny-gpt2", "tiny-gptj")
RANDOM = ("mistral", "qwen2", "qwen3", "gpt_neox", "gpt_neox_seq", "gemma2", "phi3", "llama3_rope")
MODELS = (*TRAINED, *(f"logits_only/{name}" for name in RANDOM))
CUT = ("tiny-llama", "tiny-gptj", "tiny-gpt2", "logits_only/mistral", "logits_only/gemma2")
PAD = 6


@pytest.fixture
def reference(goldens):
    def read(name):
        with np.load(goldens / name / "logits.npz") as arrays:
            return dict(arrays)

    return read


stretch = jax.jit(run, static_argnames=("config", "start", "stop", "probe", "keep"))
read_out = jax.jit(unembed, static_argnames=("config",))
enter = jax.jit(embed, static_argnames=("config",))


def block_output(inside):
    return inside.h


def keys_and_values(inside):
    return inside.k, inside.v


def states_of(model, tokens, mask=None):
    """Hidden states that enter each layer, and the one that leaves the last, ``[n_layer + 1, b, s, d_model]``."""
    tokens = np.asarray(tokens)
    context = Context.of_mask(np.ones_like(tokens) if mask is None else mask)
    h = enter(model.params, model.config, tokens, context)
    _, after = stretch(model.params, model.config, h, context, 0, model.config.n_layer, probe=block_output)
    return context, np.concatenate([h[None], after])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_hidden_states(decoder, reference, name):
    model, expected = decoder(name), reference(name)
    tokens, mask = expected["input_ids"], expected["attention_mask"]
    assert not mask.all()  # one row is padded
    found, states = hidden_states(model, tokens, mask)
    real = mask == 1
    assert found.dtype == np.float32
    assert found.shape == expected["logits"].shape
    assert states.shape == expected["hidden_states"].shape
    assert len(states) == model.config.n_layer + 1
    size = np.abs(expected["logits"][real]).max()
    assert np.abs(np.asarray(found) - expected["logits"])[real].max() <= 1e-5 * size
    for l, (mine, theirs) in enumerate(zip(np.asarray(states), expected["hidden_states"], strict=True)):
        assert np.abs(mine - theirs)[real].max() <= 1e-5 * np.abs(theirs[real]).max(), f"hidden state {l}"
    np.testing.assert_allclose(logits(model, tokens, mask), found, atol=1e-6 * size)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(decoder, reference, name):
    model, tokens = decoder(name), reference(name)["input_ids"]
    length = tokens.shape[1] - PAD
    right, left = np.zeros_like(tokens), np.full_like(tokens, 7)  # and what is padded with does not matter
    right[:, :length], left[:, PAD:] = tokens[:, :length], tokens[:, :length]
    mask = np.zeros_like(tokens)
    mask[:, :length] = 1
    a = np.asarray(logits(model, right, mask))[:, :length]
    b = np.asarray(logits(model, left, mask[:, ::-1]))[:, PAD:]
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    alone = np.asarray(logits(model, tokens[:, :length]))
    np.testing.assert_allclose(a, alone, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", CUT)
def test_run_is_composition(decoder, reference, name):
    model, expected = decoder(name), reference(name)
    context, states = states_of(model, expected["input_ids"], expected["attention_mask"])
    real, n = expected["attention_mask"] == 1, model.config.n_layer
    assert np.abs(states[0] - states[-1])[real].max() > 1e-2
    for k in (1, n - 1):
        h = np.asarray(stretch(model.params, model.config, states[0], context, 0, k))
        np.testing.assert_allclose(h[real], states[k][real], atol=1e-5 * np.abs(states[k][real]).max())
        h = np.asarray(stretch(model.params, model.config, h, context, k, n))
        np.testing.assert_allclose(h[real], states[n][real], atol=1e-5 * np.abs(states[n][real]).max())


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("start", [0, 2])
def test_suffix_with_past_equals_the_whole(decoder, reference, name, start):
    """The prefix is longer than the window of 8, and one suffix reaches back over all of its window."""
    model, tokens = decoder(name), reference(name)["input_ids"]
    params, config, cut = model.params, model.config, 12
    context, states = states_of(model, tokens)
    n = config.n_layer

    def part(where):
        return Context(context.positions[:, where], context.segments[:, where])

    prefix, suffix = slice(0, cut), slice(cut, None)
    _, (k, v) = stretch(params, config, states[start][:, prefix], part(prefix), start, n, probe=keys_and_values)
    assert k.shape == (n - start, len(tokens), cut, config.n_kv_head, config.head_dim)
    past = Past(k, v, part(prefix))
    h = stretch(params, config, states[start][:, suffix], part(suffix), start, n, past=past)
    np.testing.assert_allclose(h, states[n][:, suffix], atol=1e-5 * np.abs(states[n]).max())
    # without the past the answer is another one
    alone = stretch(params, config, states[start][:, suffix], part(suffix), start, n)
    assert np.abs(np.asarray(alone) - states[n][:, suffix]).max() > 1e-2
    whole = read_out(params, config, states[n])
    np.testing.assert_allclose(read_out(params, config, h), whole[:, suffix], atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("name", CUT)
def test_packed_documents_do_not_see_each_other(decoder, reference, name):
    model, tokens = decoder(name), reference(name)["input_ids"][0]
    a, b = tokens[:9], tokens[9:20]
    packed = jnp.asarray(np.concatenate([a, b])[None])
    positions = jnp.asarray(np.concatenate([np.arange(len(a)), np.arange(len(b))])[None], jnp.int32)
    segments = jnp.asarray(np.repeat([1, 2], [len(a), len(b)])[None], jnp.int32)
    context = Context(positions, segments)
    h = enter(model.params, model.config, packed, context)
    h = stretch(model.params, model.config, h, context, 0, model.config.n_layer)
    found = np.asarray(read_out(model.params, model.config, h))[0]
    for part, expected in ((found[: len(a)], a), (found[len(a) :], b)):
        alone = np.asarray(logits(model, expected[None]))[0]
        np.testing.assert_allclose(part, alone, atol=1e-5 * np.abs(alone).max())


def test_what_is_kept_changes_no_gradient(decoder, reference):
    model, tokens = decoder("tiny-llama"), reference("tiny-llama")["input_ids"]
    context, states = states_of(model, tokens)

    def loss(h, keep):
        return jnp.sum(run(model.params, model.config, h, context, 2, model.config.n_layer, keep=keep) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, saved, made_again = (np.asarray(grad(states[2], keep)) for keep in (None, KEPT[0], ()))
    np.testing.assert_allclose(saved, plain, atol=1e-5 * np.abs(plain).max())
    np.testing.assert_allclose(made_again, plain, atol=1e-5 * np.abs(plain).max())


def test_tokens_beyond_the_context_are_refused(decoder):
    model = decoder("tiny-gpt2")
    with pytest.raises(ValueError, match="129 tokens do not fit the context of 128"):
        logits(model, np.zeros((1, 129), np.int32))
    with pytest.raises(ValueError, match="shape"):
        logits(model, np.zeros(5, np.int32))
