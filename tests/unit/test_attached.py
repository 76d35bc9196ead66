"""Models with adapters: attached, taken off, in patches, beside weight edits."""

import jax
import numpy as np
import pytest

import jaxedit as je
from jaxedit.adapters.attached import adapters_of, attach, detach, same
from jaxedit.adapters.caching import CachingEditor
from jaxedit.adapters.editors import EDITORS, editor_for
from jaxedit.errors import PatchError


@pytest.fixture(scope="module")
def host(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, je.read_requests(goldens / "tiny-llama" / "facts.json")[:2]


def patch_of(requests, *adapters):
    return je.EditPatch({"name": "test"}, tuple(requests), {}, {}, {}, {}, "float32", adapters)


@pytest.mark.parametrize("name", EDITORS)
def test_a_patch_keeps_an_adapter(host, name, tmp_path):
    """Saved, read, applied and withdrawn; the model without it is the host, bit for bit."""
    model, tokenizer, requests = host
    state, _ = editor_for(name, model.config).edit(model, tokenizer, requests)
    patch = patch_of(requests, state)
    again = je.EditPatch.load(patch.save(tmp_path / "one.jaxedit"))
    assert same(again.adapters[0], state)
    edited = je.apply_patch(model, again)
    assert all(map(same, adapters_of(edited), again.adapters)) and adapters_of(model) == ()
    tokens = np.asarray(tokenizer([requests[0].prompt])["input_ids"])
    assert np.array_equal(je.logits(edited, tokens), je.logits(attach(model, state), tokens))
    for back in (je.withdraw_patch(edited, again), detach(edited)):
        assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
        assert np.array_equal(je.logits(back, tokens), je.logits(model, tokens))
    with pytest.raises(PatchError, match="does not have the patch's"):
        je.withdraw_patch(model, again)


def test_adapters_stand_in_a_row(host):
    """Of two, one can be withdrawn; the other stays."""
    model, tokenizer, requests = host
    one, other = (CachingEditor(radius=1.0).edit(model, tokenizer, [r])[0] for r in requests)
    both = attach(attach(model, one), other)
    (left,) = adapters_of(je.withdraw_patch(both, patch_of(requests[:1], one)))
    assert same(left, other)
