"""Jacobians between layers against finite differences, dense matrices and each other, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxedit as je
from jaxedit.analysis.jacobian import average_jacobian, jacobian, passive, stretch
from jaxedit.analysis.krylov import Dense, eigenvalues_near, extremes, leading_singular
from jaxedit.errors import JaxEditError
from jaxedit.models.stretch import pull, push

NAMES = ("tiny-llama", "tiny-gpt2", "tiny-gptj")
SITES = [("block_out", "block_out"), ("mlp_out", "mlp_out"), ("mlp_out", "block_out"), ("block_out", "mlp_out")]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def exact(tiny, goldens):
    """``exact(name) -> (model, tokenizer, requests)`` in float64; the prompts have different lengths."""

    def load(name: str):
        with jax.enable_x64(True):
            model, tokenizer = tiny(name)
            params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
            requests = je.read_requests(goldens / name / "edits.json")[:3]
            return model.with_params(jax.tree.map(jnp.asarray, params)), tokenizer, requests

    return load


def directions(of, *leading: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*leading, *of.shape))


def relative(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def whole_rows(model, tokenizer, request, source: int, target: int, delta) -> np.ndarray:
    """The block output of `target` at the decisive token, with `delta` added to that of `source`: all tokens of the
    whole prompt run through every layer."""
    from jaxedit.data.tokens import prompt_row
    from jaxedit.models.transformer import Context, embed, run

    row = prompt_row(tokenizer, request)
    tokens = jnp.asarray([row.tokens])
    context = Context.of_mask(jnp.ones_like(tokens))
    h = run(model.params, model.config, embed(model.params, model.config, tokens, context), context, 0, source + 1)
    h = h.at[0, row.lookup].add(delta)
    return np.asarray(run(model.params, model.config, h, context, source + 1, target + 1)[0, row.lookup])


@pytest.mark.parametrize(
    ("name", "site", "to"), [("tiny-llama", *s) for s in SITES] + [(n, *s) for n in NAMES[1:] for s in SITES[:2]]
)
def test_columns_products_and_finite_differences_agree(exact, name, site, to):
    model, tokenizer, requests = exact(name)
    of = stretch(model, tokenizer, requests, 1, 4, site=site, to=to)
    dense = jacobian(of)
    assert dense.shape == (3, 64, 64) and dense.dtype == np.float64
    v = directions(of, 2)
    assert relative(push(of, v), np.einsum("nij,knj->kni", dense, v)) <= 1e-12
    assert relative(pull(of, v), np.einsum("nij,kni->knj", dense, v)) <= 1e-12
    step = 1e-5
    ahead, behind = passive(of, step * np.stack([v[0], -v[0]]))
    assert relative((ahead - behind) / (2 * step), np.einsum("nij,nj->ni", dense, v[0])) <= 1e-6
    assert relative(jacobian(of, columns=9), dense) <= 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_one_token_does_what_whole_rows_do(exact, name):
    """The layers on the decisive token alone, with earlier keys and values at hand, against the model on all tokens."""
    model, tokenizer, requests = exact(name)
    of = stretch(model, tokenizer, requests, 1, 4)
    delta = 0.1 * directions(of)
    expected = [whole_rows(model, tokenizer, r, 1, 4, d) for r, d in zip(requests, delta, strict=True)]
    assert relative(of.reach(delta), np.stack(expected)) <= 1e-12


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt_neox"])
def test_windows_and_further_norms(decoder, name):
    """Models with sliding windows, norms after the MLP, and parallel blocks."""
    from jaxedit.analysis.jacobian import _enter

    model = decoder(f"logits_only/{name}")
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), model.params)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab, (2, 11)), jnp.int32)
    positions, segments = jnp.tile(jnp.arange(11), (2, 1)), jnp.ones((2, 11), jnp.int32)
    last = model.config.n_layer - 1
    sites = ("block_out", "mlp_out") if name == "gemma2" else ("block_out",)
    for site in sites:
        of = _enter(params, model.config, tokens, positions, segments, jnp.asarray([[10], [7]]), 0, last, site, site)
        v, step = directions(of), 1e-5
        ahead, behind = passive(of, step * np.stack([v, -v]))
        assert relative((ahead - behind) / (2 * step), np.einsum("nij,nj->ni", jacobian(of), v)) <= 1e-6
        if site == "block_out":
            from jaxedit.models.transformer import Context, embed, run

            context = Context(positions, segments)
            h = run(params, model.config, embed(params, model.config, tokens, context), context, 0, last + 1)
            assert relative(of.reach(0 * v), np.asarray(h)[[0, 1], [10, 7]]) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_identities(exact, name):
    model, tokenizer, requests = exact(name)
    whole = jacobian(stretch(model, tokenizer, requests, 1, 4))
    lower, upper = (jacobian(stretch(model, tokenizer, requests, *ends)) for ends in ((1, 2), (2, 4)))
    assert relative(upper @ lower, whole) <= 1e-12  # from block to block there is no other path than through it
    for site in ("block_out", "mlp_out"):
        same = jacobian(stretch(model, tokenizer, requests, 2, 2, site=site))
        assert np.array_equal(same, np.broadcast_to(np.eye(64), same.shape))


def test_a_block_that_adds_nothing_is_the_identity(exact):
    model, tokenizer, requests = exact("tiny-llama")
    blocks = dict(model.params["blocks"])
    for name in ("o", "down"):
        blocks[name] = {k: jnp.zeros_like(x) for k, x in blocks[name].items()}
    silent = model.with_params({**model.params, "blocks": blocks})
    found = jacobian(stretch(silent, tokenizer, requests, 0, 5))
    assert np.array_equal(found, np.broadcast_to(np.eye(64), found.shape))


@pytest.mark.parametrize(("name", "site"), [(n, "block_out") for n in NAMES] + [("tiny-llama", "mlp_out")])
def test_small_changes_are_linear(exact, name, site):
    """The passive change of a δ as large as the state, scaled by 1e-4, equals J δ."""
    model, tokenizer, requests = exact(name)
    of = stretch(model, tokenizer, requests, 1, 4, site=site)
    delta = directions(of)
    delta *= 1e-4 * np.linalg.norm(of.stream, axis=-1, keepdims=True) / np.linalg.norm(delta, axis=-1, keepdims=True)
    assert relative(passive(of, delta), np.asarray(push(of, delta))) <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_krylov_methods_find_what_dense_ones_find(exact, name):
    model, tokenizer, requests = exact(name)
    of = stretch(model, tokenizer, requests, 1, 4)
    dense = jacobian(of)
    symmetric = (dense + dense.swapaxes(1, 2)) / 2
    values, scale = np.linalg.eigvalsh(symmetric), np.abs(np.linalg.eigvalsh(symmetric)).max()
    for operator in (of, Dense(dense)) if name == "tiny-llama" else (of,):
        found = extremes(operator)
        assert np.abs(found.smallest - values[:, 0]).max() <= 1e-5 * scale
        assert np.abs(found.largest - values[:, -1]).max() <= 1e-5 * scale
        assert (found.error <= 1e-5 * scale).all()
        left = np.einsum("nij,nj->ni", symmetric, found.smallest_vector)
        assert np.abs(left - found.smallest[:, None] * found.smallest_vector).max() <= 1e-5 * scale
    singular = np.linalg.svd(dense, compute_uv=False)
    found = leading_singular(of, 3, passes=20)
    assert relative(found.values, singular[:, :3]) <= 1e-6
    assert np.einsum("nkd,njd->nkj", found.left, found.left) == pytest.approx(np.eye(3)[None].repeat(3, 0), abs=1e-10)


def test_arnoldi_from_an_eigenvector_and_from_elsewhere(exact):
    model, tokenizer, requests = exact("tiny-llama")
    dense = jacobian(stretch(model, tokenizer, requests[:1], 1, 4))
    values, vectors = np.linalg.eig(dense[0])
    real = int(np.flatnonzero(np.abs(values.imag) < 1e-9)[0])
    found = eigenvalues_near(Dense(dense), vectors[:, real].real[None])
    assert found.cosine[0, 0] == pytest.approx(1) and found.error[0, 0] <= 1e-10
    assert found.values[0, 0].real == pytest.approx(values[real].real)
    # In the whole space the Ritz values are the eigenvalues
    found = eigenvalues_near(Dense(dense), np.random.default_rng(0).standard_normal((1, 64)), steps=64)
    gaps = np.abs(found.values[0][:, None] - values[None]).min(0)
    assert gaps.max() <= 1e-6 * np.abs(values).max()


def test_averages(exact):
    model, tokenizer, requests = exact("tiny-gpt2")
    each = jacobian(stretch(model, tokenizer, requests, 1, 3))
    found = average_jacobian(model, tokenizer, requests, 1, 3, at_once=2)
    assert relative(found.mean, each.mean(0)) <= 1e-12 and relative(found.spread, each.std(0)) <= 1e-6
    assert found.norm == pytest.approx(np.linalg.norm(each, axis=(1, 2)))
    inner = np.einsum("nij,ij->n", each, each.mean(0))
    assert found.cosine == pytest.approx(inner / found.norm / np.linalg.norm(each.mean(0)))


def test_of_an_edited_model(exact):
    """Only what is edited between the two layers changes their Jacobian, and at the source only the state does."""
    model, tokenizer, requests = exact("tiny-llama")
    down = model.params["blocks"]["down"]
    other = {**down, "w": down["w"].at[3].multiply(1.5)}
    edited = model.with_params({**model.params, "blocks": {**model.params["blocks"], "down": other}})
    below, above = (
        [jacobian(stretch(m, tokenizer, requests, *ends)) for m in (model, edited)] for ends in ((0, 2), (2, 4))
    )
    assert np.array_equal(*below)
    assert relative(*above) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, 2), {}, "source must not lie above"),
        ((0, 9), {}, "no stretch of a model"),
        ((0, 2), {"site": "key"}, "a site must be one of"),
        ((2, 2), {"to": "mlp_out"}, "nothing reaches it"),
    ],
)
def test_what_is_not_there(exact, arguments, options, message):
    model, tokenizer, requests = exact("tiny-llama")
    with pytest.raises(JaxEditError, match=message):
        stretch(model, tokenizer, requests, *arguments, **options)


def test_shapes_of_products(exact):
    model, tokenizer, requests = exact("tiny-llama")
    of = stretch(model, tokenizer, requests, 1, 2)
    for product in (push, pull, passive):
        assert product(of, np.ones((2, 3, *of.shape))).shape == (2, 3, *of.shape)
        with pytest.raises(JaxEditError, match="at the end of a shape"):
            product(of, np.ones(of.shape[::-1]))
    with pytest.raises(JaxEditError, match="there are no prompts"):
        average_jacobian(model, tokenizer, [], 1, 2)
