"""What two models predict token by token where an answer is given: the base of the zsRE and KnowEdit metrics.

A token's prediction depends only on what stands before it. So one pass over a prompt and its answer predicts every
token of the answer, and a row of tokens that another row begins with needs no pass of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxedit.adapters.rows import NOTHING, last_places
from jaxedit.data.tokens import Memo, spaced, target_ids
from jaxedit.errors import RequestError
from jaxedit.evaluation.batching import batches, bucket, chunk, pad, row_length
from jaxedit.evaluation.specificity import check_models
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Predicted:
    """An answer's tokens, and the likeliest token in the place of each, the earlier ones given: int32 ``[t]``."""

    answer: np.ndarray
    base: np.ndarray
    edited: np.ndarray

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of the answer's tokens that the base and the edited model predict."""
        return float((self.base == self.answer).mean()), float((self.edited == self.answer).mean())

    @property
    def agreement(self) -> float:
        """The share of places where both models predict the same token, right or wrong."""
        return float((self.base == self.edited).mean())


def predict(
    base: Decoder, edited: Decoder, tokenizer, pairs: Sequence[tuple[str, str]], batch_tokens: int = 8192
) -> list[Predicted]:
    """Both models on (prompt, answer) pairs, by teacher forcing. Equal rows are run once.

    batch_tokens: tokens, padding included, in one pass of a device. The likeliest token is that of the float32
    logits (float64 for float64 models).
    Raises JaxEditError where the models cannot be compared, RequestError naming every pair that cannot be run.
    """
    check_models(base, edited, tokenizer)
    tokens = tokenise(tokenizer, pairs, base.config.max_positions)
    rows = [(prompt + answer[:-1], len(answer)) for prompt, answer in tokens]
    ours, theirs = likeliest((base, edited), rows, batch_tokens)
    answers = (np.asarray(answer, np.int32) for _, answer in tokens)
    return [Predicted(*found) for found in zip(answers, ours, theirs, strict=True)]


def likeliest(
    models: Sequence[Decoder],
    rows: Sequence[tuple[Ids, int]],
    batch_tokens: int = 8192,
    own: Sequence[int] | None = None,
) -> list[list[np.ndarray]]:
    """For each model and row ``(tokens, n)``: the likeliest token after each of the row's last n, int32 ``[n]``.

    The models share one architecture and one mesh. own: which edit each row has, for adapters that can hold edits which
    do not know of each other (those with `for_rows`); by default they are left as they are.
    """
    adapted = any(model.params.get("adapters") for model in models)
    kept, home, edits = _apart(rows, own or [NOTHING] * len(rows)) if adapted else _merged(rows)
    config, mesh = models[0].config, mesh_of(models[0].params)
    shapes = [(row_length(len(ids)), bucket(n)) for ids, n in kept]
    queued = []
    for batch in batches(shapes, batch_tokens, data_shards(mesh)):
        some, (length, width) = batch.take(kept), batch.shape
        which = None if own is None else np.asarray(batch.take(edits), np.int32)
        placed = place_rows((*pad([ids for ids, _ in some], length), last_places(some, width), which), mesh)
        queued.append((batch.index, [_likeliest(model.params, config, *placed, mesh) for model in models]))
    found: list[dict[int, np.ndarray]] = [{} for _ in models]
    for index, sides in jax.device_get(queued):
        for mine, side in zip(found, sides, strict=True):
            mine |= zip(index, side, strict=False)

    def of(mine: dict[int, np.ndarray], at: int, ids: Ids, n: int) -> np.ndarray:
        longest, asked = kept[at]
        end = len(ids) - len(longest) + asked
        return mine[at][end - n : end]

    return [[of(mine, at, *row) for at, row in zip(home, rows, strict=True)] for mine in found]


def _apart(rows: Sequence[tuple[Ids, int]], own: Sequence[int]) -> tuple[list[tuple[Ids, int]], list[int], list[int]]:
    """As `_merged`, for adapters, to whom it matters where a prompt ends: rows that differ in it or in their edit stay
    apart."""
    given = list(zip(rows, own, strict=True))
    home = {pair: i for i, pair in enumerate(dict.fromkeys(given))}
    return [row for row, _ in home], [home[pair] for pair in given], [edit for _, edit in home]


def _merged(rows: Sequence[tuple[Ids, int]]) -> tuple[list[tuple[Ids, int]], list[int], list[int]]:
    """Rows to run, as (tokens, how many of the last are asked about), in which of them each given row lies, and the
    edit of each that is run: none."""
    starts: dict[Ids, int] = {}
    for ids, n in rows:
        starts[ids] = min(starts.get(ids, len(ids)), len(ids) - n)
    kept: list[tuple[Ids, int]] = []
    home: dict[Ids, int] = {}
    for ids in sorted(starts, reverse=True):  # a row stands right behind those that begin with it
        longest, n = kept[-1] if kept else ((), 0)
        if longest[: len(ids)] == ids:
            kept[-1] = longest, max(n, len(longest) - starts[ids])
        else:
            kept.append((ids, len(ids) - starts[ids]))
        home[ids] = len(kept) - 1
    return kept, [home[ids] for ids, _ in rows], [NOTHING] * len(kept)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _likeliest(params: Params, config: ModelConfig, tokens, mask, at, own, mesh: Mesh | None = None):
    """Right-padded ``tokens, mask [b, s]``, places ``at [b, m]`` and edits ``own [b]``, or None, to the likeliest next
    tokens ``[b, m]``."""

    def share(params, tokens, mask, at, own):
        if own is not None and (adapters := params.get("adapters")):
            held = tuple(a.for_rows(own) if hasattr(a, "for_rows") else a for a in adapters)
            params = {**params, "adapters": held}
        context = Context.of_mask(mask).ending(at[:, 0])  # the first place asked for is where the prompt ends
        h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        h = jnp.take_along_axis(h, at[..., None], 1).reshape(-1, h.shape[-1])
        best = lax.map(lambda x: unembed(params, config, x).argmax(-1), h, batch_size=chunk(len(h)))
        return best.reshape(at.shape).astype(jnp.int32)

    return over_data(share, mesh)(params, tokens, mask, at, own)


def tokenise(tokenizer, pairs: Sequence[tuple[str, str]], most: int) -> list[tuple[Ids, Ids]]:
    """The tokens of every prompt and of the answer that continues it, or RequestError naming all that do not fit."""
    joined = [p + spaced(a) for p, a in pairs]
    memo = Memo(tokenizer, [p for p, _ in pairs] + joined)
    problems, tokens = [], []
    for prompt, answer in pairs:
        row = tuple(memo.known[prompt]), tuple(target_ids(memo, prompt, answer))
        size = sum(map(len, row))
        if not all(row):
            problems.append(f"prompt {_short(prompt)} or its answer {answer!r} has no tokens")
        elif size > most:
            where = f"prompt {_short(prompt)} and its answer {answer!r}"
            problems.append(f"{where} have {size} tokens; the model takes {most}")
        tokens.append(row)
    if problems:
        raise RequestError(list(dict.fromkeys(problems)))
    return tokens


def _short(text: str) -> str:
    return repr(text if len(text) < 120 else f"…{text[-100:]}")
