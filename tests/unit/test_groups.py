"""Groups of edits: edit, keep and forget, jointly or summed, and the passes of methods that take several."""

import dataclasses

import numpy as np
import pytest

import jaxedit as je
from jaxedit.config import AnchorConfig, BackwardSpread, EqualityConstrained, ForwardReplay, NeuronSubset, PerLayer
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.edit import probabilities
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.passes import Clock, Passes
from jaxedit.targets.strategies import clean_states

LAYERS = (1, 2, 3)
ANCHOR = AnchorConfig(steps=4, lr=0.2, clamp=2.0)


@pytest.fixture(scope="module")
def world(tiny, goldens):
    """tiny-llama, its tokenizer, second moments, and requests of the records that all models recall."""
    model, tokenizer = tiny("tiny-llama")
    moments = np.load(goldens / "tiny-llama" / "cov.npz")
    stats = je.SecondMoments.from_arrays({l: moments[f"cov_L{l}"] for l in LAYERS}, 19_200)
    return model, tokenizer, stats, je.read_requests(goldens / "tiny-llama" / "facts.json")


def method(targets=None, cov_weight=30.0, **fields) -> je.Method:
    fields = {"solver": je.Ridge(cov_weight=cov_weight), "anchor": ANCHOR, "layers": LAYERS} | fields
    return je.Method(name="test", targets=targets or ForwardReplay(), **fields)


def made_up(model, n: int, layers=LAYERS) -> je.Targets:
    """Targets that nobody had to search for."""
    values = np.random.default_rng(n).normal(size=(len(layers), n, model.config.d_model))
    return je.Targets(layers, values)


def alike(*names: str) -> list[je.EditRequest]:
    """Requests of one length, for which one program is compiled."""
    return [je.EditRequest.from_template("{} lives in", name, " Rome") for name in names]


def matrices(model) -> np.ndarray:
    return np.asarray(model.params["blocks"]["down"]["w"], np.float64)


def difference(a, b, base) -> float:
    """Of two edited models, relative to what the second one's edit changed."""
    return float(np.linalg.norm(matrices(a) - matrices(b)) / np.linalg.norm(matrices(b) - matrices(base)))


def says(model, tokenizer, requests) -> np.ndarray:
    """Probability of each request's true target."""
    true = [dataclasses.replace(r, target=r.target_true) for r in requests]
    return probabilities(model.params, model.config, validate(tokenizer, true, CLEAN, model.config.max_positions))


@pytest.mark.parametrize("strategy", [ForwardReplay(), BackwardSpread(), PerLayer()])
def test_one_group_is_an_ordinary_edit(world, strategy):
    model, tokenizer, stats, requests = world
    common = {"method": method(strategy), "stats": stats, "templates": ["{}"]}
    plain = je.apply_edits(model, tokenizer, requests[:4], **common)
    for combine in ("joint", "sum"):
        grouped = je.apply_groups(model, tokenizer, [je.EditGroup(requests=requests[:4])], combine=combine, **common)
        np.testing.assert_array_equal(matrices(grouped.model), matrices(plain.model))
        assert grouped.patch.requests == plain.patch.requests


@pytest.mark.parametrize("strategy", [ForwardReplay(), BackwardSpread()])
def test_a_weight_is_that_many_equal_edits(world, strategy):
    """λC + w KᵀK: weight 3 for all and 3 λ for nothing else is the plain solve."""
    model, tokenizer, stats, requests = world
    group = je.EditGroup(requests=requests[:4], weight=3.0)
    common = {"stats": stats, "templates": ["{}"], "targets": made_up(model, 4)}
    plain = je.apply_edits(model, tokenizer, requests[:4], method(strategy), **common)
    weighted = je.apply_groups(model, tokenizer, [group], method(strategy, cov_weight=90.0), **common)
    assert difference(weighted.model, plain.model, model) <= 1e-5
    np.testing.assert_allclose(weighted.keys[1], np.sqrt(3) * plain.keys[1], rtol=1e-5)


def test_kept_facts_move_less_and_forgotten_ones_are_gone(world):
    model, tokenizer, stats, requests = world
    change, keep, forget = requests[:4], requests[8:16], requests[16:20]
    before = says(model, tokenizer, [*keep, *forget])
    assert before.min() > 0.3  # the model recalls all of them
    found = method(cov_weight=3.0, anchor=AnchorConfig(steps=25, lr=0.1, clamp=1.0, weight_decay=0.05))
    common = {"method": found, "stats": stats, "templates": ["{}"]}
    keep, forget = ([dataclasses.replace(r, target=r.target_true) for r in some] for some in (keep, forget))
    others = [je.EditGroup(requests=change), je.EditGroup(requests=forget, goal="forget")]
    together = je.apply_groups(
        model, tokenizer, [others[0], je.EditGroup(requests=keep, goal="keep", weight=10.0), others[1]], **common
    )
    assert len(together.info.probability_after) == 16
    assert together.info.probability_after[:4].mean() > 0.7
    assert together.info.probability_after[12:].max() < 0.2  # forgotten
    np.testing.assert_allclose(together.info.probability_before[4:], before, rtol=1e-4)
    without = je.apply_groups(model, tokenizer, others, **common)
    moved = np.abs(says(without.model, tokenizer, keep) - before[:8]).mean()
    assert np.abs(together.info.probability_after[4:12] - before[:8]).mean() < moved
    # what is held is the state at the decisive token; tokens after it see other things that were edited
    edits = validate(tokenizer, keep, CLEAN, model.config.max_positions)
    old, new = (clean_states(m.params, m.config, edits, LAYERS[-1:])[0] for m in (model, without.model))
    assert together.info.remaining[-1][4:12].mean() < np.linalg.norm(new - old, axis=1).mean() / 5
    assert np.isnan(together.info.final_loss[4:12]).all()  # nothing was optimised for what is kept
    assert not np.isnan(together.info.final_loss[[0, 3, 12, 15]]).any()
    assert (together.info.delta_norm[4:12] == 0).all()


def test_keep_with_per_layer_targets_holds_the_original_states(world):
    model, tokenizer, stats, requests = world
    keep = [dataclasses.replace(r, target=r.target_true) for r in requests[8:12]]
    groups = [je.EditGroup(requests=requests[:2]), je.EditGroup(requests=keep, goal="keep", weight=100.0)]
    edits = validate(tokenizer, [*requests[:2], *keep], CLEAN, model.config.max_positions)
    clean = clean_states(model.params, model.config, edits, (1, 3))
    shifted = clean[:1] + np.repeat([1.0, 0.0], [2, 4])[:, None]  # at layer 1; at layer 3 targets are found
    common = {"stats": stats, "templates": ["{}"], "targets": je.Targets((1,), shifted)}
    found = je.apply_groups(model, tokenizer, groups, method(PerLayer(), layers=(1, 3)), **common)
    np.testing.assert_allclose(found.targets.at(3)[2:], clean[1, 2:], rtol=1e-4, atol=1e-4)
    now = clean_states(found.model.params, model.config, edits, (3,))[0]
    assert np.linalg.norm(now - clean[1], axis=1)[2:].max() < np.linalg.norm(now - clean[1], axis=1)[:2].min() / 5


def test_the_sum_differs_from_the_joint_solve_and_by_how_much(world):
    """Both have the same targets; the joint one comes nearer to them, and the first layer says by how much."""
    model, tokenizer, stats, requests = world
    groups = [je.EditGroup(requests=requests[:6]), je.EditGroup(requests=requests[6:12])]
    common = {"method": method(layers=(2,), cov_weight=3.0), "stats": stats, "templates": ["{}"]}
    common["targets"] = made_up(model, 12, (2,))
    joint = je.apply_groups(model, tokenizer, groups, **common)
    summed = je.apply_groups(model, tokenizer, groups, combine="sum", **common)
    edits = validate(tokenizer, requests[:12], CLEAN, model.config.max_positions)
    now = clean_states(model.params, model.config, edits, (2,))[0]
    k, r = joint.keys[2].astype(np.float64), joint.targets.at(2) - now
    c = 3.0 * stats[2].matrix.astype(np.float64)
    parts = [np.linalg.solve(c + k[g].T @ k[g], k[g].T @ r[g]) for g in (slice(0, 6), slice(6, 12))]
    expected = np.linalg.solve(c + k.T @ k, k.T @ r)
    for found, delta in ((joint, expected), (summed, parts[0] + parts[1])):
        np.testing.assert_allclose(found.patch.deltas[2].dense(), delta, rtol=1e-3, atol=2e-3 * np.abs(delta).max())
    assert np.linalg.norm(k @ expected - r) < np.linalg.norm(k @ (parts[0] + parts[1]) - r)
    assert difference(summed.model, joint.model, model) > 0.02


def test_groups_with_moments_of_their_own(world, goldens):
    """Summed, each group has its own; jointly, they are pooled."""
    model, tokenizer, stats, requests = world
    other = je.SecondMoments.from_arrays(
        {l: 2.0 * stats[l].matrix + np.eye(192, dtype=np.float32) for l in LAYERS}, 4_800
    )
    first, second = requests[:3], requests[3:6]
    groups = [je.EditGroup(requests=first, stats=stats), je.EditGroup(requests=second, stats=other)]
    given = made_up(model, 6, (2,))
    common = {"method": method(layers=(2,)), "templates": ["{}"]}
    summed = je.apply_groups(model, tokenizer, groups, stats=stats, targets=given, combine="sum", **common)
    apart = [
        je.apply_edits(model, tokenizer, some, stats=s, targets=given.take(rows), **common)
        for some, s, rows in ((first, stats, range(3)), (second, other, range(3, 6)))
    ]
    expected = sum(result.patch.deltas[2].dense() for result in apart)
    np.testing.assert_allclose(summed.patch.deltas[2].dense(), expected, rtol=1e-3, atol=1e-5)
    joint = je.apply_groups(model, tokenizer, groups, targets=given, **common)
    pooled = je.apply_edits(model, tokenizer, requests[:6], stats=stats.merge(other), targets=given, **common)
    np.testing.assert_array_equal(matrices(joint.model), matrices(pooled.model))


def test_edits_made_one_at_a_time_are_a_sequence(world):
    """ROME's way: each edit's anchor is found, and its update solved, on the model that the one before left."""
    model, tokenizer, stats, _ = world
    requests = alike("Ann", "Bob", "Eve")
    rome = method(BackwardSpread(), solver=EqualityConstrained(), layers=(2,), at_once=1, protect=False)
    once = je.apply_edits(model, tokenizer, requests[:3], rome, stats=stats, templates=["{}"])
    now = model
    for request in requests[:3]:
        now = je.apply_edits(now, tokenizer, [request], rome, stats=stats, templates=["{}"])
    assert difference(once.model, now.model, model) <= 1e-5
    np.testing.assert_allclose(once.keys[2], now.keys[2], rtol=1e-4, atol=1e-5)
    assert once.info.remaining.shape == (2, 3) and once.targets.values.shape == (1, 3, model.config.d_model)
    restored = je.withdraw_patch(once.model, once.patch)
    np.testing.assert_array_equal(matrices(restored), matrices(model))
    protected = je.apply_edits(
        model, tokenizer, requests[:3], dataclasses.replace(rome, protect=True), stats=stats, templates=["{}"]
    )
    assert difference(protected.model, once.model, model) > 1e-3
    assert protected.factor[2].protected == 2


def test_rounds_go_on_with_the_edits_that_are_far_from_their_targets(world):
    model, tokenizer, stats, requests = world
    strategy = BackwardSpread()
    common = {"stats": stats, "templates": ["{}"], "targets": made_up(model, 6)}
    one = je.apply_edits(
        model,
        tokenizer,
        requests[:6],
        method(strategy, solver=NeuronSubset(cov_weight=30.0, share=1.0, rounds=1)),
        **common,
    )
    ridge = je.apply_edits(model, tokenizer, requests[:6], method(strategy), **common)
    assert difference(one.model, ridge.model, model) <= 1e-5  # all channels, all edits, one round: Ridge
    limit = float(np.sort(one.info.remaining[-1])[3])  # three are nearer than that
    solver = NeuronSubset(cov_weight=30.0, share=0.8, rounds=2, lower=limit)
    two = je.apply_edits(model, tokenizer, requests[:6], method(strategy, solver=solver), **common)
    assert two.info.remaining[-1].mean() < one.info.remaining[-1].mean()
    assert two.keys[1].shape == (6, 192)  # each edit's key once, though some were solved for twice
    with pytest.raises(JaxEditError, match="no edit has a residual between"):
        far = NeuronSubset(cov_weight=30.0, lower=1e6)
        je.apply_edits(model, tokenizer, requests[:6], method(strategy, solver=far), **common)


def test_passes_do_not_touch_the_base(world):
    model, *_ = world
    work = Passes(model, method(), (("{}",),), Clock())
    assert work._model() is model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: je.EditGroup(requests=[]), "needs requests"),
        (lambda r: je.EditGroup(requests=r, goal="erase"), "edit, keep, forget"),
        (lambda r: je.EditGroup(requests=r, weight=0), "weight must be positive"),
    ],
)
def test_bad_groups_are_refused(world, make, message):
    with pytest.raises(JaxEditError, match=message):
        make(world[3][:1])


def test_groups_that_contradict_each_other_are_refused(world):
    model, tokenizer, stats, requests = world
    groups = [je.EditGroup(requests=requests[:2]), je.EditGroup(requests=requests[:1], goal="forget")]
    with pytest.raises(RequestError, match="repeats request 0"):
        je.apply_groups(model, tokenizer, groups, method(), stats=stats, templates=["{}"])
    one_by_one = method(BackwardSpread(), at_once=1)
    with pytest.raises(JaxEditError, match="1 edit.* at a time, and groups are solved together"):
        keep = [groups[0], je.EditGroup(requests=requests[4:5], goal="keep")]
        je.apply_groups(model, tokenizer, keep, one_by_one, stats=stats, templates=["{}"])
    with pytest.raises(JaxEditError, match="'joint' or 'sum'"):
        je.apply_groups(model, tokenizer, groups[:1], method(), combine="product")
    with pytest.raises(JaxEditError, match="list of EditGroup"):
        je.apply_groups(model, tokenizer, requests[:2], method())
