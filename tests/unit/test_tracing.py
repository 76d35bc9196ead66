"""Causal tracing against plain runs of the whole model in float64, and what is made of a trace."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxedit as je
from jaxedit.analysis import suggest, tracing
from jaxedit.analysis.record import KINDS, LAST, LAST_SUBJECT, ROLES, Trace, token_roles
from jaxedit.analysis.restoration import Prompts, restore, subject_noise
from jaxedit.analysis.suggest import candidates, objective, read_preset, suggest_layers, write_preset
from jaxedit.analysis.tracing import trace
from jaxedit.data.facts import Fact, facts_from_requests, read_known_facts
from jaxedit.evaluation.report import Report
from jaxedit.models.layers import activation, linear, norm
from jaxedit.models.transformer import Context, embed, from_key, layer, to_key, unembed, window_of

PROMPT = "The mother tongue of Danielle Darrieux is"


@pytest.fixture
def facts_of(goldens):
    return lambda name: facts_from_requests(je.read_requests(goldens / name / "facts.json"))


@partial(jax.jit, static_argnames=("config",))
def whole_run(params, config, h, context, put, clean):
    """Every layer for every token of ``h [m, s, d_model]``; where `put` ``[n_layer, 3, s]``, the clean run's value
    ``[n_layer, 3, s, d_model]`` of the hidden state, the MLP's and the attention's output.

    Returns the logits after the last token, and these values of the first row."""

    def block(h, here):
        l, put, clean = here
        put = put[:, None, :, None]
        p = layer(params, l)
        stream, key, _, _ = to_key(p, config, h, context, window_of(config, l))
        attended = jnp.where(put[2], clean[2], stream - h)
        stream = h + attended
        if config.parallel == "none":
            x = norm(stream, p["mlp_norm"], config)
            key = activation(linear(x, p["gate" if config.gated else "up"]), config.act)
            key = key * linear(x, p["up"]) if config.gated else key
        out = jnp.where(put[1], clean[1], from_key(p, config, stream, key) - stream)
        h = jnp.where(put[0], clean[0], stream + out)
        return h, jnp.stack([h[0], out[0], attended[0]])

    h, seen = jax.lax.scan(block, h, (jnp.arange(config.n_layer), put, clean))
    return unembed(params, config, h[:, -1]), seen


def reference(model, tokens, first, last, answer, number, sigma, samples, seed, window):
    """Chances and effects of one fact, by running the whole model for each token and layer."""
    params, config, s = model.params, model.config, len(tokens)
    noise = np.zeros((1 + samples, s, config.d_model))
    for i in range(first, last + 1):
        normal = subject_noise(jax.random.key(seed), number, i - first, samples, config.d_model)
        noise[1:, i] = sigma * np.asarray(normal, np.float64)
    context = Context.of_mask(np.ones((1 + samples, s), np.int32))
    h = embed(params, config, jnp.asarray([tokens] * (1 + samples)), context) + noise
    nothing = np.zeros((config.n_layer, 3, s), bool)

    def chances(put, clean):
        logits, seen = whole_run(params, config, h, context, put, clean)
        return np.asarray(jax.nn.softmax(logits)[:, answer]), seen

    before, clean = chances(nothing, np.zeros((config.n_layer, 3, s, config.d_model)))
    effects = {kind: np.zeros((config.n_layer, s)) for kind in KINDS}
    for k, kind in enumerate(("hidden", "mlp", "attention")):
        below, above = (0, 1) if kind == "hidden" else (window // 2, window - window // 2)
        for l, i in itertools.product(range(config.n_layer), range(s)):
            put = nothing.copy()
            put[max(0, l - below) : l + above, k, i] = True
            effects[kind][l, i] = (chances(put, clean)[0] - before)[1:].mean()
    return before, effects


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gptj"])
def test_effects_equal_running_the_whole_model(goldens, facts_of, monkeypatch, name):
    """Also in several groups, the last of them not full, and several plans each."""
    monkeypatch.setattr(tracing, "_RUN_TOKENS", 100)
    monkeypatch.setattr(tracing, "_CPU_TOKENS", 40)
    with jax.enable_x64(True):
        model, tokenizer = je.load(goldens / name, dtype="float64")
        found = trace(model, tokenizer, facts_of(name), samples=2, window=3, seed=5, max_facts=3)
        rows = [tokenizer(f.prompt)["input_ids"] for f in found.facts]
        table = np.asarray(model.params["embed"]["tokens"])
        subjects = [table[row[a : b + 1]] for row, (a, b) in zip(rows, found.subjects, strict=True)]
        sigma = 3 * np.concatenate(subjects).std()
        for i, (row, (a, b)) in enumerate(zip(rows, found.subjects, strict=True)):
            assert found.facts[i].subject in "".join(found.tokens[i][a : b + 1])
            answer = tokenizer(found.facts[i].prompt + found.answers[i])["input_ids"][len(row)]
            chances, effects = reference(model, row, a, b, answer, i, sigma, 2, 5, 3)
            np.testing.assert_allclose(found.clean[i], chances[0], atol=1e-10)
            np.testing.assert_allclose(found.corrupted[i], chances[1:].mean(), atol=1e-10)
            for kind in KINDS:
                np.testing.assert_allclose(found.grid(kind, i), effects[kind], atol=1e-10, err_msg=kind)
            assert max(np.abs(effects[kind]).max() for kind in KINDS) > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt_neox"])
def test_effects_with_windows_of_attention_and_further_norms(decoder, name):
    with jax.enable_x64(True):
        model = decoder(f"logits_only/{name}")
        model = model.with_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params))
        tokens = np.random.default_rng(0).integers(0, model.config.vocab, (2, 9)).astype(np.int32)
        ints = (np.asarray(x, np.int32) for x in ([9, 7], [1, 2], [3, 4], [5, 6], [0, 1]))
        prompts = Prompts(tokens, *ints)
        effects, chances = tracing._effects(model, prompts, KINDS, 2, 0.5, 2, 0, None)
        at = 0
        for i, (row, n) in enumerate(zip(tokens.tolist(), prompts.length, strict=True)):
            fixed = (prompts.first[i], prompts.last[i], prompts.answer[i], i, 0.5, 2, 0, 2)
            expected, grids = reference(model, row[:n], *fixed)
            np.testing.assert_allclose(chances[i], expected, rtol=1e-8)
            for kind in KINDS:
                scale = np.abs(grids[kind]).max()
                np.testing.assert_allclose(effects[kind][:, at : at + n] / scale, grids[kind] / scale, atol=1e-8)
            at += n


@pytest.fixture(scope="module")
def found(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    facts = facts_from_requests(je.read_requests(goldens / "tiny-llama" / "facts.json"))
    return trace(model, tokenizer, facts, samples=3, max_facts=4)


def test_last_layer(found):
    """After the last layer only the last token matters, and with it restored the answer is as likely as in the clean
    run; tokens before the subject are never changed."""
    for i, (first, _) in enumerate(found.subjects):
        grid = found.grid("hidden", i)
        np.testing.assert_allclose(grid[-1, -1], found.clean[i] - found.corrupted[i], atol=1e-6)
        np.testing.assert_allclose(grid[-1, :-1], 0, atol=1e-6)
        assert all((found.grid(kind, i)[:, :first] == 0).all() for kind in KINDS)


def test_all_that_was_corrupted_restored(tiny):
    """With noise on the prompt's last token alone, its hidden state after any layer brings the clean run back."""
    model, tokenizer = tiny("tiny-gpt2")
    attribute = je.generate(model, tokenizer, [PROMPT], 2)[0].removeprefix(PROMPT)
    found = trace(model, tokenizer, [Fact(PROMPT, "is", attribute)], kinds=("hidden",), samples=2)
    assert found.subjects.tolist() == [[len(found.tokens[0]) - 1] * 2]
    assert found.total_effect > 0.01
    np.testing.assert_allclose(found.grid("hidden", 0)[:, -1], found.total_effect, atol=1e-6)


def test_without_noise_there_are_no_effects(tiny, facts_of):
    """And one compiled program makes the restorations of all kinds and layers."""
    model, tokenizer = tiny("tiny-gptj")
    restore.clear_cache()
    found = trace(model, tokenizer, facts_of("tiny-gptj"), noise=0, samples=1, max_facts=2)
    np.testing.assert_allclose(found.clean, found.corrupted, atol=1e-6)
    assert all(np.abs(found.effects[kind]).max() < 1e-6 for kind in KINDS)
    assert restore._cache_size() == 1


def test_facts_that_are_not_known(tiny, found):
    model, tokenizer = tiny("tiny-llama")
    wrong = [dataclasses.replace(f, attribute="nonsense") for f in found.facts]
    some = trace(model, tokenizer, [wrong[0], found.facts[1]], kinds=("mlp",), samples=1)
    assert some.facts == found.facts[1:2] and some.unknown == (wrong[0],)
    with pytest.raises(je.JaxEditError, match="knows none of the 4 facts"):
        trace(model, tokenizer, wrong)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"window": 0}, {"noise": -1.0}, {"kinds": ("keys",)}])
def test_settings_out_of_range(tiny, found, settings):
    with pytest.raises(je.JaxEditError, match=next(iter(settings))):
        trace(*tiny("tiny-llama"), found.facts, **settings)


def test_prompts_that_do_not_fit_are_named(tiny):
    with pytest.raises(je.RequestError, match="fact 0 has .* tokens"):
        trace(*tiny("tiny-llama"), [Fact("Paris is " * 80, "Paris", "big")])


@pytest.mark.parametrize(
    "subject, length, expected",
    [
        ((1, 3), 7, [-1, 0, 1, 2, 3, 4, 5]),
        ((0, 0), 3, [2, 3, 5]),
        ((2, 2), 4, [-1, -1, 2, 5]),
        ((1, 2), 3, [-1, 0, 5]),
        ((0, 4), 7, [0, 1, 1, 1, 2, 3, 5]),
    ],
)
def test_token_roles(subject, length, expected):
    assert token_roles(*subject, length).tolist() == expected


def made_up(mlp, extra=()) -> Trace:
    """A trace with these MLP effects at the last subject token of one fact, and `extra` at those of further ones."""
    n = len(extra) + 1
    effects = np.zeros((len(mlp), 3 * n))
    effects[:, 1] = mlp
    for i, x in enumerate(extra):
        effects[:, 3 * i + 4] = x
    fact = Fact("a b c", "b", "d")
    words = (("a", " b", " c"),) * n
    one = np.full(n, 0.5)
    return Trace((fact,) * n, (), words, (" d",) * n, np.ones((n, 2), int), one, one / 2, {"mlp": effects}, {})


def test_averages_are_over_facts():
    average = made_up([1.0, 2.0, 4.0], extra=([3.0, 2.0, 0.0],)).average("mlp")
    np.testing.assert_allclose(average.mean[:, LAST_SUBJECT], [2, 2, 2])
    np.testing.assert_allclose(average.error[:, LAST_SUBJECT], [1, 0, 2])
    assert average.count.tolist() == [0, 0, 2, 0, 0, 2]
    assert np.isnan(average.mean[:, 0]).all() and (average.mean[:, LAST] == 0).all()
    assert np.isnan(made_up([1.0]).average("mlp").error).all()


def test_averages_of_a_role_take_a_facts_tokens_first():
    effects = {"mlp": np.asarray([[0.0, 1.0, 3.0, 0.0, 0.0, 6.0, 0.0]])}
    facts = (Fact("s t u v e", "s t u v", "x"), Fact("s", "s", "x"))
    subjects = np.asarray([[0, 3], [0, 0]])
    words = (("s", "t", "u", "v", "e"), ("s", "e"))
    trace = Trace(facts, (), words, ("x", "x"), subjects, np.ones(2), np.zeros(2), effects, {})
    mean, _, count = trace.average("mlp")
    assert mean[0].tolist()[:3] == [0.0, 2.0, 3.0] and count.tolist() == [1, 1, 2, 0, 0, 2]


@pytest.mark.parametrize(
    "mlp, count, layers",
    [
        ([9, 0, 0, 1, 2, 1, 0, 0, 0, 9], 3, (3, 4, 5)),  # neither the first layer nor the last
        ([0, 0, 5, 5, 5, 5, 0, 0, 0, 0], 2, (2, 3)),  # the lowest of equal ones
        ([0, 1, 2, 3, 4, 0], 5, (2, 3, 4)),  # at most half of the layers
        ([0, 0, 1], 5, (1,)),
        ([1, 2], 5, (0,)),
        ([1], 5, (0,)),
    ],
)
def test_suggested_layers(mlp, count, layers):
    assert suggest_layers(made_up(np.asarray(mlp, float)), count) == layers


def test_layers_cannot_be_suggested_without_mlp_effects(tiny):
    with pytest.raises(je.JaxEditError, match="no effects of kind 'mlp'"):
        suggest_layers(dataclasses.replace(made_up([1.0, 2.0]), effects={"hidden": np.zeros((2, 3))}))
    model, tokenizer = tiny("tiny-gpt2")
    attribute = je.generate(model, tokenizer, [PROMPT], 2)[0].removeprefix(PROMPT)
    with pytest.raises(je.JaxEditError, match=f"no traced fact has a {ROLES[LAST_SUBJECT]}"):
        suggest_layers(trace(model, tokenizer, [Fact(PROMPT, "is", attribute)], kinds=("mlp",), samples=1))


def test_a_trace_is_kept_whole(found, tmp_path):
    path = found.save(tmp_path / "trace.npz")
    again = Trace.load(path)
    for field in dataclasses.fields(Trace):
        mine, theirs = getattr(found, field.name), getattr(again, field.name)
        if field.name == "effects":
            assert mine.keys() == theirs.keys() and all((mine[k] == theirs[k]).all() for k in mine)
        else:
            assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs, field.name
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["facts"] == 4
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(je.JaxEditError, match="not a complete file"):
        Trace.load(path)
    with pytest.raises(je.JaxEditError, match="no trace at"):
        Trace.load(tmp_path / "nowhere.npz")


def test_plot(found, tmp_path):
    pytest.importorskip("matplotlib")
    from jaxedit.analysis.plots import plot_trace

    assert plot_trace(found, tmp_path / "trace.png", (1, 2)).read_bytes().startswith(b"\x89PNG")


KNOWN = {"known_id": 3, "subject": "Beats Music", "attribute": "Apple", "prompt": "Beats Music is owned by"}


def test_known_facts(tmp_path, goldens):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([KNOWN | {"template": "{} is", "prediction": " Apple", "relation_id": "P127"}]))
    assert read_known_facts(path) == [Fact("Beats Music is owned by", "Beats Music", "Apple", 0, 3)]
    lines = tmp_path / "facts.jsonl"
    lines.write_text("\n".join(json.dumps(KNOWN) for _ in range(2)) + "\n")
    assert len(read_known_facts(lines)) == 2
    requests = je.read_requests(goldens / "tiny-gpt2" / "facts.json")
    assert read_known_facts(goldens / "tiny-gpt2" / "facts.json") == facts_from_requests(requests)
    assert facts_from_requests(requests)[0].attribute == requests[0].target_true


def test_malformed_facts_are_all_named(tmp_path):
    path = tmp_path / "facts.json"
    bad = [{"prompt": "a b"}, {"attribute": ""}, {"subject": "Zebra"}, {"answer": "x"}]
    path.write_text(json.dumps([KNOWN, *(KNOWN | x for x in bad), 5, {"prompt": "a"}]))
    with pytest.raises(je.RequestError) as error:
        read_known_facts(path)
    assert [p.split(": ")[1] for p in error.value.problems] == [f"record {i}" for i in (1, 2, 3, 4, 5, 6, 6)]
    assert "'answer'" in error.value.problems[3]
    with pytest.raises(je.RequestError, match="no such file"):
        read_known_facts(tmp_path / "nowhere.json")
    with pytest.raises(je.RequestError, match="target_true"):
        facts_from_requests([je.EditRequest("a b", "a", "c")])


@pytest.mark.parametrize("method", je.METHODS)
def test_a_preset_is_read_as_it_was_written(tiny, tmp_path, method):
    model, _ = tiny("tiny-gpt2")
    made = je.method_for(method, model.config, (1, 2, 4))
    path = write_preset(tmp_path / "preset.json", model, made, {"score": 0.5})
    assert read_preset(path) == read_preset(path, model) == made
    assert json.loads(path.read_text())["validation"] == {"score": 0.5}


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("method", "solver", "kind"), "Trick", "method.solver.kind: 'Trick' is not known"),
        (("method", "targets", "kind"), "Ridge", "method.targets.kind: 'Ridge' is not known"),
        (("method", "solver", "strength"), 3, r"method.solver: unknown fields \['strength'\]"),
        (("method", "anchor", "steps"), 2.5, "method.anchor.steps: is 2.5, expected int"),
        (("method", "anchor", "lr"), "0.5", "method.anchor.lr: is '0.5', expected float"),
        (("method", "anchor", "lr"), -1, "AnchorConfig.lr must be positive"),
        (("method", "layers"), [1, "2"], r"method.layers\[1\]: is '2', expected int"),
        (("method", "layers"), None, "method.layers: is None, expected tuple"),
        (("extra",), 1, r"unknown fields \['extra'\]"),
        (("format",), "other", "its format is not"),
        (("model", "n_layer"), 7, "made for a model of shape"),
    ],
)
def test_presets_are_read_strictly(tiny, tmp_path, where, value, message):
    model, _ = tiny("tiny-gpt2")
    path = write_preset(tmp_path / "preset.json", model, je.method_for("fe", model.config, (1, 2)))
    content = json.loads(path.read_text())
    inner = content
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(je.JaxEditError, match=message):
        read_preset(path, model)


def test_incomplete_presets(tiny, tmp_path):
    model, _ = tiny("tiny-gpt2")
    path = write_preset(tmp_path / "preset.json", model, je.method_for("fe", model.config, (1, 2)))
    content = json.loads(path.read_text())
    del content["method"]["layers"]
    for text in (path.read_text()[:-9], json.dumps(content), "[]"):
        path.write_text(text)
        with pytest.raises(je.JaxEditError, match="not a (complete )?preset|method: not complete, there is no layers"):
            read_preset(path)
    with pytest.raises(je.JaxEditError, match="no preset at"):
        read_preset(tmp_path / "nowhere.json")


def test_candidates_hold_the_shipped_default(tiny):
    config = tiny("tiny-gpt2")[0].config
    tried = candidates("fe", config, (2, 3), (0.5, 0.1), (10.0, 15000.0))
    assert tried[0] == je.method_for("fe", config, (2, 3)) and len(tried) == len(set(tried)) == 4
    assert {(m.anchor.lr, m.solver.cov_weight) for m in tried} == {(a, b) for a in (0.5, 0.1) for b in (10.0, 15000.0)}
    known = dataclasses.replace(config, family="llama", n_layer=30, d_model=576, d_ff=1536)
    tried = candidates("fe", known, (9, 10), (0.1,), (10.0,))
    assert [m.layers for m in tried] == [(3, 4, 5, 6, 7), (9, 10)] and tried[0] == je.method_for("fe", known)


def test_tuning_finds_targets_once_a_learning_rate_and_picks_the_best(tiny, goldens, monkeypatch):
    model, tokenizer = tiny("tiny-gpt2")
    requests = je.read_requests(goldens / "tiny-gpt2" / "facts.json")[:2]
    stats = je.second_moments(model, tokenizer, None, (2, 3), max_tokens=2000, length=64, cache=False)
    method = je.method_for("fe", model.config, (2, 3))
    method = dataclasses.replace(method, anchor=je.AnchorConfig(steps=5))
    calls, find = [], suggest.find_targets
    monkeypatch.setattr(suggest, "find_targets", lambda *a: calls.append(a[3].anchor.lr) or find(*a))
    templates, weights = ["{}", "I know. {}"], (10.0, 15000.0)
    tuning = suggest.tune(
        model, tokenizer, requests, method, lrs=(0.1,), cov_weights=weights, stats=stats, templates=templates
    )
    assert sorted(calls) == [0.1, 0.5] and len(tuning.settings) == 3
    assert tuning.default.method == method
    assert tuning.best.score == max(s.score for s in tuning.settings) >= tuning.default.score
    edited = je.apply_edits(model, tokenizer, requests, tuning.best.method, stats=stats, templates=templates).model
    assert objective(je.evaluate(model, edited, tokenizer, requests)) == tuning.best.score


def test_objective_takes_accuracies_where_true_targets_are_not_known():
    def report(**known):
        names = [f"{k}_{m}" for k in ("efficacy", "paraphrase", "neighbourhood") for m in ("success", "accuracy")]
        specificity = {"kl": None, "top1": known.pop("top1", None)}
        return Report((), {}, dict.fromkeys(names) | known, specificity, {})

    assert objective(report(efficacy_success=1.0, efficacy_accuracy=0.5, paraphrase_success=0.5)) == pytest.approx(
        2 / 3
    )
    assert objective(report(efficacy_accuracy=1.0, paraphrase_accuracy=1.0, top1=0.25)) == pytest.approx(0.5)
    assert objective(report(efficacy_accuracy=0.0, top1=1.0)) == 0


def test_of_equal_scores_the_lowest_kl_wins_then_the_default(tiny):
    method = je.method_for("fe", tiny("tiny-gpt2")[0].config, (1, 2))

    def setting(score, kl, default=False):
        return suggest.Setting(method, default, score, kl, {})

    first, near, far = setting(0.5, 0.2, True), setting(0.5, 0.1), setting(0.5, 0.3)
    assert suggest.Tuning((first, far, near)).best is near
    assert suggest.Tuning((first, setting(0.5, 0.2))).best is first
