"""What edits by an adapter achieve, and whether each can be taken back: the metrics of iReVa (Zhu et al. 2024, 6.2).

For edit i, with p(f) the likeliest tokens that f predicts in the places of its target's tokens, f the model without
edits, f* with all and f*₋ᵢ with all but this one:

    retrieve success = mean [p(f*₋ᵢ) ≠ p(f*)],   consistency = mean [p(f*₋ᵢ) = p(f)].

Only an edit's own prompt is asked about what withdrawing it does. So one pass holds many rows, each of which does
without another edit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxedit.adapters.rows import EVERYTHING, NOTHING, asked, last_places
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError
from jaxedit.evaluation.batching import MIN_LENGTH, Batch, batches, bucket, chunk, pad
from jaxedit.evaluation.comparison import Comparison
from jaxedit.evaluation.report import Summary, harmonic_mean
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows
from jaxedit.types import EditRequest


def edit_scores(compared: Comparison) -> tuple[Summary, Summary]:
    """The base and the edited model's scores, from what `evaluate_zsre` measured: shares of tokens predicted.

    es, ps, ns: at the edits' prompts, at paraphrases, and of the neighbours' own answers. score: their harmonic mean.
    capped: the same with ns at most the base model's, so that nothing is gained by learning the neighbours' answers.
    """
    sides = []
    for side in (compared.base, compared.edited):
        found = [side[metric] for metric in ("efficacy", "paraphrase", "neighbourhood")]
        near, most = found[2], compared.base["neighbourhood"]
        least = None if near is None or most is None else min(near, most)
        named = dict(zip(("es", "ps", "ns"), found, strict=True))
        sides.append(named | {"score": harmonic_mean(found), "capped": harmonic_mean([*found[:2], least])})
    return sides[0], sides[1]


@dataclasses.dataclass(frozen=True)
class Withdrawal:
    """Per edit, boolean ``[n]``.

    changed: with all edits the model predicts something else than with none. retrieved: with this edit withdrawn it
    predicts something else than with all. consistent: it then predicts what it does with none. restored: it then has
    the same logits, bit for bit. difference: float ``[n]``, the largest difference between these logits.
    """

    changed: np.ndarray
    retrieved: np.ndarray
    consistent: np.ndarray
    restored: np.ndarray
    difference: np.ndarray

    def summary(self) -> Summary:
        """Means over edits. An edit that changes nothing cannot be retrieved: `retrieve_success_of_changed` leaves
        these out, and is None where nothing changed."""
        some = self.retrieved[self.changed]
        return {
            "retrieve_success": float(self.retrieved.mean()),
            "retrieve_success_of_changed": float(some.mean()) if len(some) else None,
            "consistency": float(self.consistent.mean()),
            "restored": float(self.restored.mean()),
        }


def evaluate_withdrawal(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    *,
    adapter: int = -1,
    first: int = 0,
    withdraw: Callable[[Any, list[int]], Any] | None = None,
    batch_tokens: int = 8192,
) -> Withdrawal:
    """Withdraw each edit by itself, and ask for its target at its prompt.

    adapter: which of the model's adapters holds the edits; request i is its edit ``first + i``, which changes nothing
    where it is not held any more. The model with none of them is the same program with all of them withdrawn, so that
    logits can be the same bit for bit.
    withdraw: how to take edits out of an adapter, one after another; by default all at once, where the adapter can
    withhold another one from each row of a batch (`withholding`), else by its `without`.

    Raises RequestError naming requests that do not fit the model, JaxEditError where the model has no such adapter, or
    this one cannot withdraw an edit by itself.
    """
    adapters = model.params.get("adapters", ())
    if not -len(adapters) <= adapter < len(adapters):
        raise JaxEditError(f"the model has {len(adapters)} adapters, and none at {adapter}")
    if not requests:
        raise JaxEditError("there are no requests to evaluate")
    edits = validate(tokenizer, requests, CLEAN, model.config.max_positions)
    rows = asked(edits)
    at, held, mesh = adapter % len(adapters), adapters[adapter], mesh_of(model.params)
    together = withdraw is None and hasattr(held, "withholding")
    take = withdraw or (lambda state, gone: state.without(gone))
    still = held.edits()
    none = None if together else take(held, still.tolist())

    def params_with(state) -> Params:
        return {**model.params, "adapters": (*adapters[:at], state, *adapters[at + 1 :])}

    shapes = [(bucket(len(tokens), MIN_LENGTH), bucket(n)) for tokens, n in rows]
    if together:
        made = batches(shapes, batch_tokens, data_shards(mesh))
    else:  # row by row, with one program for all
        longest, most = map(max, zip(*shapes, strict=True))
        made = [Batch([i], data_shards(mesh), (longest, most)) for i in range(len(rows))]
    out: dict[str, np.ndarray] = {field.name: np.zeros(len(rows), bool) for field in dataclasses.fields(Withdrawal)}
    out["difference"] = np.zeros(len(rows))
    for batch in made:
        some, (length, width) = batch.take(rows), batch.shape
        own = np.asarray(batch.take(range(len(rows))), np.int32) + first
        choices = (np.full_like(own, EVERYTHING), np.full_like(own, NOTHING), own)
        states = (held,) * 3 if together else (none, held, take(held, np.intersect1d(own, still).tolist()))
        placed = place_rows((*pad([tokens for tokens, _ in some], length), last_places(some, width)), mesh)
        which = at if together else None
        h = [
            _final_states(params_with(s), model.config, *placed, place_rows(c, mesh), which, mesh)
            for s, c in zip(states, choices, strict=True)
        ]
        best, difference = (np.asarray(x)[: len(batch.index)] for x in _compare(model.params, model.config, h, mesh))
        base, edited, back = best[..., 0], best[..., 1], best[..., 2]
        out["changed"][batch.index] = (base != edited).any(-1)
        out["retrieved"][batch.index] = (back != edited).any(-1)
        out["consistent"][batch.index] = (back == base).all(-1)
        out["difference"][batch.index] = difference.max(-1)
    out["restored"] = out["difference"] == 0
    return Withdrawal(**out)


@partial(jax.jit, static_argnames=("config", "which", "mesh"))
def _final_states(params, config: ModelConfig, tokens, mask, at, withheld, which: int | None, mesh: Mesh | None):
    """Final states at places ``at [b, m]``; adapter `which` does without edit ``withheld [b]`` in each row."""

    def share(params, tokens, mask, at, withheld):
        if which is not None:
            adapters = params["adapters"]
            held = adapters[which].withholding(withheld)
            params = {**params, "adapters": (*adapters[:which], held, *adapters[which + 1 :])}
        context = Context.of_mask(mask).ending(at[:, 0])
        h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        return jnp.take_along_axis(h, at[..., None], 1)

    return over_data(share, mesh)(params, tokens, mask, at, withheld)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _compare(params: Params, config: ModelConfig, h, mesh: Mesh | None):
    """Three models' final states ``[b, m, d]`` to their likeliest tokens ``[b, m, 3]``, and the largest difference
    ``[b, m]`` between the logits of the first and the third."""

    def share(params, h):
        shape = h[0].shape[:2]

        def one(states):
            logits = [unembed(params, config, x) for x in states]
            best = jnp.stack([x.argmax(-1) for x in logits]).astype(jnp.int32)
            return best, jnp.max(jnp.abs(logits[0] - logits[2]))

        flat = [x.reshape(-1, x.shape[-1]) for x in h]
        best, difference = lax.map(one, flat, batch_size=chunk(len(flat[0])))
        return best.reshape(*shape, 3), difference.reshape(shape)

    return over_data(share, mesh)(params, h)
