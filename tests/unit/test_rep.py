"""REP against NumPy written from its paper, and what its adaptors leave alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import adapted_logits, greedy, logits, prompts_of, same_bits, trees_equal, with_adapters

import jaxedit as je
from jaxedit.adapters.apart import Apart
from jaxedit.adapters.attached import same
from jaxedit.adapters.rep import Rep
from jaxedit.adapters.rep_adaptors import Adaptor, RepState
from jaxedit.adapters.rep_training import (
    Keys,
    Rates,
    cosine,
    drawn,
    elsewhere,
    initial,
    make_plan,
    train,
    training_prompts,
)
from jaxedit.analysis.keys import solved, subject_keys, whitening
from jaxedit.analysis.thresholds import at_thresholds, plot_thresholds
from jaxedit.data.queries import Halves, RobustQueries
from jaxedit.data.subject_forms import SubjectPrompt, names_in
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.evaluation.predictions import likeliest
from jaxedit.export.patch import Delta, apply_patch, make_patch
from jaxedit.layer_loop import edit_keys
from jaxedit.types import EditRequest

LAYERS = (1, 3)
QUICK = Rep(steps=12, batch=6, lr=3e-2, consistency=20.0, tau=0.6, together=2)
TEMPLATES = ("{}", "It was so. {}", "You said it. {}", "Work begins in May. {}", "No. {}", "The end of all. {}")
REQUESTS = [
    EditRequest("Max Joseph von Pettenkofer works in the field of", "Max Joseph von Pettenkofer", "music"),
    EditRequest("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"),
    EditRequest("The Beatles were founded in", "Beatles", "Vienna"),
]
QUERIES = [
    RobustQueries(Halves(("Pettenkofer", "Dr. Pettenkofer")), Halves(("koferPetten Max",)), Halves(("It rained.",))),
    RobustQueries(Halves(("Darrieux",)), Halves(("DarrDanieux ielle",)), Halves(("No one knew why it was so.",))),
    RobustQueries(Halves(("Fab Four",), ("Paul and Ringo",))),
]


@pytest.fixture(scope="module")
def wide(goldens):
    """A float64 tiny-llama, its tokenizer, the whitening of its keys, and three hosts, each with one edit."""
    with jax.enable_x64(True):
        model, tokenizer = je.load(goldens / "tiny-llama", dtype="float64")
        rng = np.random.default_rng(0)
        texts = [
            " ".join(rng.choice(["The", "Beatles", "of", "mother", "work", "is", "Max", "in"], 60)) for _ in "1234567"
        ]
        stats = je.second_moments(model, tokenizer, texts, LAYERS, cache=False)
        down, patches = model.params["blocks"]["down"]["w"], []
        for request in REQUESTS:
            sides = {l: (rng.normal(size=(down.shape[1], 1)), rng.normal(size=(1, down.shape[2]))) for l in LAYERS}
            deltas = {l: Delta(left, 0.02 * right) for l, (left, right) in sides.items()}
            patches.append(make_patch({}, [request], {l: np.asarray(down[l]) for l in LAYERS}, deltas)[0])
        yield model, tokenizer, whitening(stats, LAYERS), patches


@pytest.fixture(scope="module")
def trained(wide):
    """Model, tokenizer, what `edit` was given, the adaptors of all edits, and their traces."""
    model, tokenizer, factor, _ = wide
    settings = {"layers": LAYERS, "stats": factor, "queries": QUERIES, "templates": TEMPLATES}
    return model, tokenizer, settings, *QUICK.edit(model, tokenizer, REQUESTS, **settings)


def gelu(z):
    return 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def gelu_slope(z):
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def oracle(p, pool, clean, target, other, real, consistency, negative, positive, response):
    """The loss's terms, and its gradient, of one adaptor, as the paper and the published code have them; or where
    `response`, with a first term that compares how strongly the edit is heard with how it is at the prompt."""
    a, b, w1, c1, w2, c2 = p
    k = np.vstack([pool, clean])
    z = k @ w1.T + c1
    g = 1 / (1 + np.exp(-(gelu(z) @ w2 + c2)))
    low = k @ a.T
    moved = k + g[:, None] * (low @ b.T)
    size = np.linalg.norm(moved[:-1], axis=1, keepdims=True)
    cos = (moved[:-1] @ target)[:, None] / size
    z_other = other @ w1.T + c1
    g_other = 1 / (1 + np.exp(-(gelu(z_other) @ w2 + c2)))
    heard = moved[:-1] @ target / (clean @ target)
    terms = [
        ((heard - 1) ** 2).mean() if response else -cos.mean(),
        ((moved[-1] - clean) ** 2).mean(),
        -(np.log(1 - g_other) * real).sum() / real.sum(),
        -np.log(g[:-1]).mean(),
    ]
    d_first = (
        2 * (heard - 1)[:, None] * target / (clean @ target) if response else cos * moved[:-1] / size**2 - target / size
    )
    d_moved = np.vstack([d_first / len(pool), 2 * consistency * (moved[-1] - clean) / len(clean)])
    d_proj = g[:, None] * d_moved
    d_gate = (d_moved * (low @ b.T)).sum(1) * g * (1 - g)
    d_gate[:-1] += positive * (g[:-1] - 1) / len(pool)
    d_gate = np.concatenate([d_gate, negative * g_other * real / real.sum()])
    every, z_every = np.vstack([k, other]), np.vstack([z, z_other])
    d_z = d_gate[:, None] * w2 * gelu_slope(z_every)
    return np.asarray(terms), [
        (d_proj @ b).T @ k,
        d_proj.T @ low,
        d_z.T @ every,
        d_z.sum(0),
        gelu(z_every).T @ d_gate,
        d_gate.sum(),
    ]


@pytest.mark.parametrize("response", [False, True])
def test_loss_and_adam(response):
    """Two steps of two edits trained at once, in float64 and without dropout."""
    rng, d, rank, width, batch, n = np.random.default_rng(1), 24, 3, 5, 4, 2
    target = rng.normal(size=(n, d))
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    shape = (n, 2, batch)
    pool, other, clean = rng.normal(size=(*shape, d)), rng.normal(size=(n, 4, d)), rng.normal(size=(n, d))
    real = np.asarray([[1, 1, 0, 1]] * n, float)
    settings = Rep(rank=rank, steps=2, batch=batch, lr=0.05, dropout=0.0, consistency=30.0, negative=0.7, positive=0.4)
    with jax.enable_x64(True):
        keys, rates = Keys(*map(jnp.asarray, (pool, clean, target, other, real))), Rates.of(settings, jnp.float64)
        random = jax.random.split(jax.random.key(0), n)
        start = initial(random, keys.clean, width, rank)
        made, log = jax.tree.map(np.asarray, train(rates, start, keys, random, response))
        none = train(rates._replace(dropout=jnp.float64(0.5)), start, keys, random, response)[0]
    assert not np.allclose(none.up, made.up)
    start = jax.tree.map(np.asarray, start)
    for x, inputs in zip(start, (d, None, d, d, width, width), strict=True):
        assert not x.any() if inputs is None else 0 < np.abs(x).max() <= inputs**-0.5
    for i in range(n):
        p = [np.array(x[i]) for x in start]
        one, two = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
        for step in range(2):
            terms, slopes = oracle(p, pool[i, step], clean[i], target[i], other[i], real[i], 30.0, 0.7, 0.4, response)
            np.testing.assert_allclose(log[i, step], terms, rtol=1e-9, atol=1e-15)
            if step == 0:  # the projection is 0: keys stand as they are
                cos = pool[i, 0] @ target[i] / np.linalg.norm(pool[i, 0], axis=1)
                assert terms[1] == 0 and (response or terms[0] == pytest.approx(-cos.mean(), rel=1e-12))
            for j, slope in enumerate(slopes):
                one[j] = 0.9 * one[j] + 0.1 * slope
                two[j] = 0.999 * two[j] + 0.001 * slope**2
                fair = one[j] / (1 - 0.9 ** (step + 1)), two[j] / (1 - 0.999 ** (step + 1))
                p[j] = p[j] - 0.05 * fair[0] / (np.sqrt(fair[1]) + 1e-8)
        for x, wanted in zip(made, p, strict=True):
            np.testing.assert_allclose(x[i], wanted, rtol=1e-6, atol=1e-9)
    scaled = cosine(7.0 * pool[0, 0], target[0])
    np.testing.assert_allclose(scaled, cosine(pool[0, 0], target[0]), rtol=1e-5)


def random_state(n, d, width, rank, tau, layers=(0,)):
    rng, m = np.random.default_rng(2), len(layers)
    shapes = Adaptor((rank, d), (d, rank), (width, d), (width,), (width,), ())
    made = {name: jnp.asarray(rng.normal(size=(n, m, *shape))) for name, shape in shapes._asdict().items()}
    owner = jnp.asarray([3, -1, 0, 1, 2][:n], jnp.int32)
    return RepState(**made, owner=owner, given=jnp.asarray(n), tau=jnp.asarray(tau), layers=layers)


def test_only_the_largest_open_gate_acts(monkeypatch):
    """Against NumPy, one adaptor free; also where gates of so many tokens are computed a few edits at a time."""
    with jax.enable_x64(True):
        state, keys = random_state(5, 12, 6, 2, 0.9), np.random.default_rng(3).normal(size=(3, 7, 12))
        a, b, w1, c1, w2, c2 = (np.asarray(x) for x in state.adaptors(0))
        o = np.einsum("nbsh,nh->nbs", gelu(np.einsum("bsd,nhd->nbsh", keys, w1) + c1[:, None, None]), w2)
        gates = 1 / (1 + np.exp(-(o + c2[:, None, None])))
        gates[1] = -1
        best, proj = gates.argmax(0), np.einsum("bsd,nrd,ner->nbse", keys, a, b)
        own = np.take_along_axis(proj, best[None, ..., None], 0)[0]
        wanted = np.where((gates.max(0) > 0.9)[..., None], keys + own, keys)
        assert len(np.unique(best[gates.max(0) > 0.9])) > 2
        for numbers in (2**24, 3 * 7 * 6 * 2):
            monkeypatch.setattr("jaxedit.adapters.rep_adaptors._NUMBERS", numbers)
            moved, is_open = state.acting(state.adaptors(0), jnp.asarray(keys))
            np.testing.assert_array_equal(is_open, gates.max(0) > 0.9)
            np.testing.assert_allclose(moved, wanted, atol=1e-9)
        counts = [state.at(tau).acting(state.adaptors(0), jnp.asarray(keys))[1].sum() for tau in (0, 0.1, 0.5, 0.9, 1)]
        assert counts == sorted(counts, reverse=True) and counts[0] == 21 and counts[-1] == 0
        rows = state.for_rows([1, -1, 7])
        moved, is_open = rows.acting(rows.adaptors(0), jnp.asarray(keys))
        assert not is_open[1:].any()
        np.testing.assert_array_equal(is_open[0], gates[3, 0] > 0.9)
        np.testing.assert_allclose(moved[0], keys[0] + proj[3, 0], atol=1e-9)


def test_training_leads_keys_to_the_edit(trained):
    state, trace = trained[3:]
    assert state.layers == LAYERS and state.owner.tolist() == [0, 1, 2, -1] and state.down.dtype == np.float64
    assert trace["losses"].shape == (3, 2, 12, 4) and (trace["losses"][:, :, 0, 1] == 0).all()
    assert (trace["losses"][:, :, -1, 0] < trace["losses"][:, :, 0, 0] - 0.05).all()
    gain = trace["cosine"][..., 1] - trace["cosine"][..., 0]
    assert (gain >= 0).all() and (gain[:, 1] > 0.15).all() and (trace["open"][:, 1] > 0.2).all()
    assert (trace["drift"] < 0.1).all()


def test_keys_are_those_of_the_model(trained):
    """What was reported of keys read beforehand, against keys of the model with its adaptors, layer by layer; and the
    prompt's key is the one that the host takes it to be."""
    model, tokenizer, settings, state, trace = trained
    factor = settings["stats"]
    edits = validate(tokenizer, REQUESTS, CLEAN, 128)
    host = edit_keys(model, je.method_for("rome", model.config, (1,)), edits, np.ones(1))[1]
    prompts = [SubjectPrompt.of(r) for r in REQUESTS]
    np.testing.assert_allclose(subject_keys(model, tokenizer, prompts, (1,))[1], host, atol=1e-12)
    plan = make_plan(QUICK, tokenizer, prompts, QUERIES, TEMPLATES, [(0, i) for i in range(3)], True)
    assert [plan.texts[i] for i in plan.clean] == [e.contexts[0].tokens[: e.contexts[0].lookup + 1] for e in edits]
    whole = tokenizer(REQUESTS[2].prompt)["input_ids"]
    tails = [plan.texts[i] for i in plan.other[2] if i >= 0]
    assert tails == [tuple(whole[:n]) for n in range(1, len(whole) + 1) if n != len(plan.texts[plan.clean[2]])]
    text = "In spring the Rolling Stones left for Graz, where Max and the Beatles were, and the Who in Graz."
    named = elsewhere(tokenizer, prompts[2], RobustQueries(long=Halves((text, text))), 2, np.random.default_rng(0))
    names = ["Rolling Stones", "Graz", "Max", "Who"]
    assert set(names) == set(names_in(text)) - {"Beatles"}
    ends = {tuple(tokenizer(prompts[2].with_subject(name).prompt)["input_ids"]): name for name in names}
    assert named[: len(tails)] == tails and len(set(named)) == len(named) and len(ends.keys() & set(named)) == 2
    for i, prompt in enumerate(prompts):
        every = training_prompts(prompt, QUERIES[i], TEMPLATES)
        pool = drawn(np.random.default_rng((0, i)), len(every) - 1, 72) + 1
        assert np.bincount(pool)[1:].max() - np.bincount(pool)[1:].min() <= 1
        alone = with_adapters(model, state.without([j for j in range(3) if j != i]))
        before, after = (subject_keys(m, tokenizer, every, (*LAYERS, 4)) for m in (model, alone))
        for j, l in enumerate(LAYERS):
            target = solved(factor, l, before[l][: len(TEMPLATES)].mean(0)[None], both_ways=True)[0]
            cos = after[l] @ target / np.linalg.norm(after[l], axis=1) / np.linalg.norm(target)
            assert cos[pool].mean() == pytest.approx(trace["cosine"][i, j, 1], abs=1e-9)
        drift = np.linalg.norm(after[1][0] - before[1][0]) / np.linalg.norm(before[1][0])
        assert drift == pytest.approx(trace["drift"][i, 0], abs=1e-9)


def test_edits_apart_are_edits_alone(wide):
    """Trained together, each row with its own host; on each host by itself; the host's keys given."""
    model, tokenizer, factor, patches = wide
    many = {"layers": LAYERS, "stats": factor, "templates": TEMPLATES}
    apart, log = QUICK.edit(model, tokenizer, REQUESTS, queries=QUERIES, apart=Apart.of(patches), **many)
    state = None
    for request, some, patch in zip(REQUESTS, QUERIES, patches, strict=True):
        host = apply_patch(model, patch)
        state, trace = QUICK.edit(host, tokenizer, [request], queries=[some], state=state, **many)
    for name in (*Adaptor._fields, "owner"):
        np.testing.assert_allclose(getattr(apart, name)[:3], getattr(state, name)[:3], rtol=0, atol=1e-7)
    np.testing.assert_allclose(log["losses"][2:], trace["losses"], rtol=0, atol=1e-8)
    assert state is not None and int(state.given) == 3
    rows, ends = prompts_of(tokenizer, [*REQUESTS, REQUESTS[0]])
    own = [0, 1, 2, -1]
    found = logits(with_adapters(model, Apart.of(patches).for_rows(own), apart.for_rows(own)), rows, ends)
    hosts = [*(apply_patch(model, patch) for patch in patches), model]
    both, one_model = with_adapters(model, Apart.of(patches), apart), with_adapters(model, apart)
    asked = [(tuple(row), 1) for row in rows]
    (said,), (joined,) = likeliest([both], asked, own=own), likeliest([one_model], asked)
    everywhere = logits(one_model, rows, ends)
    for i, (row, end, host) in enumerate(zip(rows, ends, hosts, strict=True)):
        assert said[i] == found[i][end].argmax() and joined[i] == everywhere[i][end].argmax()
        one = with_adapters(host, apart.without([j for j in range(3) if j != i]))
        wanted = logits(host if i == 3 else one, [row], [end], max(map(len, rows)))[0]
        np.testing.assert_allclose(found[i], wanted, rtol=0, atol=1e-9)
    own_keys = {l: subject_keys(model, tokenizer, REQUESTS[:1], LAYERS)[l] for l in LAYERS}
    given, _ = QUICK.edit(model, tokenizer, REQUESTS[:1], queries=QUERIES[:1], keys=own_keys, **many)
    assert not np.allclose(given.up[0], apart.up[0])


def test_closed_gates_leave_the_hosts_logits(tiny):
    """Bit for bit: gates shut, nothing projected, edits withdrawn; and one program serves them and every threshold."""
    model, tokenizer = tiny("tiny-llama")
    state = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == np.float64 else x, random_state(5, 192, 19, 4, 0.5, (2,))
    )
    rows, ends = prompts_of(tokenizer, REQUESTS)
    host = logits(model, rows, ends)
    assert not same_bits(logits(with_adapters(model, state), rows, ends), host)
    programs = adapted_logits._cache_size()
    shut = [state.at(1.0), dataclasses.replace(state, up=jnp.zeros_like(state.up)), state.without([0, 1, 2, 3])]
    for other in (*shut, dataclasses.replace(state, shift=jnp.full_like(state.shift, -1e4))):
        assert same_bits(logits(with_adapters(model, other), rows, ends), host)
    assert adapted_logits._cache_size() == programs
    assert same_bits(logits(with_adapters(model, state.for_rows([-1, -1, 9])), rows, ends), host)
    with pytest.raises(JaxEditError, match="edits .7. are not held"):
        state.without([7])
    with pytest.raises(JaxEditError, match="tau"):
        state.at(1.5)


def test_templates_are_the_papers(tiny, monkeypatch):
    """Ten sampled texts of each of two lengths, behind the prompt as it is."""

    def sampled(model, tokenizer, seed, n, length):
        return (("{}",), tuple(f"{length} {i}. {{}}" for i in range(n)))

    monkeypatch.setattr("jaxedit.adapters.rep.sample_templates", sampled)
    found = Rep().templates(*tiny("tiny-llama"), 0)
    assert found == ("{}", *(f"{length} {i}. {{}}" for length in (5, 10) for i in range(10)))


def test_generation_with_a_cache_is_without(trained):
    model, tokenizer, _, state, _ = trained
    adapted, rows = with_adapters(model, state.at(0.0)), prompts_of(tokenizer, REQUESTS)[0]
    slow = greedy(adapted, rows, 6)
    assert continue_rows(adapted.params, model.config, rows, 6) == slow != greedy(model, rows, 6)
    out = logits(adapted, rows, [len(r) - 1 for r in rows])
    padded = logits(adapted, rows, [len(r) - 1 for r in rows], 24, left=True)
    for a, b in zip(out, padded, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_training_is_the_same_again_and_compiles_once(trained, tmp_path):
    model, tokenizer, settings, state, _ = trained
    programs = train._cache_size()
    again = dataclasses.replace(QUICK, together=32).edit(model, tokenizer, REQUESTS, **settings)[0]
    np.testing.assert_allclose(again.up, state.up, atol=1e-8)
    assert train._cache_size() == programs + 1
    other = dataclasses.replace(QUICK, lr=2e-2, consistency=1.0, dropout=0.3, tau=0.7)
    assert not trees_equal(other.edit(model, tokenizer, REQUESTS, **settings)[0], state)
    assert trees_equal(QUICK.edit(model, tokenizer, REQUESTS, **settings)[0], state)
    assert train._cache_size() == programs + 1
    patch = je.EditPatch({"name": "test"}, tuple(REQUESTS), {}, {}, {}, {}, "float64", (state,))
    loaded = je.EditPatch.load(patch.save(tmp_path / "one.jaxedit")).adapters[0]
    assert same(loaded, state) and isinstance(loaded, RepState) and loaded.rows is None


def test_thresholds(trained, tmp_path):
    """The share of open gates falls with tau."""
    model, tokenizer, _, state, _ = trained
    keys = jnp.asarray(subject_keys(model, tokenizer, REQUESTS, (1,))[1])[None]

    def measure(state):
        return {"open": float(state.acting(state.adaptors(0), keys)[1].mean()), "none": None}

    curve = at_thresholds(state, (1.0, 0.0, 0.5), measure)
    assert curve.taus.tolist() == [0, 0.5, 1] and curve.scores["open"][[0, 2]].tolist() == [1, 0]
    assert np.isnan(curve.scores["none"]).all() and curve.table().splitlines()[1].split() == ["0", "100.0", "-"]
    assert plot_thresholds(curve, tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(JaxEditError, match="tau"):
        at_thresholds(state, (), measure)


def test_what_cannot_be_trained_is_refused(trained):
    model, tokenizer, settings, state, _ = trained
    one = {**settings, "queries": QUERIES[:1]}
    with pytest.raises(JaxEditError, match="queries"):
        QUICK.edit(model, tokenizer, REQUESTS, **one)
    with pytest.raises(JaxEditError, match="without adapters"):
        QUICK.edit(with_adapters(model, state), tokenizer, REQUESTS, **settings)
    with pytest.raises(JaxEditError, match="keys of layer 1"):
        QUICK.edit(model, tokenizer, REQUESTS, keys={1: np.ones((1, 192))}, **settings)
    with pytest.raises(JaxEditError, match="go on from"):
        dataclasses.replace(QUICK, rank=3).edit(model, tokenizer, REQUESTS, state=state, **settings)
    with pytest.raises(JaxEditError, match="no other texts"):
        none = {**one, "queries": [RobustQueries()], "templates": ("{}",)}
        QUICK.edit(model, tokenizer, REQUESTS[:1], **none)
    with pytest.raises(RequestError, match="request 0 .*the model takes 128"):
        long = {**one, "queries": [RobustQueries(long=Halves(("word " * 200,)))]}
        QUICK.edit(model, tokenizer, REQUESTS[:1], **long)
    for wrong in ({"tau": 1.5}, {"dropout": 1.0}, {"rank": 0}, {"lr": 0.0}, {"gate_width": 0.0}):
        with pytest.raises(JaxEditError):
            dataclasses.replace(QUICK, **wrong)
