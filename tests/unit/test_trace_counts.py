"""The anchor loop is compiled once for each shape of bucket, and never again for the same shapes."""

import pytest

from jaxedit.config import AnchorConfig
from jaxedit.data.tokens import CLEAN, edit_tokens
from jaxedit.targets.anchor import _optimise, find_anchors
from jaxedit.targets.anchor_plan import suffix_tokens
from jaxedit.targets.anchor_room import arrange
from jaxedit.types import EditRequest

SETTINGS = AnchorConfig(steps=2, bucket_growth=1.0, tokens_per_step=1)
# suffix lengths: after the subject "Paris" come few tokens, many, and few again
PROMPTS = ("Paris is", "Paris was", "Paris is the city in which one finds the many old works of the house of")


def edits_of(tokenizer, prompts, targets=("it", "in", "on")):
    return [edit_tokens(tokenizer, EditRequest(p, "Paris", t), CLEAN) for p, t in zip(prompts, targets, strict=False)]


@pytest.fixture
def model_and_tokenizer(tiny):
    _optimise.clear_cache()
    return tiny("tiny-gpt2")


def compiled():
    return _optimise._cache_size()


def test_one_compilation_a_bucket(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    edits = edits_of(tokenizer, PROMPTS)
    sizes = [suffix_tokens(e) for e in edits]
    made = arrange(model.params, model.config, edits, 4, SETTINGS)
    assert len(made) == len({(b.shape, b.sizes, b.held) for b in made}) == 2
    find_anchors(model.params, model.config, edits, 4, SETTINGS)
    assert compiled() == 2
    find_anchors(model.params, model.config, edits, 4, SETTINGS)
    assert compiled() == 2
    # other edits of the same shapes
    again = edits_of(tokenizer, (PROMPTS[1], PROMPTS[0], PROMPTS[2]), ("on", "it", "in"))
    assert [suffix_tokens(e) for e in again] == [sizes[1], sizes[0], sizes[2]]
    find_anchors(model.params, model.config, again, 4, SETTINGS)
    assert compiled() == 2


def test_other_weights_and_full_rounds_are_not_compiled_again(model_and_tokenizer):
    """Six edits in one lane, two of them on the device at a time: three rounds of one shape."""
    model, tokenizer = model_and_tokenizer
    edits = edits_of(tokenizer, [PROMPTS[0]] * 6, ["it", "in", "on", "it", "in", "on"])
    few = AnchorConfig(steps=2, tokens_per_step=suffix_tokens(edits[0]), resident_rounds=2)
    reports = []
    find_anchors(model.params, model.config, edits, 4, few, reports.append)
    assert reports == [2, 2, 2]
    assert compiled() == 1
    down = model.params["blocks"]["down"]
    changed = {**model.params, "blocks": {**model.params["blocks"], "down": {**down, "w": down["w"] * 1.01}}}
    find_anchors(changed, model.config, edits, 4, few)
    assert compiled() == 1


def test_settings_and_layer_are_part_of_the_program(model_and_tokenizer):
    """What makes another program is known, so that nobody compiles by accident."""
    model, tokenizer = model_and_tokenizer
    edits = edits_of(tokenizer, PROMPTS[:1])
    find_anchors(model.params, model.config, edits, 4, SETTINGS)
    find_anchors(model.params, model.config, edits, 3, SETTINGS)
    assert compiled() == 2


def test_rounds_of_unlike_edits_share_one_program(model_and_tokenizer):
    """Targets, prefixes and the last round differ in size; the bucket's shapes are the largest of each."""
    model, tokenizer = model_and_tokenizer
    far = "In the long history of the old world, as we know, Paris is"
    edits = edits_of(tokenizer, [PROMPTS[0], PROMPTS[0], far], ["it", "in", "on"])
    sizes = [suffix_tokens(e) for e in edits]
    settings = AnchorConfig(steps=2, tokens_per_step=max(sizes), resident_rounds=2)
    assert len(arrange(model.params, model.config, edits, 4, settings)) == 1
    assert len({sum(r.lookup for r in e.contexts) for e in edits}) == 2
    found = find_anchors(model.params, model.config, edits, 4, settings)
    assert compiled() == 1
    assert found.updates.shape == (3,) and (found.losses[:, 0, 0] > 0).all()


def test_edits_of_one_step_share_one_program(model_and_tokenizer):
    """Whatever their sizes: they lie end to end, so that a short one does not pay for a long one."""
    model, tokenizer = model_and_tokenizer
    edits = edits_of(tokenizer, PROMPTS)
    (bucket,) = arrange(model.params, model.config, edits, 4, AnchorConfig(steps=2, tokens_per_step=10_000))
    assert bucket.sizes.lanes == 3
    assert sum(map(suffix_tokens, edits)) <= bucket.sizes.tokens < sum(map(suffix_tokens, edits)) + 8
