"""REP, the robust edit pathway: beside an edit, an adaptor that leads other keys of its subject to the edit's key.

Yan et al., "Keys to Robust Edits: from Theoretical Insights to Practical Advances" (2025). A locate-then-edit update is
heard at a key k in proportion to ``kᵀC⁻¹k*``, and keys of the same subject in other words, in another order of its
tokens or after a long text are hardly like k*. After such an update, each edited layer gets an adaptor on the input of
the MLP's second projection, at every token:

    k' = k + [gate(k) > τ] B A k,    gate(k) = sigmoid(w₂ · gelu(W₁ k + c₁) + c₂),

trained with the gate itself in place of the bracket, on texts about the subject alone, without the edit's target:

    J = -mean cos(k', C⁻¹k*) + consistency · mean_D (k' - k)² at the prompt as it is,

which holds the edit itself in place. The cosine does not say how strongly the edit is heard at k': where it is heard
more than at the prompt, it is overdone. `Rep.objective` has a first term that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.rep_adaptors import Adaptor, RepState
from jaxedit.adapters.rep_training import (
    Keys,
    Plan,
    Rates,
    enter,
    go_on,
    initial,
    keys_at,
    make_plan,
    outcome,
    train,
)
from jaxedit.adapters.rows import append
from jaxedit.adapters.training import tokenised
from jaxedit.analysis.keys import checked_layers, solved, whitening
from jaxedit.config import _check, _check_choice
from jaxedit.data.queries import RobustQueries
from jaxedit.data.subject_forms import SubjectPrompt
from jaxedit.data.templates import sample_templates
from jaxedit.data.tokens import check_templates
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Decoder
from jaxedit.presets import preset_name
from jaxedit.solvers.factors import Factor
from jaxedit.statistics import SecondMoments
from jaxedit.types import EditRequest

_WORDS = 5  # words that sampled prefixes begin with

PRESETS: dict[str, dict[str, Any]] = {
    # chosen on 40 CounterFact facts
    "smollm2-135m": {
        "tau": 0.85,
        "lr": 2e-3,
        "objective": "response",
        "consistency": 100.0,
        "negative": 0.5,
        "positive": 0.3,
        "other_names": 16,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rep:
    """Settings; the defaults are those published for Llama-2-7B and Mistral-7B (d_ff 11008 and 14336).

    rank: of the projection. gate_width: of the gate's hidden layer, as a share of d_ff. tau: a gate above it is open.
    steps, lr: Adam's. batch: texts in a step, besides the prompt as it is. dropout: on the projection's input, in
    training alone.
    objective: "cosine", as published; or "response", the mean of ``(k'ᵀC⁻¹k* / kᵀC⁻¹k* - 1)²``, with the prompt's own
        key in the denominator: the edit is to be heard as strongly as there.
    consistency: weight of how far the prompt's own key is moved, a mean over channels of squares, so it depends on the
        scale of a model's keys.
    negative: weight of ``-log(1 - gate)``, mean over the prompt's tokens but the subject's last, and over those of the
        prompt with `other_names` names from the long contexts in the subject's place. positive: weight of
        ``-log(gate)``, mean over the texts trained on. Both are 0 as published, where nothing else keeps gates closed
        than how they begin, and in small models they open at other subjects too.
    prefixes: lengths in tokens of the texts that the model is sampled for, to put before prompts; samples: of each
    length, for each of the five words that they begin with.
    together: edits trained at once; bounds memory, and changes results by rounding only.
    """

    rank: int = 32
    gate_width: float = 0.1
    tau: float = 0.9
    steps: int = 10
    lr: float = 5e-4
    batch: int = 15
    dropout: float = 0.1
    objective: Literal["cosine", "response"] = "cosine"
    consistency: float = 50_000.0
    negative: float = 0.0
    positive: float = 0.0
    other_names: int = 0
    prefixes: tuple[int, ...] = (5, 10)
    samples: int = 2
    together: int = 32

    def __post_init__(self):
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        _check_choice(self, "objective", ("cosine", "response"))
        _check(self, positive=("lr",), not_negative=("consistency", "negative", "positive"), shares=("gate_width",))
        if not 0 <= self.tau <= 1 or not 0 <= self.dropout < 1:
            raise JaxEditError(
                f"Rep.tau is from 0 to 1, and dropout from 0 to below 1; got {self.tau} and {self.dropout}"
            )
        if min(self.rank, self.steps, self.batch, self.together) < 1 or min(self.samples, self.other_names) < 0:
            raise JaxEditError(
                "Rep.rank, steps, batch and together must be at least 1, samples and other_names not negative"
            )

    def width(self, config: ModelConfig) -> int:
        """Of the gate's hidden layer."""
        return max(1, int(self.gate_width * config.d_ff))

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        layers: Sequence[int],
        stats: SecondMoments | Factor,
        queries: Sequence[RobustQueries],
        keys: Mapping[int, np.ndarray] | None = None,
        templates: Sequence[str] | Sequence[Sequence[str]] | None = None,
        state: RepState | None = None,
        apart: Any = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[RepState, dict[str, np.ndarray]]:
        """Adaptors for edits that a model holds, each trained by itself, in the layers that hold them.

        model: the host, with the edits in its weights and without adapters; or with `apart`, an adapter such as
        `jaxedit.adapters.apart.Apart` that gives rows one edit each, numbered as this state's, the model without any.
        (In the lowest of the layers keys do not depend on that; so for one layer, model may also be the base.)
        stats: second moments of the keys at these layers, or what `jaxedit.analysis.keys.whitening` makes of them.
        queries: of each request; only what is in domain is read. keys: ``{layer: [n, d_ff]}``, the keys that the host
        wrote at, such as `EditResult.keys`; None for the mean over the prompt in all templates.
        templates: what `jaxedit.data.tokens.check_templates` takes; by default those of `templates`.
        state: adaptors to go on from. seed: with the number of each edit, of its adaptor's start and of what it reads
        in which order; alone, of the templates. on_progress is told of "adaptors".

        The direction C⁻¹k* is what one edit is written along, by ROME or by MEMIT and the methods like it. Many edits
        written together, or a solver without second moments, have others; REP then leads keys near them.

        Returns the adaptors and, of each request and layer: ``losses [n, layers, steps, 4]`` before each step, the
        objective's first term, the mean square by which the prompt's key is moved, the negative and the positive term;
        ``cosine [n, layers, 2]``, of the keys trained on with C⁻¹k* before and after, gates open or shut; ``open [n,
        layers]``, the share of these gates; and ``drift [n, layers]``, how far the prompt's key is moved, relative to
        it.

        Raises RequestError where a request cannot be carried out or a text does not fit the model, JaxEditError where
        layers, queries, keys or the state do not fit the model or the requests.
        """
        config, layers, n = model.config, checked_layers(layers, model.config), len(requests)
        tokenised(model, tokenizer, requests)
        if len(queries) != n:
            raise JaxEditError(f"each request needs its queries: there are {n} and {len(queries)}")
        _check_keys(keys, layers, (n, config.d_ff))
        first = 0 if state is None else int(state.given)
        empty = self.empty(model, layers)
        _check_fits(state, empty)
        factor = stats if isinstance(stats, Factor) else whitening(stats, layers)
        groups = check_templates(self.templates(model, tokenizer, seed) if templates is None else templates)
        texts = tuple(template for group in groups for template in group)
        size = min(self.together, n)
        made, traces = [], []
        for begin in range(0, n, size):
            some = np.arange(begin, min(begin + size, n))
            filled = np.pad(some, (0, size - len(some)), mode="edge")
            plan = make_plan(
                self,
                tokenizer,
                [SubjectPrompt.of(requests[i]) for i in filled],
                [queries[i] for i in filled],
                texts,
                [(seed, first + int(i)) for i in filled],
                keys is None,
            )
            _check_lengths(plan, filled, requests, config.max_positions)
            own = None if keys is None else {l: np.asarray(keys[l])[filled] for l in layers}
            adaptors, trace = self._train(model, plan, layers, factor, own, apart, first + filled, seed)
            made.append(jax.tree.map(itemgetter(slice(len(some))), adaptors))
            traces.append({name: x[: len(some)] for name, x in trace.items()})
            if on_progress is not None:
                on_progress("adaptors", begin + len(some), n)
        new = jax.tree.map(lambda *x: jnp.concatenate(x), *made)._asdict()
        new["owner"] = jnp.asarray(first + np.arange(n), jnp.int32)
        columns = append(None if state is None else {name: getattr(state, name) for name in new}, new, least=1)
        result = dataclasses.replace(empty, **columns, given=jnp.asarray(first + n, jnp.int32))
        return result, {name: np.concatenate([t[name] for t in traces]) for name in traces[0]}

    def empty(self, model: Decoder, layers: Sequence[int]) -> RepState:
        """No adaptor yet, for a model."""
        config, dtype, n = model.config, wide(model.dtype), len(layers)
        d, width = config.d_ff, self.width(config)
        shapes = Adaptor((self.rank, d), (d, self.rank), (width, d), (width,), (width,), ())
        return RepState(
            **{name: jnp.zeros((0, n, *shape), dtype) for name, shape in shapes._asdict().items()},
            owner=jnp.zeros(0, jnp.int32),
            given=jnp.zeros((), jnp.int32),
            tau=jnp.asarray(self.tau, dtype),
            layers=tuple(layers),
        )

    def templates(self, model: Decoder, tokenizer, seed: int) -> tuple[str, ...]:
        """ "{}", and behind a sampled text for each length, word and sample."""
        groups = [sample_templates(model, tokenizer, seed, _WORDS * self.samples, n)[1:] for n in self.prefixes]
        return ("{}", *(t for group in groups for some in group for t in some))

    def _train(
        self, model: Decoder, plan: Plan, layers: tuple[int, ...], factor: Factor, keys, apart, numbers, seed: int
    ) -> tuple[Adaptor, dict[str, np.ndarray]]:
        """Adaptors ``[n, layers]`` of a plan's edits, whose numbers ``[n]`` are given, and their traces."""
        config, n = model.config, len(numbers)

        def params(texts: np.ndarray):
            if apart is None:
                return model.params
            return model.params | {"adapters": (apart.for_rows(numbers[plan.owner[texts]].astype(np.int32)),)}

        root = jax.random.key(seed)
        random = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(numbers))
        parts = enter(model, plan, params, layers[0])
        found, traces = [], []
        for l, above in zip(layers, (*layers[1:], None), strict=True):
            read = keys_at(parts, config, l, len(plan.texts))
            star = read[plan.anchors].mean(1) if keys is None else keys[l]
            given = _given(plan, read, solved(factor, l, star, both_ways=True))
            here = jax.vmap(lambda key, l=l: jax.random.split(jax.random.fold_in(key, l)))(random)
            start = initial(here[:, 0], given.clean, self.width(config), self.rank)
            adaptors, log = train(Rates.of(self, read.dtype), start, given, here[:, 1], self.objective == "response")
            end = np.asarray(outcome(jnp.asarray(self.tau, read.dtype), adaptors, given))
            found.append(adaptors)
            traces.append({"losses": log, "cosine": end[:, :2], "open": end[:, 2], "drift": end[:, 3]})
            if above is not None:
                state = dataclasses.replace(
                    self.empty(model, (l,)),
                    **{name: x[:, None] for name, x in adaptors._asdict().items()},
                    owner=jnp.arange(n, dtype=jnp.int32),
                )
                parts = go_on(parts, config, state, np.where(plan.bare, -1, plan.owner), above)
        stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *found)
        return stacked, {name: np.stack([np.asarray(t[name]) for t in traces], 1) for name in traces[0]}


def rep_for(config: ModelConfig) -> Rep:
    """The settings for a model, or the published ones."""
    return Rep(**PRESETS.get(preset_name(config) or "", {}))


def _given(plan: Plan, read: np.ndarray, direction: np.ndarray) -> Keys:
    """Keys ``[texts, d_ff]`` as edits train on them, with the directions ``[n, d_ff]`` of any length."""
    return Keys(
        pool=jnp.asarray(read[plan.pool]),
        clean=jnp.asarray(read[plan.clean]),
        target=jnp.asarray((direction / np.linalg.norm(direction, axis=-1, keepdims=True)).astype(read.dtype)),
        other=jnp.asarray(read[plan.other]),
        real=jnp.asarray((plan.other >= 0).astype(read.dtype)),
    )


def _check_keys(keys: Mapping[int, np.ndarray] | None, layers: tuple[int, ...], shape: tuple[int, int]):
    if keys is None:
        return
    for l in layers:
        if l not in keys or np.shape(keys[l]) != shape:
            got = np.shape(keys[l]) if l in keys else "none"
            raise JaxEditError(f"keys of layer {l}: expected shape {shape}, those of these requests alone; got {got}")


def _check_fits(state: RepState | None, empty: RepState):
    if state is None:
        return
    ours, theirs = ([getattr(s, name).shape[1:] for name in Adaptor._fields] for s in (empty, state))
    if state.layers != empty.layers or ours != theirs:
        raise JaxEditError(
            f"the state to go on from has layers {state.layers} and shapes {theirs}; the settings and the model have "
            f"{empty.layers} and {ours}"
        )


def _check_lengths(plan: Plan, requests: np.ndarray, given: Sequence[EditRequest], most: int):
    longest: dict[int, int] = {}
    for i, text in zip(plan.owner.tolist(), plan.texts, strict=True):
        longest[int(requests[i])] = max(longest.get(int(requests[i]), 0), len(text))
    problems = [
        f"request {i} (id {given[i].id}): a text to train on has {size} tokens; the model takes {most}"
        for i, size in longest.items()
        if size > most
    ]
    if problems:
        raise RequestError(problems)
