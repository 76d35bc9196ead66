"""Robustness: queries in other forms of a subject, and what edits say at them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_tiny
from helpers_adapters import logits, prompts_of, same_bits, with_adapters
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxedit as je
from jaxedit.adapters.apart import Apart
from jaxedit.adapters.rows import NOTHING
from jaxedit.analysis.robustness_plots import plot_robustness
from jaxedit.data.queries import HALVES, KINDS, read_rephrases, robust_queries
from jaxedit.data.subject_forms import rephrased_forms
from jaxedit.data.tokens import target_ids
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.robustness import CELLS, evaluate_robustness, robustness_table
from jaxedit.export.patch import Delta, add, apply_patch, make_patch, with_matrices
from jaxedit.models.transformer import Context, embed, run
from jaxedit.types import EditRequest

CORPUS = [" ".join(f"word{i} number {i * i}," for i in range(400))]
WORDS = st.sampled_from(["Ada", "Lovelace", "of", "Zoë", "Smith-Jones", "&", "and", "The", "(band)", "iPod", "Oslo,"])


def made(subject: str, before: str = "The home of", after: str = "is in") -> EditRequest:
    return EditRequest(f"{before} {subject} {after}", subject, "Oslo")


@settings(max_examples=25, deadline=None)
@given(
    subject=st.lists(WORDS, min_size=1, max_size=4).map(" ".join),
    before=st.sampled_from(["The home of", "See the", "A"]),
    n=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_queries(subject, before, n, seed):
    """Halves are disjoint, the first is the larger by at most one, and every prompt holds its form and nothing else."""
    tokenizer, request = load_tiny("tiny-llama")[1], made(subject, before)
    other = made("Paul of Tarsus")
    queries = robust_queries(tokenizer, [request, other], n=n, context_tokens=8, corpus=CORPUS, seed=seed)
    assert queries[0] == robust_queries(tokenizer, [request], n=n, context_tokens=8, corpus=CORPUS, seed=seed)[0]
    for kind in KINDS:
        inside, outside = (queries[0].texts(kind, half) for half in HALVES)
        assert len({*inside, *outside}) == len([*inside, *outside])
        assert kind == "long" or subject not in (*inside, *outside)
        assert len(inside) + len(outside) <= n and len(inside) - len(outside) in (0, 1)
        for half in HALVES:
            for text, found in zip(queries[0].texts(kind, half), queries[0].prompts(request, kind, half), strict=True):
                wanted = f"{text} {request.prompt}" if kind == "long" else f"{before} {text} is in"
                assert found.prompt == wanted and found.prompt[found.start : found.end + 1] == found.subject
                assert found.subject == (subject if kind == "long" else text)
                if kind == "rephrase" and before == "See the" and not subject.startswith("The"):
                    assert not text.startswith("the ")
                if kind == "shuffle":
                    assert sorted(text.replace(" ", "")) == sorted(subject.replace(" ", ""))
    assert sum(len(queries[0].texts("long", half)) for half in HALVES) == n
    used = [{x for q in queries for x in q.texts("long", half)} for half in HALVES]
    assert not used[0] & used[1]


def test_forms():
    assert rephrased_forms("Ada Lovelace") == {
        "possessive": "Ada Lovelace's",
        "article": "the Ada Lovelace",
        "initials": "A. Lovelace",
        "title": "Dr. Ada Lovelace",
        "last name": "Lovelace",
        "last name first": "Lovelace, Ada",
        "first name": "Ada L.",
        "professor": "Professor Ada Lovelace",
        "quoted": '"Ada Lovelace"',
        "capitals": "ADA LOVELACE",
        "lower case": "ada lovelace",
    }
    assert rephrased_forms("Universidad Autónoma de Madrid")["abbreviation"] == "UAM"
    found = rephrased_forms("Zoë & the Smith-Joneses (band)")
    assert (found["and"], found["spaced"]) == ("Zoë and the Smith-Joneses (band)", "Zoë & the Smith Joneses (band)")
    assert (found["plain"], found["short"]) == ("Zoe & the Smith-Joneses (band)", "Zoë & the Smith-Joneses")
    assert rephrased_forms("iPod").keys() == {"possessive", "article", "quoted", "capitals", "lower case"}


def test_given_rephrases(tiny, tmp_path):
    tokenizer = tiny("tiny-llama")[1]
    request = EditRequest("Ada Lovelace's husband is in", "Ada Lovelace", "Oslo")
    (path := tmp_path / "names.json").write_text(
        json.dumps({"Ada Lovelace": ["Ada", "Ada ", "", "Ada Lovelace", "AL"]})
    )
    names = read_rephrases(path)
    queries = robust_queries(tokenizer, [request], rephrases=names, n=4, context_tokens=8, corpus=CORPUS)[0]
    assert queries.texts("rephrase", "in_domain") == ("Ada",) and queries.texts("rephrase", "out_of_domain") == ("AL",)
    ruled = robust_queries(tokenizer, [request], n=20, context_tokens=8, corpus=CORPUS)[0].rephrase
    assert "Ada Lovelace's" not in (*ruled.in_domain, *ruled.out_of_domain) and len(ruled.in_domain) == 5
    with pytest.raises(JaxEditError, match="no rephrases of 1 subjects.*Paul"):
        robust_queries(tokenizer, [made("Paul")], rephrases=names, context_tokens=8, corpus=CORPUS)
    with pytest.raises(JaxEditError, match="10 contexts need 10"):
        robust_queries(tokenizer, [request], context_tokens=800, corpus=CORPUS)
    for text in ("[1]", '{"Ada": "Countess"}', "{"):
        path.write_text(text)
        with pytest.raises(JaxEditError, match="rephrases"):
            read_rephrases(path)


EDITS = 3


@pytest.fixture(scope="module")
def alone(goldens):
    """A float64 tiny-llama, and edits of it that were each made alone: the last layer's keys at the target's tokens are
    sent to their output rows, and something at random is added below."""
    with jax.enable_x64(True):
        model, tokenizer = je.load(goldens / "tiny-llama", dtype="float64")
        requests = je.read_requests(goldens / "tiny-llama" / "facts.json")[:EDITS]
        start = requests[0].prompt.index("field")  # one token
        requests[0] = dataclasses.replace(requests[0], subject="field", subject_start=start)
        rng, patches = np.random.default_rng(0), []
        weights, last = model.params["blocks"]["down"]["w"], model.config.n_layer - 1
        for i, request in enumerate(requests):
            ids, target = tokenizer(request.prompt)["input_ids"], target_ids(tokenizer, request.prompt, request.target)
            tokens = jnp.asarray([ids + target[:-1]])
            context = Context.of_mask(jnp.ones_like(tokens))
            h = embed(model.params, model.config, tokens, context)
            keys = run(model.params, model.config, h, context, 0, last + 1, probe=lambda x: x.key)[1]
            keys = np.asarray(keys[last, 0, len(ids) - 1 :])
            values = np.asarray(model.params["unembed"]["w"])[target]
            deltas = {last: Delta(np.linalg.pinv(keys), 10 * values / np.linalg.norm(values, axis=1, keepdims=True))}
            if i:
                some = rng.normal(size=(weights.shape[1], 3)), rng.normal(size=(3, weights.shape[2]))
                deltas[1] = Delta(some[0], 0.01 * some[1])
            patches.append(make_patch({}, [request], {l: np.asarray(weights[l]) for l in deltas}, deltas)[0])
        yield model, tokenizer, requests, patches


def test_apart_equals_models_edited_alone(alone):
    """Every row of one batch says what the model with its edit alone does."""
    model, tokenizer, requests, patches = alone
    rows, ends = prompts_of(tokenizer, [*requests, *requests[:2]])
    own = [0, 1, 2, 2, NOTHING]
    apart = Apart.of(patches)
    assert apart.left.shape[:3] == (EDITS, 2, model.config.d_ff) and apart.layers == (1, model.config.n_layer - 1)
    found = logits(with_adapters(model, apart.for_rows(own)), rows, ends)
    models = {i: apply_patch(model, patch) for i, patch in enumerate(patches)} | {NOTHING: model}
    for row, end, i, out in zip(rows, ends, own, found, strict=True):
        (wanted,) = logits(models[i], [row], [end], max(map(len, rows)))
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-11)
        assert i == NOTHING or np.abs(out - logits(model, [row], [end])[0]).max() > 1e-3
    others = logits(with_adapters(model, apart.for_rows([NOTHING] * len(rows))), rows, ends)
    assert same_bits(
        others, logits(with_adapters(model, Apart.of(patches[:1]).for_rows([NOTHING] * len(rows))), rows, ends)
    )
    with pytest.raises(JaxEditError, match="for_rows"):
        logits(with_adapters(model, apart), rows, ends)
    dense = dataclasses.replace(patches[1], deltas={1: Delta(patches[1].deltas[1].dense())})
    with pytest.raises(JaxEditError, match="patch 1 .* layers .1. are not in factors"):
        Apart.of([patches[0], dense])
    with pytest.raises(JaxEditError, match="no updates"):
        Apart.of([])


def naive(model, tokenizer, base, requests, queries, contexts):
    """Each query by itself, on the model of its request: one row, and its logits. By cell, a list for each request."""
    found = {cell: [[] for _ in requests] for cell in CELLS}

    def best(one, prompt, answer):
        head, tail = tokenizer(prompt)["input_ids"], target_ids(tokenizer, prompt, answer)
        (out,) = logits(one, [head + tail[:-1]], [len(head) - 1], 64)
        return out[len(head) - 1 :].argmax(-1), np.asarray(tail)

    for i, (request, some) in enumerate(zip(requests, queries, strict=True)):
        before, after = request.prompt[: request.subject_start], request.prompt[request.subject_start :]
        after = after[len(request.subject) :]
        texts = {"success": [request.prompt]}
        for half in HALVES:
            texts[f"rephrase_{half}"] = [before + x + after for x in getattr(some.rephrase, half)]
            texts[f"shuffle_{half}"] = [before + x + after for x in getattr(some.shuffle, half)]
            texts[f"long_{half}"] = [f"{x} {request.prompt}" for x in getattr(some.long, half)][:contexts]
        for cell, prompts in texts.items():
            found[cell][i] = [float(all(np.equal(*best(model(i), p, request.target)))) for p in prompts]
        for p in request.neighbourhood:
            sides = (best(one, p, request.target_true)[0] for one in (base, model(i)))
            found["locality"][i].append(float(np.mean(np.equal(*sides))))
    return {cell: tuple(map(tuple, some)) for cell, some in found.items()}


def test_evaluation_equals_a_loop(alone, tmp_path):
    """Edits apart in one model, a list of models, and all edits in one model, against row by row."""
    base, tokenizer, requests, patches = alone
    queries = robust_queries(tokenizer, requests, n=4, context_tokens=16, seed=1)
    models = [apply_patch(base, patch) for patch in patches]
    wanted = naive(models.__getitem__, tokenizer, base, requests, queries, 1)
    apart = with_adapters(base, Apart.of(patches))
    arguments = (tokenizer, requests, queries)
    report = evaluate_robustness(base, apart, *arguments, max_contexts=1)
    assert report.found == wanted == evaluate_robustness(base, models, *arguments, max_contexts=1).found
    rates, counts = report.rates, report.counts
    assert rates["success"] == 1 and 0 < rates["rephrase_in_domain"] < 1 and 0 < rates["locality"] < 1
    assert counts["shuffle_in_domain"] == 2 * (EDITS - 1) and wanted["shuffle_in_domain"][0] == ()
    assert (counts["long_in_domain"], counts["success"]) == (EDITS, EDITS)
    assert rates["rephrase_in_domain"] == np.mean(np.concatenate(wanted["rephrase_in_domain"]))
    hits = np.concatenate(wanted["long_in_domain"])
    assert np.isclose(report.errors["long_in_domain"], hits.std(ddof=1) / np.sqrt(EDITS))
    every = base
    for patch in patches:
        weights = every.params["blocks"]["down"]["w"]
        every = with_matrices(every, {l: add(np.asarray(weights[l]), d) for l, d in patch.deltas.items()})
    together = evaluate_robustness(base, every, *arguments)
    assert together.found == naive(lambda i: every, tokenizer, base, requests, queries, None) != wanted
    with pytest.raises(JaxEditError, match="not asked the same queries"):
        robustness_table({"alone": report, "together": together})
    table = robustness_table({"alone": report, "again": report}).splitlines()
    assert len(table) == 4 and table[1].split()[:2] == ["alone", "100.0"] and table[3].split()[1] == str(EDITS)
    assert json.loads(json.dumps(report.to_dict()))["counts"] == counts
    assert plot_robustness({"alone": report, "together": together}, tmp_path / "bars.png").stat().st_size > 1000
    with pytest.raises(JaxEditError, match="3 requests .* do not go with .'queries': 2, 'models': 3"):
        evaluate_robustness(base, models, tokenizer, requests, queries[:2])
