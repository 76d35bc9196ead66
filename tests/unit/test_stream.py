"""Streams of batches: what they leave behind, what they cost to compile, and the guard."""

import numpy as np
import pytest

import jaxedit as je
from jaxedit.config import AnchorConfig, BackwardSpread, ForwardReplay, NullSpace
from jaxedit.errors import JaxEditError
from jaxedit.targets.anchor import _optimise
from jaxedit.targets.anchor_room import Rooms, arrange

LAYERS = (1, 2)
TEXTS = ["The mother tongue of Danielle Darrieux is French, and she was born in Bordeaux.", "Paris is in France."] * 3


@pytest.fixture(scope="module")
def world(tiny, goldens):
    model, tokenizer = tiny("tiny-gpt2")
    moments = np.load(goldens / "tiny-gpt2" / "cov.npz")
    stats = je.SecondMoments.from_arrays({l: moments[f"cov_L{l}"] for l in LAYERS}, 19_200)
    return model, tokenizer, stats, je.read_requests(goldens / "tiny-gpt2" / "facts.json")


# Of one length, so that all batches are edited by one program
NAMES = ("Ann", "Bob", "Eve", "Tom", "Ida", "Max")
REQUESTS = [je.EditRequest.from_template("{} lives in", name, " Rome") for name in NAMES]
BATCHES = [REQUESTS[:3], REQUESTS[3:]]


def method(targets=None, **fields) -> je.Method:
    anchor = AnchorConfig(steps=6, lr=0.1, clamp=1.0)
    fields = {"solver": je.Ridge(cov_weight=30.0), "anchor": anchor, "layers": LAYERS} | fields
    return je.Method(name="test", targets=targets or ForwardReplay(), **fields)


def matrices(model) -> np.ndarray:
    return np.asarray(model.params["blocks"]["down"]["w"], np.float64)


@pytest.mark.parametrize(
    "fields",
    [{}, {"targets": BackwardSpread()}, {"solver": NullSpace(threshold=0.5, measure="relative", l2=0.5)}],
    ids=["fe", "memit", "alphaedit+fe"],
)
def test_a_stream_is_batch_after_batch(world, fields):
    model, tokenizer, stats, _ = world
    batches = BATCHES
    common = {"stats": stats, "templates": ["{}"]}
    stream = je.edit_stream(model, tokenizer, iter(batches), method(**fields), **common)
    now = model
    for batch in batches:
        now = je.apply_edits(now, tokenizer, batch, method(**fields), **common)
    change = np.linalg.norm(matrices(now.model) - matrices(model))
    assert np.linalg.norm(matrices(stream.last.model) - matrices(now.model)) <= 1e-4 * change
    assert np.linalg.norm(matrices(stream.model) - matrices(stream.last.model)) <= 1e-5 * change
    assert [s.edits for s in stream.steps] == [3, 6] and not stream.stopped
    assert stream.steps[-1].perplexity is None
    for l in LAYERS:
        assert stream.last.keys[l].shape == (6, 192)
        expected = np.linalg.norm(matrices(stream.model)[l] - matrices(model)[l]) / np.linalg.norm(matrices(model)[l])
        np.testing.assert_allclose(stream.steps[-1].updates[l], expected, rtol=1e-4)
    # one patch for all of it, which can be taken back
    assert len(stream.patch.requests) == 6
    np.testing.assert_array_equal(matrices(je.apply_patch(model, stream.patch)), matrices(stream.model))
    np.testing.assert_array_equal(matrices(je.withdraw_patch(stream.model, stream.patch)), matrices(model))


def test_batches_of_other_sizes_use_programs_that_are_there(world):
    """A batch has a program, the first one that does not fit another with room to spare, and that is it."""
    model, tokenizer, stats, requests = world
    _optimise.clear_cache()
    batches = [requests[i : i + 2] for i in range(0, 8, 2)]
    je.edit_stream(model, tokenizer, batches, method(), stats=stats, templates=["{}"])
    assert _optimise._cache_size() <= 3


def test_room_is_for_everything_in_a_bucket(world):
    from jaxedit.data.tokens import CLEAN, validate

    model, tokenizer, _, requests = world
    edits = validate(tokenizer, requests, CLEAN, 512)
    settings, rooms = AnchorConfig(), Rooms()
    some = [edits[i:j] for i in range(9) for j in (i + 1, i + 2, 9) if j <= 9]

    def rooms_of():
        found = []
        for batch in some:
            (alone,) = arrange(model.params, model.config, batch, 1, settings)
            (room,) = arrange(model.params, model.config, batch, 1, settings, rooms)
            assert room.members == alone.members and room.held == room.sizes.lanes
            assert all(a >= b for a, b in zip((*room.shape, *room.sizes), (*alone.shape, *alone.sizes), strict=True))
            assert room.sizes.tokens <= max(8, 1.5 * alone.sizes.tokens + 4)  # a long batch is no burden for short ones
            found.append((room.shape, room.sizes))
        return found

    rooms_of()
    settled = rooms_of()
    assert settled == rooms_of() and len(set(settled)) == len({sizes.tokens for _, sizes in settled}) < len(some) / 2


def test_the_guard_measures_and_warns(world):
    model, tokenizer, stats, requests = world
    guard = je.CollapseGuard(texts=TEXTS, every=2, max_ratio=1.0001, max_update=1e-6)
    seen = []
    with pytest.warns(UserWarning, match=r"batch 0, after 3 edits: .*times the norm of its matrix"):
        stream = je.edit_stream(
            model,
            tokenizer,
            BATCHES,
            method(),
            stats=stats,
            templates=["{}"],
            guard=guard,
            on_step=lambda step, result: seen.append((step, result)),
        )
    first, second = stream.steps
    assert first.perplexity is not None and second.perplexity is None
    base = je.perplexity(model, tokenizer, TEXTS).corpus
    edited = je.perplexity(seen[0][1].model, tokenizer, TEXTS).corpus
    np.testing.assert_allclose(first.perplexity, edited, rtol=1e-5)
    np.testing.assert_allclose(first.ratio, edited / base, rtol=1e-5)
    assert [s for s, _ in seen] == list(stream.steps) and not stream.stopped


def test_the_guard_stops_before_the_batch_that_crosses_a_limit(world):
    model, tokenizer, stats, requests = world
    common = {"stats": stats, "templates": ["{}"]}
    free = je.edit_stream(model, tokenizer, BATCHES, method(), **common)
    first, second = (max(s.updates.values()) for s in free.steps)
    guard = je.CollapseGuard(texts=TEXTS, max_ratio=1e9, max_update=(first + second) / 2, stop=True)
    with pytest.warns(UserWarning, match="batch 1, after 6 edits"):
        stream = je.edit_stream(model, tokenizer, BATCHES, method(), guard=guard, **common)
    assert stream.stopped and len(stream.steps) == 2 and len(stream.patch.requests) == 3
    alone = je.apply_edits(model, tokenizer, BATCHES[0], method(), **common)
    np.testing.assert_array_equal(matrices(stream.model), matrices(alone.model))
    tight = je.CollapseGuard(texts=TEXTS, max_update=first / 2, stop=True)
    with pytest.warns(UserWarning), pytest.raises(JaxEditError, match="nothing was edited: the first batch crossed"):
        je.edit_stream(model, tokenizer, BATCHES[:1], method(), guard=tight, **common)
    with pytest.raises(JaxEditError, match="there are no batches"):
        je.edit_stream(model, tokenizer, [], method(), **common)


@pytest.mark.parametrize("fields", [{"every": 0}, {"max_ratio": 1.0}, {"max_update": 0.0}, {"max_tokens": 1}])
def test_bad_guards_are_refused(fields):
    with pytest.raises(JaxEditError, match=f"CollapseGuard.*{next(iter(fields))}"):
        je.CollapseGuard(**fields)
