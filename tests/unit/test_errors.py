"""Bad input to `apply_edits`: the message says what is wrong and where, and nothing is changed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxedit as je
from jaxedit.models.conversion import flatten
from jaxedit.models.fingerprint import fingerprint

LAYERS = (1, 2)
GOOD = je.EditRequest("The capital of France is", "France", "Rome")
OTHER = je.EditRequest("The river of Spain is", "Spain", "Rhine", id="river")


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(400, 192))
    return je.SecondMoments.from_arrays({l: keys.T @ keys / 400 for l in LAYERS}, 400)


@pytest.fixture
def attempt(tiny, stats, monkeypatch):
    """Calls `apply_edits` on tiny-llama and returns the error; checks that nothing was computed or changed."""
    import jaxedit.edit
    from jaxedit.targets import strategies

    model, tokenizer = tiny("tiny-llama")

    def never(*_, **__):
        raise AssertionError("work was done before the input was checked")

    monkeypatch.setattr(strategies, "find_anchors_resumable", never)
    monkeypatch.setattr(jaxedit.edit, "second_moments", never)
    monkeypatch.setattr(jaxedit.edit, "sample_templates", never)

    def call(requests=(GOOD,), method="fe", kind=je.JaxEditError, **changes) -> str:
        arguments = {"layers": LAYERS, "stats": stats, "templates": ["{}"]} | changes
        on, speaks = arguments.pop("model", model), arguments.pop("tokenizer", tokenizer)
        before = {path: np.asarray(x).tobytes() for path, x in flatten(model.params).items()}
        kept = [m.matrix.copy() for m in stats.values()]
        with pytest.raises(kind) as caught:
            je.apply_edits(on, speaks, requests, method, **arguments)
        assert issubclass(caught.type, je.JaxEditError)
        after = {path: np.asarray(x).tobytes() for path, x in flatten(model.params).items()}
        assert after == before
        assert all((a == m.matrix).all() for a, m in zip(kept, stats.values(), strict=True))
        return str(caught.value)

    return call


def test_the_good_request_is_good(tiny, stats):
    """What the other tests spoil one thing of."""
    model, tokenizer = tiny("tiny-llama")
    before = fingerprint(model.params, model.config, 6, edited=True)
    quick = dataclasses.replace(
        je.method_for("fe", model.config, LAYERS), anchor=je.AnchorConfig(steps=2), solver=je.Ridge(cov_weight=1.0)
    )
    result = je.apply_edits(model, tokenizer, [GOOD, OTHER], quick, stats=stats, templates=["{}"])
    assert fingerprint(result.model.params, model.config, 6, edited=True) != before
    assert fingerprint(model.params, model.config, 6, edited=True) == before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            je.EditRequest("The capital of France is", "Spain", "Rome"),
            "request 1: subject 'Spain' does not occur in prompt 'The capital of France is'",
        ),
        (
            je.EditRequest("The capital of France is", "Spain", "Rome", id="x7"),
            "request 1 (id x7): subject 'Spain' does not occur",
        ),
        (je.EditRequest("The city of Rome is", "Rome", ""), "request 1: target is empty"),
        (je.EditRequest("The city of Rome is", "Rome", " \n"), "request 1: target is empty"),
        (je.EditRequest("The city of Rome is", "", "big"), "request 1: subject is empty"),
        (je.EditRequest("The city of Rome is", " ", "big"), "request 1: subject is empty"),
        (
            je.EditRequest("The city of Rome is", "Rome", "big", subject_start=3),
            "request 1: subject 'Rome' does not occur",
        ),
        (GOOD, "request 1 repeats request 0: 'The capital of France is' -> 'Rome'"),
        (dataclasses.replace(GOOD, target=" Rome "), "request 1 repeats request 0"),
        (
            dataclasses.replace(GOOD, target="Oslo"),
            "requests 0 and 1 contradict each other: 'The capital of France is' -> 'Rome' and 'Oslo'",
        ),
        (
            je.EditRequest("The " + "very " * 140 + "old Rome is", "Rome", "big"),
            "request 1: prompt and target have",
        ),
    ],
)
def test_bad_requests(attempt, request_, message):
    assert message in attempt([GOOD, request_], kind=je.RequestError)


def test_target_without_tokens(attempt, tiny):
    """A tokenizer that drops control characters leaves nothing of this target."""
    _, tokenizer = tiny("tiny-llama")

    class Dropping:
        is_fast = True
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            kept = text[:-2] if text.endswith(" \u200b") else "" if text == "\u200b" else text
            return tokenizer(kept, **options)

    bad = je.EditRequest("The city of Rome is", "Rome", "\u200b", id=4)
    message = attempt([GOOD, bad], kind=je.RequestError, tokenizer=Dropping())
    assert "request 1 (id 4): target '\\u200b' has no tokens" in message


def test_prompt_beyond_the_context_in_a_template(attempt):
    long = ["{}", "so " * 140 + "it is. {}"]
    assert "request 0: prompt and target have" in attempt([GOOD], kind=je.RequestError, templates=long)


def test_all_problems_at_once(attempt):
    requests = [
        GOOD,
        je.EditRequest("The capital of France is", "Spain", "Rome"),
        OTHER,
        dataclasses.replace(OTHER, target="Elbe", id=None),
        je.EditRequest("The city of Oslo is", "Oslo", "", id="o"),
    ]
    message = attempt(requests, kind=je.RequestError)
    for part in (
        "request 1: subject 'Spain' does not occur",
        "requests 2 and 3 contradict each other",
        "request 4 (id o): target is empty",
    ):
        assert part in message
    assert "request 1 repeats request 0" in message
    assert message.startswith("4 problems in the edit requests:")
    assert message.count("\n  - ") == 4


def test_no_requests(attempt):
    assert "there are no edit requests" in attempt([], kind=je.RequestError)


def test_no_tokenizer(attempt):
    assert "without a tokenizer" in attempt(tokenizer=None)


@pytest.mark.parametrize(("field", "value"), [("prompt", 3), ("subject", None), ("target", ["Rome"])])
def test_fields_that_are_no_text(field, value):
    values = {"prompt": "Rome is", "subject": "Rome", "target": "big"} | {field: value}
    with pytest.raises(je.RequestError, match=f"field '{field}' is {type(value).__name__}, expected text"):
        je.EditRequest(**values)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 6), "layers [6] are out of range: the model has layers 0 to 5"),
        ((7, 9), "layers [7, 9] are out of range"),
        ((-1, 2), "not negative, and in rising order, got (-1, 2)"),
        ((2, 1), "rising order, got (2, 1)"),
        ((1, 1), "layers must be different"),
        ((), "layers must be different"),
    ],
)
@pytest.mark.parametrize("as_method", [False, True])
def test_bad_layers(attempt, tiny, layers, message, as_method):
    model, _ = tiny("tiny-llama")
    method = je.method_for("memit", model.config, (0, 1)) if as_method else "memit"
    assert message in attempt(method=method, layers=layers)


def test_model_without_preset(attempt):
    message = attempt(layers=None)
    assert "no preset for this llama model (6 layers, d_model 64)" in message
    assert "layers=" in message


@pytest.mark.parametrize("method", ["rome2", "FE", ""])
def test_unknown_method(attempt, method):
    message = attempt(method=method)
    assert f"unknown method {method!r}" in message
    assert all(name in message for name in je.METHODS)


def test_method_of_another_type(attempt):
    assert "must be a name or a Method, an editor or a fine-tuning, got int" in attempt(method=3)


def test_model_of_another_type(attempt):
    assert "model must be a Decoder" in attempt(model={"params": 1})


# Statistics


def test_statistics_of_another_model(attempt, tiny, goldens):
    """Real statistics of tiny-gpt2, whose keys have as many channels as those of tiny-llama."""
    other, _ = tiny("tiny-gpt2")
    with np.load(goldens / "tiny-gpt2" / "cov.npz") as moments:
        matrices = {l: moments[f"cov_L{l}"] for l in LAYERS}
    mark = fingerprint(other.params, other.config, LAYERS[-1] + 1, edited=False)
    wrong = je.SecondMoments.from_arrays(matrices, 19_200, fingerprint=mark)
    wrong.check(other)
    assert "computed on other weights" in attempt(stats=wrong, kind=je.StatisticsError)


def test_statistics_of_another_width(attempt):
    wrong = je.SecondMoments.from_arrays({l: np.eye(256) for l in LAYERS}, 1000)
    message = attempt(stats=wrong, kind=je.StatisticsError)
    assert "keys of 256 channels; the model has 192" in message


def test_statistics_of_other_layers(attempt, stats):
    few = je.SecondMoments({1: stats[1]})
    assert "no second moments of layer 2, only of layers [1]" in attempt(stats=few, kind=je.StatisticsError)
    deep = je.SecondMoments.from_arrays({l: stats[1].matrix for l in (1, 2, 9)}, 400)
    assert "layer 9; the model has 6" in attempt(stats=deep, kind=je.StatisticsError)


def test_nan_in_statistics(stats):
    broken = stats[2].matrix.copy()
    broken[3, 5] = np.nan
    with pytest.raises(je.StatisticsError, match=r"layer 2: not a second moment: .*NaN"):
        je.SecondMoments.from_arrays({1: stats[1].matrix, 2: broken}, 400)


def test_too_few_tokens(attempt):
    keys = np.random.default_rng(0).normal(size=(50, 192))
    few = je.SecondMoments.from_arrays({l: keys.T @ keys / 50 for l in LAYERS}, 50)
    message = attempt(stats=few, kind=je.StatisticsError)
    assert "not positive definite at layers [1, 2]" in message
    assert "{1: 50, 2: 50}" in message
    assert "d_ff 192" in message


def test_factor_of_another_solver(attempt, stats):
    factor = je.factorise(je.Ridge(cov_weight=2.0), stats, LAYERS)
    assert "factor was made for another solver or other layers" in attempt(factor=factor)
    short = je.factorise(je.Ridge(), stats, LAYERS[:1])
    assert "factor was made for another solver or other layers" in attempt(factor=short)


# Targets and templates


@pytest.mark.parametrize(
    ("values", "layers", "message"),
    [
        (np.zeros((2, 1, 65)), LAYERS, "targets of layer 1 have shape (1, 65), expected (1, 64)"),
        (np.zeros((2, 3, 64)), LAYERS, "targets of layer 1 have shape (3, 64), expected (1, 64)"),
        (np.zeros((2, 1, 64)), (2, 3), "layer 1 is not among them"),
        (np.full((2, 1, 64), np.nan), LAYERS, "targets of layer 1 hold NaN or infinity"),
    ],
)
def test_targets_that_do_not_fit(attempt, values, layers, message):
    assert message in attempt(targets=je.Targets(layers, values))


def test_replayed_keys_need_targets_with_keys(attempt, tiny):
    model, _ = tiny("tiny-llama")
    method = dataclasses.replace(je.method_for("fe", model.config, LAYERS), keys="replayed")
    assert "these hold no keys" in attempt(method=method, targets=je.Targets(LAYERS, np.zeros((2, 1, 64))))


def test_targets_of_the_wrong_rank():
    with pytest.raises(je.JaxEditError, match=r"must have shape \[2 layers, n, d_model\], got \(3, 1, 64\)"):
        je.Targets(LAYERS, np.zeros((3, 1, 64)))


@pytest.mark.parametrize(
    ("templates", "message"),
    [(["{}", "nothing"], "nothing"), (["A. {}"], "must be the clean prompt"), ("{}", "list of texts")],
)
def test_bad_templates(attempt, templates, message):
    assert message in attempt(templates=templates)


# Settings


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: je.Ridge(cov_weight=-1), "Ridge.cov_weight"),
        (lambda: je.Ridge(l2=-1e-3), "Ridge.l2"),
        (lambda: je.Ridge(cov_weight=float("nan")), "Ridge.cov_weight"),
        (lambda: je.Ridge(cov_weight=0), "cov_weight > 0"),
        (lambda: je.AnchorConfig(kl_weight=-1), "AnchorConfig.kl_weight"),
        (lambda: je.AnchorConfig(weight_decay=-0.1), "AnchorConfig.weight_decay"),
        (lambda: je.AnchorConfig(lr=0), "AnchorConfig.lr"),
        (lambda: je.AnchorConfig(clamp=-2), "AnchorConfig.clamp"),
        (lambda: je.AnchorConfig(threshold=0), "AnchorConfig.threshold"),
        (lambda: je.AnchorConfig(steps=0), "steps"),
        (lambda: je.AnchorConfig(bucket_growth=0.5), "bucket_growth"),
        (lambda: je.AnchorConfig(resident_rounds=0), "resident_rounds"),
        (lambda: je.AnchorConfig(tokens_per_step=0), "AnchorConfig.tokens_per_step"),
        (lambda: je.BackwardSpread(divide="cube"), "BackwardSpread.divide"),
        (
            lambda: je.Method(name="x", targets=je.ForwardReplay(), layers=(1,), keys="old"),
            "'recomputed', 'replayed'",
        ),
        (lambda: je.Method(name="x", targets=je.BackwardSpread(), layers=(1,), keys="replayed"), "ForwardReplay"),
    ],
)
def test_bad_settings_are_refused_by_name(make, field):
    with pytest.raises(je.JaxEditError, match=field.replace(".", r"\.")):
        make()


@pytest.mark.parametrize("field", ["lr", "clamp", "threshold", "kl_weight", "weight_decay"])
def test_nan_settings_are_refused(field):
    with pytest.raises(je.JaxEditError, match=f"AnchorConfig.{field}"):
        je.AnchorConfig(**{field: float("nan")})


@pytest.mark.parametrize("call", [je.apply_edits, je.targets])
def test_both_verbs_check_requests(tiny, call):
    model, tokenizer = tiny("tiny-llama")
    bad = je.EditRequest("The capital of France is", "Spain", "Rome")
    with pytest.raises(je.RequestError, match="request 0: subject 'Spain'"):
        call(model, tokenizer, [bad], "fe", LAYERS, templates=["{}"])


def test_fingerprints_see_what_a_plain_sum_of_bits_would_not(tiny):
    """A matrix that is doubled, and an even number of signs that change."""
    model, _ = tiny("tiny-gpt2")
    marks = {fingerprint(model.params, model.config, 6, edited=True)}
    down = model.params["blocks"]["down"]
    signs = jnp.ones(down["w"].shape).at[0, 0, :2].set(-1)
    for changed in (2 * down["w"], signs * down["w"], down["w"][:, ::-1]):
        params = {**model.params, "blocks": {**model.params["blocks"], "down": {**down, "w": changed}}}
        marks.add(fingerprint(params, model.config, 6, edited=True))
    assert len(marks) == 4
