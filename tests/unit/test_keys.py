"""Keys and what follows from them, against the published code's keys, NumPy in float64, and whole models."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_metrics import row_logits

import jaxedit as je
from jaxedit.analysis import key_paths, key_plots
from jaxedit.analysis.key_bounds import agreement, area_under_curve, edit_bounds, rank_correlation, verdicts_found
from jaxedit.analysis.key_neighbours import nearest_prefixes
from jaxedit.analysis.keys import (
    key_similarity,
    retrieval_weights,
    subject_keys,
    subject_values,
    value_norms,
    whiten,
    whitening,
)
from jaxedit.config import BackwardSpread
from jaxedit.data.subject_forms import (
    SubjectPrompt,
    cut_context,
    form_in,
    names_in,
    other_forms,
    random_contexts,
    rule_forms,
    shuffled_forms,
    text_end,
)
from jaxedit.data.tokens import target_ids
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import pad
from jaxedit.models.transformer import Context, embed, run


def world(goldens, name):
    """A float64 model, its tokenizer, and second moments; inside `jax.enable_x64`."""
    with np.load(goldens / name / "cov.npz") as moments:
        matrices = {int(name.removeprefix("cov_L")): moments[name] for name in moments.files}
    stats = je.SecondMoments.from_arrays(matrices, 19_200)
    return *je.load(goldens / name, dtype="float64"), stats


def all_keys(model, ids, index):
    """Keys of every token of one row by itself; one shape, so that it is compiled once."""
    tokens, mask = pad([ids], 48)
    return np.asarray(_all_keys(model.params, model.config, tokens, mask, index))[0, : len(ids)]


@partial(jax.jit, static_argnames=("config", "index"))
def _all_keys(params, config, tokens, mask, index):
    context = Context.of_mask(mask)
    h = embed(params, config, tokens, context)
    return run(params, config, h, context, 0, index + 1, probe=lambda x: x.key)[1][index]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gptj"])
def test_keys_are_those_of_the_published_code(goldens, name):
    about = json.loads((goldens / name / "edits.json").read_text())
    requests = [je.EditRequest.from_template(e["prompt"], e["subject"], e["target_new"]["str"]) for e in about["edits"]]
    clean, contexts = about["templates"]
    assert clean == ["{}"] and all(c.endswith(" {}") for c in contexts)
    with jax.enable_x64(True):
        model, tokenizer, stats = world(goldens, name)
        rows = [SubjectPrompt.of(r) for r in requests]
        rows += [p.after(c.removesuffix(" {}")) for c in contexts for p in rows]
        found = subject_keys(model, tokenizer, rows, stats.layers)
        small = subject_keys(model, tokenizer, rows[::-1] + rows[:1], stats.layers[1:], batch_tokens=16)
    with np.load(goldens / name / "edits.npz") as arrays:
        for l in stats.layers:
            parts = found[l].reshape(1 + len(contexts), len(requests), -1)
            mean = parts[0] / 2 + parts[1:].mean(0) / 2
            np.testing.assert_allclose(mean, arrays[f"targets/keys_L{l}"], rtol=1e-8, atol=1e-10)
    for l in stats.layers[1:]:
        np.testing.assert_allclose(small[l], np.concatenate([found[l][::-1], found[l][:1]]), rtol=1e-9, atol=1e-12)


def test_keys_say_what_is_wrong(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    with pytest.raises(JaxEditError, match="'Rome' does not stand in the prompt 'Paris is'"):
        subject_keys(model, tokenizer, [("Paris is", "Rome")], [1])
    with pytest.raises(JaxEditError, match=r"layers \[6\]: name at least one of 0 … 5"):
        subject_keys(model, tokenizer, [("Paris is", "Paris")], [6])
    with pytest.raises(RequestError, match="prompt 1 has .* tokens; the model takes 128"):
        subject_keys(model, tokenizer, [("Paris is", "Paris"), ("of " * 200 + "Paris is", "Paris")], [1])


def test_similarity():
    """``kᵀC⁻¹k'``: symmetric, the same in other coordinates, and d_ff on average over the keys that C is of."""
    draw = np.random.default_rng(0)
    keys = draw.normal(size=(300, 40)) @ draw.normal(size=(40, 40))
    turn = draw.normal(size=(40, 40))

    def factor_of(rows):
        return whitening(je.SecondMoments.from_arrays({3: rows.T @ rows / len(rows)}, len(rows)))

    found = key_similarity(factor_of(keys), 3, keys[:9], keys[5:30])
    inverse = np.linalg.inv(keys.T @ keys / len(keys))
    np.testing.assert_allclose(found, keys[:9] @ inverse @ keys[5:30].T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found[5:9, :4], found[5:9, :4].T, rtol=1e-9)
    np.testing.assert_allclose(key_similarity(factor_of(keys @ turn), 3, keys[:9] @ turn, keys[5:30] @ turn), found)
    white = whiten(factor_of(keys), 3, keys)
    np.testing.assert_allclose(white.T @ white / len(keys), np.eye(40), atol=1e-9)
    own = np.diag(key_similarity(factor_of(keys), 3, keys))
    assert own.mean() == pytest.approx(40) and own.max() / len(keys) <= 1


@pytest.mark.parametrize(("n", "rank"), [(7, 7), (60, 20), (30, 12)])
def test_retrieval_weights_are_those_of_the_pseudoinverse(n, rank):
    draw = np.random.default_rng(n)
    stored = draw.normal(size=(n, rank)) @ draw.normal(size=(rank, 20))
    queries, values = draw.normal(size=(5, 20)), draw.normal(size=(n, 4))
    weights, unexplained = retrieval_weights(stored, queries)
    np.testing.assert_allclose(weights, queries @ np.linalg.pinv(stored, rcond=1e-10), atol=1e-10)
    matrix = np.linalg.pinv(stored, rcond=1e-10) @ values  # the memory that was fitted to keys and values
    np.testing.assert_allclose(weights @ values, queries @ matrix, atol=1e-10)
    assert (unexplained < 1e-10).all() == (rank == 20)
    if n < 20:
        np.testing.assert_allclose(retrieval_weights(stored, stored).weights, np.eye(n), atol=1e-9)
    ridged = retrieval_weights(stored, queries, 0.3).weights
    np.testing.assert_allclose(ridged, queries @ np.linalg.inv(stored.T @ stored + 0.3 * np.eye(20)) @ stored.T)
    with pytest.raises(JaxEditError, match="same number of channels"):
        retrieval_weights(stored, queries[:, :3])


DOCUMENTS = [
    "The mother tongue of Danielle Darrieux is French. Danielle Darrieux was born in Bordeaux.",
    "Max Joseph von Pettenkofer works in the field of chemistry, and so does Danielle Darrieux.",
    "Rome",
    "Sean M. Carroll was headquartered in Stockholm when Max Joseph von Pettenkofer met his mother.",
] * 2


def test_nearest_prefixes_are_those_of_brute_force(goldens):
    """Also in blocks of one row and of all, and with more asked for than there are."""
    asked = [("The tongue of Danielle Darrieux", "Danielle Darrieux"), ("Rome is", "Rome"), ("His mother", "mother")]
    with jax.enable_x64(True):
        model, tokenizer, stats = world(goldens, "tiny-llama")
        factor, inverse = whitening(stats), np.linalg.inv(np.asarray(stats[2].matrix, np.float64))
        queries = subject_keys(model, tokenizer, asked, [2])[2]
        rows = [tokenizer(d)["input_ids"] for d in DOCUMENTS]
        every = [(ids[: i + 1], k) for ids in rows for i, k in enumerate(all_keys(model, ids, 2))]
        options = {"max_tokens": 10_000, "length": 48, "window": 6}
        found = nearest_prefixes(model, tokenizer, asked, 2, factor, DOCUMENTS, k=12, batch=1, **options)
        whole = nearest_prefixes(model, tokenizer, asked, 2, factor, DOCUMENTS, k=12, batch=64, **options)
        most = nearest_prefixes(model, tokenizer, asked[:1], 2, factor, DOCUMENTS[2:3], k=5, **options)
    for (_, subject), query, mine, same in zip(asked, queries, found, whole, strict=True):
        own = [tokenizer(s + subject, add_special_tokens=False)["input_ids"] for s in ("", " ")]
        allowed = [(query @ inverse @ k, ids) for ids, k in every if not any(ids[-len(o) :] == o for o in own)]
        assert len(allowed) < len(every)
        best = sorted(allowed, key=lambda x: -x[0])[:12]
        np.testing.assert_allclose([p.similarity for p in mine], [s for s, _ in best], rtol=1e-8)
        np.testing.assert_allclose([p.similarity for p in same], [s for s, _ in best], rtol=1e-8)
        texts = {(round(s, 6), tokenizer.decode(ids[-6:]), tokenizer.decode(ids[-1:])) for s, ids in allowed}
        assert {(round(p.similarity, 6), p.text, p.token) for p in [*mine, *same]} <= texts
    assert len(most[0]) == len(rows[2])


def test_forms_of_a_subject(tiny):
    model, tokenizer = tiny("tiny-gpt2")
    prompt = SubjectPrompt.of(("Is Paris in France? The Paris of the North", "Paris"))
    assert prompt.start == 24 and prompt.with_subject("Tromsø").prompt == "Is Paris in France? The Tromsø of the North"
    later = prompt.after("A long story.")
    assert later.prompt[later.start :].startswith("Paris of") and later.with_subject("X").prompt.startswith("A long")
    assert rule_forms("Danielle Darrieux") == {
        "possessive": "Danielle Darrieux's",
        "article": "the Danielle Darrieux",
        "initials": "D. Darrieux",
        "title": "Dr. Danielle Darrieux",
    }
    assert rule_forms("The Beatles") == {"possessive": "The Beatles'", "article": "Beatles"}
    assert rule_forms("iPod").keys() == {"possessive", "article"}
    text = "The Nile, in Sudan, meets Ras al-Khaimah. Rivers like the Blue Nile and the Atbara's, of Sudan, end."
    assert names_in(text) == ["Nile", "Sudan", "Ras", "Blue Nile", "Atbara's"]
    forms = shuffled_forms(tokenizer, "Danielle Darrieux", 4, seed=1)
    assert len(set(forms)) == 4 and forms == shuffled_forms(tokenizer, "Danielle Darrieux", 4, seed=1)
    assert all(sorted(f.replace(" ", "")) == sorted("DanielleDarrieux") for f in forms)
    assert shuffled_forms(tokenizer, "of", 4) == []
    text = "The mother tongue of Danielle Darrieux is French, she was born in Bordeaux."
    cut = cut_context(tokenizer, text, 5, start=2)
    assert cut in text and abs(len(tokenizer(cut)["input_ids"]) - 5) <= 2
    with pytest.raises(JaxEditError, match="500 are needed"):
        cut_context(tokenizer, text, 500)


@pytest.mark.parametrize(
    ("subject", "prompt", "form"),
    [
        ("Danielle Darrieux", "Danielle Darrieux, the tongue of Darrieux", "Danielle Darrieux"),
        ("Danielle Darrieux", "The language of Mlle. Darrieux is", "Darrieux"),
        ("Thomas Joannes Stieltjes", "He, Tomas Joannes STIILTJES, speaks", "Tomas Joannes STIILTJES"),
        ("University of Madrid", "In Madrid, the University of Madrid's seat is", "University of Madrid"),
        ("Madrid University", "The University of Spain in Madrid is the oldest University, in", "University"),
        ("Madrid University", "It is a university in", None),
        ("light rail", "the Rail and the rail", "rail"),
        ("Porsche 911", "Porsche 914, designed by", None),
        ("Triumph TR8", "TR8 Triumph, made by", None),
    ],
)
def test_the_form_of_a_subject_in_a_rephrased_prompt(subject, prompt, form):
    found = form_in(prompt, subject)
    if form is None:
        assert found is None
    else:
        assert found is not None and found.subject == form
        assert found == SubjectPrompt(prompt, form, prompt.rfind(form))


def test_prompts_of_other_forms(tiny):
    _, tokenizer = tiny("tiny-gpt2")
    asked = "Danielle Darrieux was born in", "Where was Mlle. Darrieux born? In", "She was born in"
    request = je.EditRequest("The tongue of Danielle Darrieux is", "Danielle Darrieux", "Dutch", paraphrases=asked)
    found = other_forms(tokenizer, request, "Once upon a time.", shuffles=2)
    assert [p.prompt for p in found["same name"]] == [asked[0]]
    assert [(p.prompt, p.subject) for p in found["rephrased name"]] == [(asked[1], "Darrieux")]
    assert found["long context"][0].prompt == f"Once upon a time. {request.prompt}"
    ruled = [p.subject for p in [*found["article, initials, title"], *found["possessive"]]]
    assert sorted(ruled) == sorted(rule_forms(request.subject).values()) and len(found["shuffled"]) == 2
    assert not other_forms(tokenizer, request)["long context"]
    texts = random_contexts(tokenizer, 9, 4, DOCUMENTS[:2], seed=3)
    assert texts == random_contexts(tokenizer, 9, 4, DOCUMENTS[:2], seed=3) and len(set(texts)) > 1
    assert all(t in "\n".join(DOCUMENTS[:2]) for t in texts)
    assert text_end("of the North ") == SubjectPrompt("of the North", "North", 7)
    with pytest.raises(JaxEditError, match="500 are needed"):
        random_contexts(tokenizer, 500, 1, DOCUMENTS[:1])


@pytest.fixture(scope="module")
def edit(goldens):
    """An edit of tiny-llama at one layer in float64, towards made-up targets, and its base, bounds and report."""
    with jax.enable_x64(True):
        model, tokenizer, stats = world(goldens, "tiny-llama")
        requests = je.read_requests(goldens / "tiny-llama" / "facts.json")[:6]
        method = je.Method(name="test", targets=BackwardSpread(), layers=(2,), solver=je.Ridge(cov_weight=30.0))
        values = 4 * np.random.default_rng(0).normal(size=(1, len(requests), model.config.d_model))
        result = je.apply_edits(
            model, tokenizer, requests, method, stats=stats, targets=je.Targets((2,), values), templates=["{}"]
        )
        bounds = edit_bounds(model, result, tokenizer, requests, max_neighbours=2)
        report = je.evaluate(model, result.model, tokenizer, requests, max_neighbours=2)
        yield model, tokenizer, stats, requests, result, bounds, report


def gaps(model, tokenizer, requests, bounds):
    """Logit of the new target's first token minus the old one's, after each prompt by itself."""
    found = []
    for r, prompt in zip(bounds.request, bounds.prompts, strict=True):
        new, old = (target_ids(tokenizer, prompt, t)[0] for t in (requests[r].target, requests[r].target_true))
        logits = row_logits(model, tokenizer(prompt)["input_ids"])[-1]
        found.append(float(logits[new] - logits[old]))
    return np.asarray(found)


def scaled(model, result, step):
    down = model.params["blocks"]["down"]
    w = down["w"].at[2].add(step * result.patch.deltas[2].dense())
    return model.with_params(model.params | {"blocks": model.params["blocks"] | {"down": down | {"w": w}}})


def test_bounds_are_of_the_edit(edit):
    """α is what the edit adds to values; gaps and their changes are those of whole models; the derivative is that of
    finite differences."""
    model, tokenizer, stats, requests, result, bounds, _ = edit
    with jax.enable_x64(True):
        keys = result.keys[2]
        a = 30.0 * np.asarray(stats[2].matrix, np.float64)
        operator = np.linalg.solve(a + keys.T @ keys, keys.T)
        residuals = np.linalg.lstsq(operator, result.patch.deltas[2].dense(), rcond=None)[0]
        for i in range(0, len(bounds.prompts), 3):
            ids = tokenizer(bounds.prompts[i])["input_ids"]
            every = all_keys(model, ids, 2) @ operator
            at = every[:, bounds.request[i]].argmax()
            assert bounds.alpha[0, i] == pytest.approx(every[at, bounds.request[i]], rel=1e-7)
            assert bounds.tokens[i] == tokenizer.decode([ids[at]])
            sides = [subject_values(m, {2: all_keys(model, ids, 2)})[2] for m in (model, result.model)]
            np.testing.assert_allclose(sides[1] - sides[0], every @ residuals, atol=1e-9)
        own = bounds.rows("efficacy")
        assert bounds.at_subject[own].all() and (bounds.alpha[0, own] > 0.3).all()
        step = 1e-5
        low, base, high, after = (
            gaps(scaled(model, result, s), tokenizer, requests, bounds) for s in (-step, 0, step, 1)
        )
    np.testing.assert_allclose(bounds.gap, -base, atol=1e-9)
    np.testing.assert_allclose(bounds.change, after - base, atol=1e-9)
    np.testing.assert_allclose(bounds.linear, (high - low) / (2 * step), rtol=1e-5, atol=1e-6)


def test_the_direct_path_is_all_there_is_where_its_lemma_holds(edit):
    """One attention layer above the edit, whose weights do not change (uniform ones), and no MLP after the edit's."""
    model, tokenizer, stats, requests, result, bounds, _ = edit
    with jax.enable_x64(True):
        blocks = model.params["blocks"]
        only = jnp.arange(model.config.n_layer)[:, None, None] == 4
        above = jnp.arange(model.config.n_layer)[:, None, None] > 2
        changed = {
            "q": blocks["q"] | {"w": jnp.zeros_like(blocks["q"]["w"])},
            "o": blocks["o"] | {"w": jnp.where(above & ~only, 0, blocks["o"]["w"])},
            "down": blocks["down"] | {"w": jnp.where(above, 0, blocks["down"]["w"])},
        }
        simple = model.with_params(model.params | {"blocks": blocks | changed})
        found = edit_bounds(simple, result, tokenizer, requests, max_neighbours=1)
    assert np.abs(found.direct).max() > 1e-3
    np.testing.assert_allclose(found.direct, found.linear, rtol=1e-8, atol=1e-10)
    assert np.abs(bounds.direct - bounds.linear).max() > 1e-3


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gptj"])
def test_the_ceiling_bounds_what_one_token_says(goldens, name):
    with jax.enable_x64(True):
        model, tokenizer, _ = world(goldens, name)
        ids, draw = tokenizer("The mother tongue of Danielle Darrieux is")["input_ids"], np.random.default_rng(0)
        keys = np.delete(all_keys(model, ids, 2), 3, 0)
        left = draw.normal(size=(model.config.d_ff, 2))
        left = left - keys.T @ np.linalg.lstsq(keys.T, left, rcond=None)[0]  # that says nothing at the other tokens
        deltas = ((left, draw.normal(size=(2, model.config.d_model))),)
        tokens, pairs, at = np.asarray([ids]), np.asarray([[5, 9]]), np.asarray([3])
        found = key_paths.answers(model.params, model.config, tokens, np.ones_like(tokens), pairs, at, deltas, (2,))
    assert 1e-6 < abs(found.direct[0]) <= found.ceiling[0]


def test_verdicts_and_how_well_they_predict(edit):
    _, _, _, requests, _, bounds, report = edit
    assert (bounds.heard("gap") == (bounds.gap < 0)).all()
    own = bounds.rows("efficacy")
    np.testing.assert_allclose(bounds.margin()[own], (bounds.change - bounds.gap)[own], atol=1e-12)
    np.testing.assert_allclose(bounds.reach * bounds.alpha[0, own][bounds.request], bounds.alpha[0])
    for verdict in bounds.verdicts():
        mine = bounds.request == verdict.request
        wanted = mine & ~bounds.heard() & (np.asarray(bounds.kinds) == "paraphrase")
        assert verdict.misses == tuple(np.asarray(bounds.prompts)[wanted])
    for seen, record in zip(verdicts_found(bounds, report), report.records, strict=True):
        missed = [p.prompt for p in record.prompts if p.kind == "paraphrase" and p.edited.nll_new >= p.edited.nll_true]
        assert seen.request == record.index and seen.misses == tuple(missed)
    found = {(a.kind, a.by): a for a in agreement(bounds, report)}
    assert len(found) == 8
    for kind in ("paraphrase", "neighbourhood"):
        prompts = [p for r in report.records for p in r.prompts if p.kind == kind]
        heard = np.asarray([p.edited.nll_new < p.edited.nll_true for p in prompts])
        for by in ("gap", "reach", "direct", "linear"):
            score, margin = found[kind, by], bounds.margin(by)[bounds.rows(kind)]
            assert score.prompts == len(prompts) and score.heard == heard.mean()
            assert score.accuracy == ((margin > 0) == heard).mean()
            pairs = [(a > b) + (a == b) / 2 for a in margin[heard] for b in margin[~heard]]
            assert score.auc == pytest.approx(np.mean(pairs))
    left = [p.kind for r in report.records for p in r.prompts if p.base.nll_new > p.base.nll_true]
    assert all(a.prompts == left.count(a.kind) for a in agreement(bounds, report, undecided=True))
    with pytest.raises(JaxEditError, match="other prompts"):
        agreement(dataclasses.replace(bounds, prompts=bounds.prompts[::-1]), report)
    with pytest.raises(JaxEditError, match="by must be one of gap, reach"):
        bounds.margin("similarity")


def test_bounds_say_what_is_wrong(edit):
    model, tokenizer, _, requests, result, _, _ = edit
    blind = [dataclasses.replace(requests[0], target_true=None), dataclasses.replace(requests[1], target_true="x")]
    same = dataclasses.replace(requests[2], target_true=requests[2].target)
    with pytest.raises(RequestError) as caught:
        edit_bounds(model, result, tokenizer, [*blind, same], max_neighbours=0)
    assert any("has no target_true" in p for p in caught.value.problems)
    assert any("begins with the other" in p for p in caught.value.problems)
    with pytest.raises(JaxEditError, match="not what the last"):
        edit_bounds(model, dataclasses.replace(result, factor=None), tokenizer, requests)


def test_ranks():
    assert area_under_curve([1, 2, 3, 3], [False, True, False, True]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert np.isnan(area_under_curve([1, 2], [True, True]))
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 2, 4], [4, 1, 2, 0]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [4, 2, 3, 1])[0, 1]
    )


def test_values_grow_louder(edit):
    model, tokenizer, _, requests, result, _, _ = edit
    with jax.enable_x64(True):
        found = value_norms(model, result.model, tokenizer, requests, [2])
        for i, r in enumerate(requests[:3]):
            ids = tokenizer(r.prompt[: r.subject_start + len(r.subject)])["input_ids"]
            key = all_keys(model, ids, 2)[-1]
            for norms, m in zip(found, (model, result.model), strict=True):
                assert norms[2][i] == pytest.approx(
                    np.linalg.norm(key @ np.asarray(m.params["blocks"]["down"]["w"][2]))
                )
    assert (found.after[2] > found.before[2]).all()


def test_drawings(edit, tmp_path):
    _, _, _, _, _, bounds, report = edit
    draw = np.random.default_rng(0)
    groups = {"same": draw.normal(size=30) + 2, "random": draw.normal(size=50)}
    near = [[je.analysis.key_neighbours.Prefix(3.0, "of Rome", "Rome")], []]
    norms = je.analysis.keys.ValueNorms({1: np.ones(4), 2: np.ones(4)}, {1: np.full(4, 3.0), 2: np.full(4, 2.0)})
    drawn = [
        key_plots.plot_similarities(groups, "random", tmp_path / "a.png"),
        key_plots.plot_key_map({"clean": np.ones(5), "others": draw.normal(size=(9, 5))}, tmp_path / "b.png"),
        key_plots.plot_neighbours(near, np.asarray([5.0, 5.0]), [" Rome", "x"], tmp_path / "c.png"),
        key_plots.plot_value_norms(norms, tmp_path / "d.png"),
        key_plots.plot_bounds(bounds, agreement(bounds, report), tmp_path / "e.svg"),
    ]
    assert len(drawn) == len([p for p in tmp_path.iterdir() if p.stat().st_size > 1000]) == 5
