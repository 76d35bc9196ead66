"""How REP's adaptors are trained: the texts, the keys read from them, and the steps. See `jaxedit.adapters.rep`.

A layer's keys do not depend on its own adaptors. So a text is run once up to the layer, only the keys are kept, and all
steps are products of small matrices, for many edits at once. For a higher layer the texts' states go on from there,
with the adaptors below in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxedit.adapters.rep_adaptors import Adaptor, RepState, opens
from jaxedit.analysis.keys import subject_tokens
from jaxedit.data.queries import RobustQueries
from jaxedit.data.subject_forms import SubjectPrompt, names_in
from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, pad, row_length
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Context, Decoder, Params, embed, layer, run, to_key, window_of

if TYPE_CHECKING:
    from jaxedit.adapters.rep import Rep

_BATCH_TOKENS = 8192
LOSSES = ("alignment", "consistency", "negative", "positive")


def training_prompts(prompt: SubjectPrompt, queries: RobustQueries, templates: Sequence[str]) -> list[SubjectPrompt]:
    """The prompt as it is; then in each of the other `templates`, after each long context of the domain, and with each
    other form of the subject in each template. templates: "{}" first."""
    long, *forms = (queries.prompts(prompt, kind, "in_domain") for kind in ("long", "rephrase", "shuffle"))
    others = [other for some in forms for other in some]
    return [
        *(in_template(prompt, template) for template in templates),
        *long,
        *(in_template(other, template) for other in others for template in templates),
    ]


def in_template(prompt: SubjectPrompt, template: str) -> SubjectPrompt:
    """A prompt in a template that holds one "{}"."""
    before, after = template.split("{}")
    return SubjectPrompt(before + prompt.prompt + after, prompt.subject, len(before) + (prompt.start or 0))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What n edits read and train on.

    texts: tokens up to the one whose key is read. owner: int ``[texts]``, the edit of each; bare: bool ``[texts]``,
    whether its key is read without adaptors below. As indices of texts: pool ``[n, steps, batch]``; clean ``[n]``;
    other ``[n, m]``, where gates are to be closed (`elsewhere`), -1 beyond them; and anchors ``[n, templates]``, the
    prompt in every template, or ``[n, 0]`` where that is not asked for.
    """

    texts: list[tuple[int, ...]]
    owner: np.ndarray
    bare: np.ndarray
    pool: np.ndarray
    clean: np.ndarray
    other: np.ndarray
    anchors: np.ndarray


def make_plan(
    settings: Rep,
    tokenizer,
    prompts: Sequence[SubjectPrompt],
    queries: Sequence[RobustQueries],
    templates: Sequence[str],
    seeds: Sequence[tuple[int, int]],
    anchored: bool,
) -> Plan:
    """Draw each edit's texts, with its own of `seeds`: its pool in an order of its own, and again, a batch a step. Only
    texts that are drawn are read. Raises JaxEditError where an edit has nothing to train on."""
    texts: list[tuple[int, ...]] = []
    owner, bare, pools, clean, others, anchors = [], [], [], [], [], []

    def read(rows) -> np.ndarray:
        texts.extend(rows)
        return np.arange(len(texts) - len(rows), len(texts))

    for i, (prompt, some, seed) in enumerate(zip(prompts, queries, seeds, strict=True)):
        every, start = training_prompts(prompt, some, templates), len(texts)
        if len(every) == 1:
            raise JaxEditError(f"subject {prompt.subject!r} has no other texts to train on: no queries, no prefixes")
        rng = np.random.default_rng(seed)
        order = drawn(rng, len(every) - 1, settings.steps * settings.batch) + 1
        once = dict.fromkeys([0, *order.tolist()])
        place = dict(zip(once, read([subject_tokens(tokenizer, every[at]) for at in once]), strict=True))
        clean.append(place[0])
        pools.append([place[at] for at in order.tolist()])
        others.append(read(elsewhere(tokenizer, prompt, some, settings.other_names, rng)))
        bare += [False] * (len(texts) - start)
        anchors.append(read([subject_tokens(tokenizer, in_template(prompt, t)) for t in templates if anchored]))
        bare += [True] * len(anchors[-1])
        owner += [i] * (len(texts) - start)
    width = bucket(max(map(len, others)), MIN_LENGTH)
    other = np.stack([np.pad(some, (0, width - len(some)), constant_values=-1) for some in others])
    pool = np.asarray(pools).reshape(len(prompts), settings.steps, settings.batch)
    return Plan(texts, np.asarray(owner), np.asarray(bare), pool, np.asarray(clean), other, np.stack(anchors))


def elsewhere(
    tokenizer, prompt: SubjectPrompt, queries: RobustQueries, names: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """The prompt up to each of its tokens but the subject's last, and the same with other names in the subject's place,
    up to each token: as many as asked for, of those in the long contexts of the domain."""
    texts = queries.texts("long", "in_domain")
    found = list(dict.fromkeys(x for text in texts for x in names_in(text) if x not in prompt.prompt))
    taken = [found[i] for i in rng.permutation(len(found))[:names]]
    every = [tuple(encode(tokenizer, p.prompt)[0]) for p in (prompt, *map(prompt.with_subject, taken))]
    heads = dict.fromkeys(whole[:n] for whole in every for n in range(1, len(whole) + 1))
    del heads[subject_tokens(tokenizer, prompt)]
    return list(heads)


def drawn(rng: np.random.Generator, pool: int, count: int) -> np.ndarray:
    """int ``[count]``: the pool in an order of its own, and in another one when it is at its end."""
    return np.concatenate([rng.permutation(pool) for _ in range(-(-count // pool))])[:count]


class Part(NamedTuple):
    """Texts in one batch: the index of each row's, hidden states ``[b, s, d_model]``, mask, and parameters with what
    acts on these rows; and of all texts that rows begin with, reads: their indices, and at: where their last tokens are
    among all tokens."""

    index: list[int]
    h: jax.Array
    mask: np.ndarray
    params: Params
    reads: list[int]
    at: np.ndarray


def enter(model: Decoder, plan: Plan, with_rows: Callable[[np.ndarray], Params], first: int) -> list[Part]:
    """A plan's texts run up to layer `first`. with_rows: indices of texts in a batch -> the parameters for it."""
    rows, parts = _rows(plan), []
    for batch in batches([(row_length(len(plan.texts[some[0]])),) for some in rows], _BATCH_TOKENS):
        index = [some[0] for some in batch.take(rows)]
        tokens, mask = pad([plan.texts[i] for i in index], batch.shape[0])
        reads = [(i, len(plan.texts[i]) - 1 + r * batch.shape[0]) for r, n in enumerate(batch.index) for i in rows[n]]
        at = np.zeros(bucket(len(reads), MIN_LENGTH), np.int32)
        at[: len(reads)] = [place for _, place in reads]
        params = with_rows(np.asarray(index))
        h = _enter(params, model.config, tokens, mask, first)
        parts.append(Part(index[: len(batch.index)], h, mask, params, [i for i, _ in reads], at))
    return parts


def _rows(plan: Plan) -> list[list[int]]:
    """The texts to run, each in front of those of the same edit that it begins with and that are read alike."""
    rows, before = [], None
    every = zip(plan.owner.tolist(), plan.bare.tolist(), plan.texts, range(len(plan.texts)), strict=True)
    for one in sorted(every, reverse=True):  # a text stands right behind those that begin with it
        if before is not None and before[:2] == one[:2] and before[2][: len(one[2])] == one[2]:
            rows[-1].append(one[3])
        else:
            rows.append([one[3]])
            before = one
    return rows


def keys_at(parts: Sequence[Part], config: ModelConfig, index: int, n: int) -> np.ndarray:
    """Keys ``[n, d_ff]`` of layer `index`, which the parts' states enter, at the last token of each of n texts; float32
    (float64)."""
    found = np.zeros((n, config.d_ff), wide(parts[0].h.dtype))
    for part in parts:
        keys = _keys(part.params, config, part.h, part.mask, part.at, index)
        found[part.reads] = np.asarray(keys)[: len(part.reads)]
    return found


def go_on(parts: Sequence[Part], config: ModelConfig, state: RepState, rows: np.ndarray, stop: int) -> list[Part]:
    """The parts run from the layer of `state`, with its adaptors in place, to layer `stop`. rows: of each text, the
    edit whose adaptor acts on it, or -1."""
    (start,), made = state.layers, []
    for part in parts:
        mine = np.full(len(part.h), -1, np.int32)
        mine[: len(part.index)] = rows[part.index]
        adapters = (*part.params.get("adapters", ()), state.for_rows(mine))
        h = _run(part.params | {"adapters": adapters}, config, part.h, part.mask, start, stop)
        made.append(part._replace(h=h))
    return made


@partial(jax.jit, static_argnames=("config", "first"))
def _enter(params: Params, config: ModelConfig, tokens, mask, first: int):
    context = Context.of_mask(mask)
    return run(params, config, embed(params, config, tokens, context), context, 0, first)


@partial(jax.jit, static_argnames=("config", "index"))
def _keys(params: Params, config: ModelConfig, h, mask, at, index: int):
    _, key, _, _ = to_key(layer(params, index), config, h, Context.of_mask(mask), window_of(config, index))
    return key.reshape(-1, key.shape[-1])[at].astype(wide(key.dtype))


@partial(jax.jit, static_argnames=("config", "start", "stop"))
def _run(params: Params, config: ModelConfig, h, mask, start: int, stop: int):
    return run(params, config, h, Context.of_mask(mask), start, stop)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """What n edits are trained on in one layer: keys, and a direction.

    pool ``[n, steps, batch, d_ff]``; clean ``[n, d_ff]``, of the prompt as it is; target ``[n, d_ff]``, of length 1;
    other ``[n, m, d_ff]``, of the prompt's other tokens, where real ``[n, m]`` is 1.
    """

    pool: Any
    clean: Any
    target: Any
    other: Any
    real: Any


@partial(jax.jit, static_argnames=("width", "rank"))
def initial(keys: jax.Array, like: jax.Array, width: int, rank: int) -> Adaptor:
    """An adaptor for each random key ``[n]``, for keys like ``[…, d_ff]``: uniform within ``1/sqrt(inputs)``, and the
    projection's second matrix 0."""
    d, dtype = like.shape[-1], like.dtype

    def one(key):
        def uniform(i, shape, inputs):
            return jax.random.uniform(jax.random.fold_in(key, i), shape, dtype, -(inputs**-0.5), inputs**-0.5)

        return Adaptor(
            down=uniform(0, (rank, d), d),
            up=jnp.zeros((d, rank), dtype),
            into=uniform(1, (width, d), d),
            bias=uniform(2, (width,), d),
            out=uniform(3, (width,), width),
            shift=uniform(4, (), width),
        )

    return jax.vmap(one)(keys)


class Rates(NamedTuple):
    """Numbers of `Rep` for which nothing is compiled anew."""

    lr: Any
    dropout: Any
    consistency: Any
    negative: Any
    positive: Any

    @classmethod
    def of(cls, settings: Rep, dtype) -> Rates:
        return cls(*(jnp.asarray(getattr(settings, name), dtype) for name in cls._fields))


def losses(response: bool, adaptor: Adaptor, dropout, pool, clean, target, other, real, key):
    """The four terms ``[4]`` of one edit (see `LOSSES`). response: whether the first is the one of that name, see
    `Rep`. pool ``[batch, d_ff]``, other ``[m, d_ff]``; key: of the dropout."""
    rows = jnp.concatenate([pool, clean[None]])
    kept = jax.random.bernoulli(key, 1 - dropout, rows.shape)
    entered = jnp.where(kept, rows / (1 - dropout), 0)
    gates = adaptor.gate(rows)
    moved = rows + jax.nn.sigmoid(gates)[:, None] * adaptor.projection(entered)
    shut = jax.nn.softplus(adaptor.gate(other)) * real
    alignment = -cosine(moved[:-1], target).mean()
    if response:
        heard = jnp.matmul(moved[:-1], target, precision="highest") / jnp.matmul(clean, target, precision="highest")
        alignment = jnp.mean((heard - 1) ** 2)
    return jnp.stack(
        [
            alignment,
            jnp.mean((moved[-1] - clean) ** 2),
            shut.sum() / jnp.maximum(real.sum(), 1),
            jax.nn.softplus(-gates[:-1]).mean(),
        ]
    )


def cosine(keys, target):
    """Of keys ``[…, d_ff]`` with a direction of length 1."""
    return jnp.matmul(keys, target, precision="highest") / jnp.linalg.norm(keys, axis=-1)


@partial(jax.jit, static_argnames=("response",))
def train(
    rates: Rates, start: Adaptor, keys: Keys, random: jax.Array, response: bool = False
) -> tuple[Adaptor, jax.Array]:
    """Adam's steps for n edits at once. random ``[n]``: of the dropout; response: see `losses`. Returns the adaptors,
    and the four terms before each step ``[n, steps, 4]``. Float32 (float64)."""
    weights = jnp.stack([jnp.ones_like(rates.lr), rates.consistency, rates.negative, rates.positive])
    rule = optax.adam(rates.lr)

    def total(adaptors, pool, random):
        each = jax.vmap(partial(losses, response), in_axes=(0, None, *[0] * 6))(
            adaptors, rates.dropout, pool, keys.clean, keys.target, keys.other, keys.real, random
        )
        return jnp.sum(each @ weights), each

    def step(carry, now):
        adaptors, moments = carry
        number, pool = now
        fresh = jax.vmap(lambda key: jax.random.fold_in(key, number))(random)
        grad, each = jax.grad(total, has_aux=True)(adaptors, pool, fresh)
        change, moments = rule.update(grad, moments, adaptors)
        adaptors = jax.tree.map(jnp.add, adaptors, change)
        return (adaptors, moments), each

    pools = jnp.moveaxis(keys.pool, 1, 0)
    (made, _), log = lax.scan(step, (start, rule.init(start)), (jnp.arange(len(pools)), pools))
    return made, jnp.moveaxis(log, 0, 1)


@jax.jit
def outcome(tau, adaptors: Adaptor, keys: Keys) -> jax.Array:
    """``[n, 4]`` of n edits, as they act: the mean cosine of the pool's keys with the target before and after; the
    share of their gates that are open; and how far the clean key is moved, relative to it."""

    def one(adaptor: Adaptor, pool, clean, target):
        rows = jnp.concatenate([pool.reshape(-1, pool.shape[-1]), clean[None]])
        is_open = opens(adaptor.gate(rows), tau)
        moved = jnp.where(is_open[:, None], rows + adaptor.projection(rows), rows)
        drift = jnp.linalg.norm(moved[-1] - clean) / jnp.linalg.norm(clean)
        before, after = (cosine(x[:-1], target).mean() for x in (rows, moved))
        return jnp.stack([before, after, is_open[:-1].mean(), drift])

    return jax.vmap(one)(adaptors, keys.pool, keys.clean, keys.target)
