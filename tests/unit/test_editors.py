"""What all editors that add parameters have in common, on a model whose blocks are parallel (GPT-J)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_adapters import adapted_logits, greedy, logits, prompts_of, target_nll, with_adapters

from jaxedit.adapters.caching import CachingEditor
from jaxedit.adapters.editors import EDITORS, at_layers, editor_for
from jaxedit.adapters.grace import Grace
from jaxedit.adapters.ireva import IReVa
from jaxedit.adapters.melo import Melo
from jaxedit.adapters.wise import Wise
from jaxedit.data.requests import read_requests
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.generation import continue_rows
from jaxedit.evaluation.withdrawal import evaluate_withdrawal
from jaxedit.models.transformer import Context, embed, run, unembed

SETTINGS = {
    "ireva": IReVa(alpha=4.0),
    "cache": CachingEditor(radius=0.3),
    "grace": Grace(layers=(3,), radius=0.3, steps=8, lr=0.5, include_query=True),
    "melo": Melo(index=2, layers=(3, 5), radius=0.01, batch=1, steps=15, lr=0.03),
    "wise": Wise(
        layers=(3,),
        steps=8,
        lr=0.3,
        inside=4.0,
        outside=1.0,
        between=2.0,
        contexts=(),
        save_every=1,
        merge_every=2,
        merge="none",
    ),
}
every_editor = pytest.mark.parametrize("name", EDITORS)


@pytest.fixture(scope="module")
def host(tiny, goldens):
    model, tokenizer = tiny("tiny-gptj")
    return model, tokenizer, read_requests(goldens / "tiny-gptj" / "facts.json")[:3]


@pytest.fixture(scope="module")
def states(host):
    """The state of every editor, made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = SETTINGS[name].edit(*host)[0]
        return made[name]

    return of


@every_editor
def test_edits_are_held_until_they_are_withdrawn(host, states, name):
    """By their numbers, which are never used again."""
    state, (model, tokenizer, requests) = states(name), host
    left = state.without([1])
    assert state.edits().tolist() == [0, 1, 2] and left.edits().tolist() == [0, 2]
    assert left.without([2, 0]).edits().tolist() == [] and state.without([]).edits().tolist() == [0, 1, 2]
    for bad in (left, SETTINGS[name].empty(model)):
        with pytest.raises(JaxEditError, match="edits \\[1\\] are not held"):
            bad.without([1])
    again, _ = SETTINGS[name].edit(model, tokenizer, requests[1:2], state=left)
    assert again.edits().tolist() == [0, 2, 3] and int(again.given) == 4
    found = evaluate_withdrawal(with_adapters(model, left), tokenizer, requests)
    assert not found.retrieved[1] and found.retrieved[[0, 2]].all() and found.restored.all()


@every_editor
def test_rows_packed_padded_and_continued_are_rows_apart(host, states, name):
    """Two prompts with what follows them in one row; padding on the left; and generation with a cache."""
    model, tokenizer, requests = host
    mine = with_adapters(model, states(name))
    prompts, _ = prompts_of(tokenizer, requests)
    rows = [prompt + prompts[0][:3] for prompt in prompts[:2]]
    ends = [len(prompt) - 1 for prompt in prompts[:2]]
    apart, left = logits(mine, rows, ends, 24), logits(mine, rows, ends, 24, left=True)
    for one, other in zip(apart, left, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
    a, b = map(len, rows)
    tokens, segments = np.zeros((2, 1, 40), np.int32)
    tokens[0, : a + b], segments[0, : a + b] = rows[0] + rows[1], [1] * a + [2] * b
    positions = np.asarray([[*range(a), *range(b), *[0] * (40 - a - b)]])
    where = np.where(segments == 1, ends[0], a + ends[1])
    context = Context(jnp.asarray(positions), jnp.asarray(segments)).ending(where)
    packed = _logits(mine.params, mine.config, tokens, context)[0]
    for one, other in zip(apart, (packed[:a], packed[a : a + b]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)
    assert continue_rows(mine.params, mine.config, prompts, 3) == greedy(mine, prompts, 3)


def _logits(params, config, tokens, context):
    h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    return np.asarray(unembed(params, config, h))


@every_editor
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_latest_answer_counts(host, name, dtype):
    """The same prompt edited again, in a batch of another shape, which in bfloat16 leaves other keys: asked in either
    shape, the model says the new target."""
    model, tokenizer, requests = host
    model = model.with_params(jax.tree.map(lambda x: x.astype(dtype), model.params))
    settings = SETTINGS[name]
    if name == "wise":  # of several memories the one that moves a prompt further answers, old or new
        settings = dataclasses.replace(settings, save_every=9, merge_every=18)
    state, _ = settings.edit(model, tokenizer, requests)
    new = dataclasses.replace(requests[0], target=requests[1].target)
    assert new.target != requests[0].target
    state, _ = settings.edit(model, tokenizer, [new], state=state)
    assert 3 in state.edits()
    mine = with_adapters(model, state)
    for others in ([], requests[1:]):
        said = target_nll(mine, tokenizer, [new, *others])[0]
        assert said < target_nll(mine, tokenizer, [requests[0], *others])[0]
        assert name == "cache" or said < target_nll(model, tokenizer, [new, *others])[0]


@every_editor
def test_a_state_of_the_same_size_runs_the_same_program(host, states, name):
    model, tokenizer, requests = host
    rows, ends = prompts_of(tokenizer, requests)
    logits(with_adapters(model, states(name)), rows, ends)
    before = adapted_logits._cache_size()
    logits(with_adapters(model, states(name).without([1])), rows, ends)
    assert adapted_logits._cache_size() == before


@every_editor
def test_what_cannot_be_done_is_refused(host, states, name):
    model, tokenizer, requests = host
    settings, state = SETTINGS[name], states(name)
    with pytest.raises(JaxEditError, match="without adapters"):
        settings.edit(with_adapters(model, state), tokenizer, requests)
    with pytest.raises(JaxEditError, match="the state to go on from is a"):
        settings.edit(model, tokenizer, requests, state=states("grace" if name != "grace" else "cache"))
    with pytest.raises(RequestError, match="no edit requests"):
        settings.edit(model, tokenizer, [])
    with pytest.raises(RequestError, match="contradict"):
        settings.edit(model, tokenizer, [requests[0], dataclasses.replace(requests[0], target="no")])
    long = dataclasses.replace(requests[0], prompt="so " * 200 + requests[0].prompt, subject_start=None)
    with pytest.raises(RequestError, match="the model takes"):
        settings.edit(model, tokenizer, [requests[1], long])
    if name == "cache":
        with pytest.raises(JaxEditError, match="behind the last layer"):
            at_layers(settings, (1,))
    else:
        with pytest.raises(JaxEditError, match="layer"):
            at_layers(editor_for(name, model.config), (9,)).empty(model)


def test_targets_of_many_tokens_in_any_script(host):
    """Of texts that are stored or trained as they are: each is said whole."""
    model, tokenizer, requests = host
    new = [dataclasses.replace(requests[0], target="Übermut in Zürich – 東京の「古い町」で、と言った 😀")]
    rows, _ = prompts_of(tokenizer, new)
    target = tokenizer(" " + new[0].target)["input_ids"]
    assert len(target) > 30
    for name in ("cache", "ireva"):
        state, trace = SETTINGS[name].edit(model, tokenizer, new)
        assert trace["rows"].tolist() == [len(target)]
        mine = with_adapters(model, state)
        if name == "cache":
            assert continue_rows(mine.params, mine.config, rows, len(target)) == [target]
