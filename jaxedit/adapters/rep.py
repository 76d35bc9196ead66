"""REP, the robust edit pathway: beside an edit, an adaptor that leads other keys of its subject to the edit's key.

Yan et al., "Keys to Robust Edits: from Theoretical Insights to Practical Advances" (2025). A locate-then-edit update is
heard at a key k in proportion to ``kᵀC⁻¹k*``, and keys of the same subject in other words, in another order of its
tokens or after a long text are hardly like k*. After such an update, each edited layer gets an adaptor on the input of
the MLP's second projection, at every token:

    k' = k + [gate(k) > τ] B A k,    gate(k) = sigmoid(w₂ · gelu(W₁ k + c₁) + c₂),

trained with the gate itself in place of the bracket, on texts about the subject alone, without the edit's target:

    J = -mean cos(k', C⁻¹k*) + consistency · mean_D (k' - k)² at the prompt as it is,

which holds the edit itself in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.adapters.rep_adaptors import Adaptor, RepState
from jaxedit.adapters.rep_training import (
    Forms,
    Keys,
    drawn,
    enter,
    go_on,
    in_template,
    initial,
    keys_at,
    outcome,
    to_text,
    train,
    training_prompts,
)
from jaxedit.adapters.rows import append
from jaxedit.adapters.training import tokenised
from jaxedit.analysis.keys import checked_layers, solved, whitening
from jaxedit.analysis.subject_forms import SubjectPrompt
from jaxedit.config import _check, _check_choice  # noqa: F401
from jaxedit.data.templates import sample_templates
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import wide
from jaxedit.models.transformer import Decoder
from jaxedit.solvers.factors import Factor
from jaxedit.statistics import SecondMoments
from jaxedit.types import EditRequest

_STARTERS = 5  # words that sampled prefixes begin with

PRESETS: dict[str, dict[str, Any]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rep:
    """Settings; the defaults are those published for Llama-2-7B and Mistral-7B (d_ff 11008 and 14336).

    rank: of the projection. gate_width: of the gate's hidden layer, as a share of d_ff. tau: a gate above it is open.
    steps, lr: Adam's. batch: texts in a step, besides the prompt as it is. dropout: on the projection's input, in
    training alone.
    consistency: weight of how far the prompt's own key is moved, a mean over channels of squares, so it depends on the
    scale of a model's keys. negative: weight of ``-log(1 - gate)``, mean over a token before the subject in each text;
    published 0, where nothing keeps a gate closed at other tokens.
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
    consistency: float = 50_000.0
    negative: float = 0.0
    prefixes: tuple[int, ...] = (5, 10)
    samples: int = 2
    together: int = 32

    def __post_init__(self):
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        _check(self, positive=("lr",), not_negative=("consistency", "negative"), shares=("gate_width",))
        if not 0 <= self.tau <= 1 or not 0 <= self.dropout < 1:
            raise JaxEditError(
                f"Rep.tau is from 0 to 1, and dropout from 0 to below 1; got {self.tau} and {self.dropout}"
            )
        if min(self.rank, self.steps, self.batch, self.together) < 1 or self.samples < 0:
            raise JaxEditError("Rep.rank, steps, batch and together must be at least 1, and samples not negative")

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
        queries: Sequence[Forms],
        keys: Mapping[int, np.ndarray] | None = None,
        state: RepState | None = None,
        apart: Any = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[RepState, dict[str, np.ndarray]]:
        """Adaptors for edits that a model holds."""
        config, layers = model.config, checked_layers(layers, model.config)
        tokenised(model, tokenizer, requests)
        if len(queries) != len(requests):
            raise JaxEditError(f"{len(requests)} requests need as many queries, got {len(queries)}")
        factor = stats if isinstance(stats, Factor) else whitening(stats, layers)
        templates = self.templates(model, tokenizer, seed)
        first = 0 if state is None else int(state.given)
        size = min(self.together, len(requests))
        made, traces = [], []
        for begin in range(0, len(requests), size):
            some = np.arange(begin, min(begin + size, len(requests)))
            filled = np.pad(some, (0, size - len(some)), mode="edge")
            adaptors, trace = self._train(
                model, tokenizer, requests, queries, templates, layers, factor, keys, apart, filled, first, seed
            )
            made.append(jax.tree.map(lambda x, n=len(some): x[:n], adaptors))
            traces.append({k: x[: len(some)] for k, x in trace.items()})
            if on_progress is not None:
                on_progress("adaptors", int(some[-1]) + 1, len(requests))
        new = jax.tree.map(lambda *x: jnp.concatenate(x), *made)._asdict()
        new["owner"] = jnp.asarray(first + np.arange(len(requests)), jnp.int32)
        columns = append(None if state is None else {name: getattr(state, name) for name in new}, new, least=1)
        result = RepState(
            **columns,
            given=jnp.asarray(first + len(requests), jnp.int32),
            tau=jnp.asarray(self.tau, wide(model.dtype)),
            layers=layers,
        )
        return result, {name: np.concatenate([t[name] for t in traces]) for name in traces[0]}

    def templates(self, model: Decoder, tokenizer, seed: int) -> tuple[str, ...]:
        """ "{}", and a sampled text before it for each length, word and sample."""
        groups = [sample_templates(model, tokenizer, seed, _STARTERS * self.samples, n)[1:] for n in self.prefixes]
        return ("{}", *(t for group in groups for some in group for t in some))

    def _train(
        self, model, tokenizer, requests, queries, templates, layers, factor, keys, apart, edits, first, seed
    ) -> tuple[Adaptor, dict[str, np.ndarray]]:
        """Adaptors ``[n, layers]`` of the requests `edits` ``[n]``."""
        config, n = model.config, len(edits)
        texts, owners = [], []
        pick = np.zeros((n, self.steps * self.batch), np.int64)
        clean = np.zeros(n, np.int64)
        anchors = np.zeros((n, len(templates)), np.int64)
        problems = []
        for i, e in enumerate(edits):
            rng = np.random.default_rng([seed, first + int(e)])
            prompt = SubjectPrompt.of(requests[e])
            every = training_prompts(prompt, queries[e], templates)
            clean[i] = len(texts)
            order = drawn(rng, len(every) - 1, self.steps * self.batch) + 1
            place = {}
            for at in (0, *order.tolist()):
                if at not in place:
                    place[at] = len(texts)
                    texts.append(to_text(tokenizer, every[at], rng.random()))
                    owners.append(i)
            pick[i] = [place[at] for at in order.tolist()]
            if keys is None:
                anchors[i] = len(texts) + np.arange(len(templates))
                texts += [to_text(tokenizer, in_template(prompt, t), 0.0) for t in templates]
                owners += [-1 - i] * len(templates)
        for t in texts:
            if len(t.tokens) > config.max_positions:
                problems.append(f"a text has {len(t.tokens)} tokens; the model takes {config.max_positions}")
        if problems:
            raise RequestError(list(dict.fromkeys(problems)))
        owner = np.asarray(owners)
        host_rows = np.where(owner < 0, -1 - owner, owner)
        rep_rows = np.where(owner < 0, -1, owner).astype(np.int32)

        def with_rows(index):
            if apart is None:
                return model.params
            rows = np.asarray(edits)[host_rows[index]] + first
            return model.params | {"adapters": (apart.for_rows(rows.astype(np.int32)),)}

        parts = enter(model, texts, with_rows, layers[0])
        root = jax.random.key(seed)
        numbers = jnp.asarray(first + np.asarray(edits))
        random = jax.vmap(lambda i: jax.random.fold_in(root, i))(numbers)
        found, log, ends = [], [], []
        real = np.asarray([t.other >= 0 for t in texts])[pick].reshape(n, self.steps, self.batch)
        for place, l in enumerate(layers):
            read = keys_at(parts, config, l, len(texts))
            star = read[anchors, 0].mean(1) if keys is None else np.asarray(keys[l])[edits]
            target = solved(factor, l, star, both_ways=True)
            target = target / np.linalg.norm(target, axis=-1, keepdims=True)
            drawn_keys = read[pick].reshape(n, self.steps, self.batch, 2, -1)
            given = Keys(
                pool=jnp.asarray(drawn_keys[..., 0, :]),
                clean=jnp.asarray(read[clean, 0]),
                target=jnp.asarray(target.astype(read.dtype)),
                other=jnp.asarray(drawn_keys[..., 1, :]),
                real=jnp.asarray(real.astype(read.dtype)),
            )
            here = jax.vmap(lambda key, l=l: jax.random.split(jax.random.fold_in(key, l)))(random)
            start = initial(here[:, 0], given.clean, self.width(config), self.rank)
            adaptors, losses = train(self, start, given, here[:, 1])
            found.append(adaptors)
            log.append(np.asarray(losses))
            ends.append(np.asarray(outcome(self, adaptors, given)))
            if place + 1 < len(layers):
                one = jax.tree.map(lambda x: x[:, None], adaptors)
                local = RepState(
                    **one._asdict(),
                    owner=jnp.arange(n, dtype=jnp.int32),
                    given=jnp.asarray(n, jnp.int32),
                    tau=jnp.asarray(self.tau, read.dtype),
                    layers=(l,),
                )
                parts = go_on(parts, config, local, rep_rows, layers[place + 1])
        stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *found)
        end = np.stack(ends, 1)
        trace = {
            "losses": np.stack(log, 1),
            "cosine": end[..., :2],
            "open": end[..., 2],
            "drift": end[..., 3],
        }
        return stacked, trace
