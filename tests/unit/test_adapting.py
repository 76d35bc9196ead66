"""`apply_edits` and ledgers with editors that add parameters."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers_adapters import logits, prompts_of, same_bits, target_nll

import jaxedit as je
from jaxedit.adapters.attached import adapters_of, attach, detach, same
from jaxedit.adapters.caching import CachingEditor
from jaxedit.adapters.editors import EDITORS, describe_editor, editor_for, editor_from_plain
from jaxedit.adapters.grace import Grace
from jaxedit.adapters.ireva import IReVa
from jaxedit.config import AnchorConfig, ForwardReplay, Method, Ridge
from jaxedit.data.tokens import target_ids
from jaxedit.errors import JaxEditError, PatchError
from jaxedit.export.patch import with_matrices
from jaxedit.ledger import Ledger
from jaxedit.presets import TUNERS
from jaxedit.tuning.named import tuner_for

FEW = {"grace": {"steps": 3}, "melo": {"steps": 3}, "wise": {"steps": 3}, "cache": {"radius": 1.0}}
FE = Method(
    name="fe",
    targets=ForwardReplay(),
    layers=(1, 2),
    solver=Ridge(cov_weight=10.0),
    anchor=AnchorConfig(steps=2, lr=0.3),
)


@pytest.fixture(scope="module")
def host(tiny, goldens):
    model, tokenizer = tiny("tiny-llama")
    return model, tokenizer, je.read_requests(goldens / "tiny-llama" / "facts.json")[:4]


def editor(name, model):
    return dataclasses.replace(editor_for(name, model.config), **FEW.get(name, {}))


def said(model, tokenizer, requests):
    return logits(model, *prompts_of(tokenizer, requests))


def close(a, b):
    """The same up to rounding, which batches of other sizes do in another order."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("name", EDITORS)
def test_an_edit_its_patch_and_what_is_left_of_it(host, name, tmp_path):
    model, tokenizer, requests = host
    result = je.apply_edits(model, tokenizer, requests[:2], editor(name, model))
    assert result.info.name == name and result.info.layers == () and result.patch.layers == ()
    assert all(len(x) == 2 for x in result.info.trace.values())
    assert set(result.info.to_dict()["trace"]) == set(result.info.trace)
    patch = je.EditPatch.load(result.patch.save(tmp_path / "one.jaxedit"))
    assert editor_from_plain(patch.method) == editor(name, model)
    again = je.apply_patch(model, patch)
    assert same_bits(said(again, tokenizer, requests), said(result.model, tokenizer, requests))
    for back in (je.withdraw_patch(again, patch), detach(again)):
        assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
        assert same_bits(said(back, tokenizer, requests), said(model, tokenizer, requests))
    with pytest.raises(PatchError, match="does not have the patch's"):
        je.withdraw_patch(model, patch)


def test_probabilities_are_those_of_the_adapted_model(host):
    """Decisions at the end of the prompt, not of prompt and target."""
    model, tokenizer, requests = host
    result = je.apply_edits(model, tokenizer, requests, IReVa(theta=0.9, alpha=1.0))
    lengths = [len(target_ids(tokenizer, r.prompt, r.target)) for r in requests]
    for at, found in ((model, result.info.probability_before), (result.model, result.info.probability_after)):
        expected = np.exp(-target_nll(at, tokenizer, requests) * lengths)
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_going_on_is_editing_together(host):
    model, tokenizer, requests = host
    first = je.apply_edits(model, tokenizer, requests[:2], "ireva")
    both = je.apply_edits(first, tokenizer, requests[2:], "ireva")
    once = je.apply_edits(model, tokenizer, requests, "ireva")
    assert both.patch.requests == tuple(requests) and len(both.info.probability_after) == 2
    close(said(both.model, tokenizer, requests), said(once.model, tokenizer, requests))
    restored = je.withdraw_patch(both.model, both.patch)
    assert same_bits(said(restored, tokenizer, requests), said(model, tokenizer, requests))


def test_beside_weights_and_each_other(host):
    """FE's matrices, a cache and neurons together; each patch can be withdrawn while the others stay."""
    model, tokenizer, requests = host
    one = je.apply_edits(model, tokenizer, requests[:1], FE)
    two = je.apply_edits(one, tokenizer, requests[1:2], CachingEditor(radius=0.5))
    three = je.apply_edits(two, tokenizer, requests[2:], IReVa())
    assert [type(a).__name__ for a in adapters_of(three.model)] == ["Cache", "Neurons"]
    assert three.keys is one.keys and three.stats is one.stats
    without = je.withdraw_patch(three.model, two.patch)
    assert [type(a).__name__ for a in adapters_of(without)] == ["Neurons"]
    bare = je.withdraw_patch(je.withdraw_patch(without, three.patch), one.patch)
    assert same_bits(said(bare, tokenizer, requests), said(model, tokenizer, requests))


def test_what_does_not_go_together_is_refused(host, tmp_path):
    model, tokenizer, requests = host
    edited = je.apply_edits(model, tokenizer, requests[:1], CachingEditor(radius=1.0))
    for refused in (
        lambda: je.apply_edits(edited, tokenizer, requests[1:], FE),
        lambda: je.targets(edited.model, tokenizer, requests[1:], FE),
        lambda: je.second_moments(edited.model, tokenizer, ["some text"], (1,)),
        lambda: je.save(edited.model, tokenizer, tmp_path / "saved"),
        lambda: je.trace(edited.model, tokenizer, requests[1:]),
        lambda: je.Ledger.create(edited.model, tokenizer, "ireva"),
    ):
        with pytest.raises(JaxEditError, match="has adapters"):
            refused()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(JaxEditError, match="pass the EditResult"):
        je.apply_edits(edited.model, tokenizer, requests[1:], CachingEditor(radius=1.0))
    with pytest.raises(JaxEditError, match="leave out templates"):
        je.apply_edits(model, tokenizer, requests, "ireva", templates=("{}",))
    with pytest.raises(JaxEditError, match="did you mean 'ireva'"):
        je.apply_edits(model, tokenizer, requests, "iReva")
    with pytest.raises(JaxEditError, match="does not solve for weights"):
        je.walk(model, tokenizer, requests[:1], edited)


def test_a_patch_of_another_model_is_refused(host, tiny):
    model, tokenizer, requests = host
    patch = je.apply_edits(model, tokenizer, requests[:1], CachingEditor(radius=1.0)).patch
    with pytest.raises(PatchError, match="is for another one"):
        je.apply_patch(tiny("tiny-gptj")[0], patch)
    down = np.asarray(model.params["blocks"]["down"]["w"][0])
    with pytest.raises(PatchError, match="weights are not those"):
        je.apply_patch(with_matrices(model, {0: down * 2}), patch)


@pytest.mark.parametrize("name", TUNERS)
def test_fine_tuning(host, name, tmp_path):
    """An edit of weights like any other: reported, saved, applied, withdrawn."""
    model, tokenizer, requests = host
    settings = dataclasses.replace(tuner_for(name, model.config, (2,)), steps=3, lr=5e-3)
    result = je.apply_edits(model, tokenizer, requests, settings)
    assert result.info.name == name and result.patch.layers == (2,)
    assert result.info.probability_after.mean() > result.info.probability_before.mean()
    patch = je.EditPatch.load(result.patch.save(tmp_path / "one.jaxedit"))
    again = je.apply_patch(model, patch)
    assert same_bits(said(again, tokenizer, requests), said(result.model, tokenizer, requests))
    back = je.withdraw_patch(again, patch)
    assert same_bits(said(back, tokenizer, requests), said(model, tokenizer, requests))
    with pytest.raises(JaxEditError, match="one by one"):
        je.Ledger.create(model, tokenizer, name)
    with pytest.raises(JaxEditError, match="leave out templates"):
        je.apply_edits(model, tokenizer, requests, name, templates=("{}",))


def test_an_edit_with_rep(host, tmp_path):
    """Weights and adaptors in one patch; with all gates shut it is the host's edit."""
    model, tokenizer, requests = host
    plain = je.apply_edits(model, tokenizer, requests[:2], FE)
    queries = je.robust_queries(tokenizer, requests[:2], n=2, context_tokens=16)
    result = je.add_rep(plain, tokenizer, queries, je.Rep(steps=2, samples=1, prefixes=(5,)))
    (state,) = result.patch.adapters
    assert state.layers == FE.layers and result.info.trace["open"].shape == (2, 2)
    patch = je.EditPatch.load(result.patch.save(tmp_path / "one.jaxedit"))
    again = je.apply_patch(model, patch)
    assert same_bits(said(again, tokenizer, requests), said(result.model, tokenizer, requests))
    shut = attach(plain.model, dataclasses.replace(state, tau=1.0 + state.tau * 0))
    assert same_bits(said(shut, tokenizer, requests), said(plain.model, tokenizer, requests))
    back = je.withdraw_patch(again, patch)
    assert same_bits(said(back, tokenizer, requests), said(model, tokenizer, requests))
    with pytest.raises(JaxEditError, match="has adapters"):
        je.add_rep(result, tokenizer, queries)


def test_editors_as_plain_data(host):
    config = host[0].config
    for name in EDITORS:
        assert editor_from_plain(describe_editor(editor_for(name, config))) == editor_for(name, config)
    assert editor_from_plain({"name": "fe"}) is None
    with pytest.raises(JaxEditError, match="unknown fields"):
        editor_from_plain({"name": "ireva", "beta": 1})


@pytest.mark.parametrize("name", EDITORS)
def test_a_ledger(host, name, tmp_path):
    """Add, update, withdraw, save and read; what is left is the base, bit for bit, where all is withdrawn."""
    model, tokenizer, requests = host
    held = Ledger.create(model, tokenizer, editor(name, model)).add(requests)
    path = held.save(tmp_path / "facts.ledger")
    again = Ledger.load(path, model, tokenizer)
    assert again.method == held.method and list(again.list()) == list(held.list())
    assert same(again.state, held.state)
    ids = list(held.list())
    fewer = again.withdraw(ids[1])
    assert list(fewer.list()) == [ids[0], *ids[2:]]
    changed = fewer.update(ids[2], dataclasses.replace(requests[2], target=requests[0].target))
    assert changed.get(ids[2]).target == requests[0].target and list(changed.list()) == list(fewer.list())
    last = Ledger.load(changed.save(path), model, tokenizer)
    assert same(last.state, changed.state)
    assert len(last.result.info.probability_after) == 3 and last.patch.requests == tuple(last.list().values())
    assert same_bits(said(last.model, tokenizer, requests), said(last.result.model, tokenizer, requests))
    none = last.withdraw(list(last.list()))
    assert none.state is None and none.model is model


def test_a_ledger_of_neurons_is_editing_with_the_rest(host):
    """Where edits are made independently, withdrawing one is never having made it."""
    model, tokenizer, requests = host
    held = Ledger.create(model, tokenizer, IReVa()).add(requests)
    ids = list(held.list())
    left = held.withdraw([ids[0], ids[2]])
    fresh = je.apply_edits(model, tokenizer, [requests[1], requests[3]], IReVa())
    close(said(left.model, tokenizer, requests), said(fresh.model, tokenizer, requests))
    more = left.add(requests[:1])
    fresh = je.apply_edits(model, tokenizer, [requests[1], requests[3], requests[0]], IReVa())
    close(said(more.model, tokenizer, requests), said(fresh.model, tokenizer, requests))


def test_grace_with_other_settings_is_not_gone_on_with(host):
    model, tokenizer, requests = host
    first = je.apply_edits(model, tokenizer, requests[:1], Grace(steps=2))
    with pytest.raises(JaxEditError, match="to go on from"):
        je.apply_edits(first, tokenizer, requests[1:], Grace(steps=2), layers=(1,))
    assert same(adapters_of(attach(model, *adapters_of(first.model)))[0], adapters_of(first.model)[0])
