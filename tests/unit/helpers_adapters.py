"""What the tests of adapters share: logits with prompt ends, and generation without a cache."""

from functools import partial

import jax
import numpy as np

from jaxedit.data.tokens import target_ids
from jaxedit.models.transformer import Context, Decoder, embed, run, unembed


def with_adapters(model: Decoder, *adapters) -> Decoder:
    return model.with_params({**model.params, "adapters": adapters})


@partial(jax.jit, static_argnames=("config",))
def adapted_logits(params, config, tokens, mask, ends):
    context = Context.of_mask(mask).ending(ends)
    return unembed(
        params, config, run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
    )


def logits(
    model: Decoder, rows: list[list[int]], ends: list[int], length: int = 0, left: bool = False
) -> list[np.ndarray]:
    """Logits ``[tokens, vocab]`` of each row, in one padded batch; the prompt of a row ends at token ``ends``."""
    length = max(length, *map(len, rows))
    tokens, mask = np.zeros((2, len(rows), length), np.int32)
    starts = [length - len(row) if left else 0 for row in rows]
    for i, (row, at) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, at : at + len(row)], mask[i, at : at + len(row)] = row, 1
    out = np.asarray(adapted_logits(model.params, model.config, tokens, mask, np.asarray(ends) + np.asarray(starts)))
    return [out[i, at : at + len(row)] for i, (row, at) in enumerate(zip(rows, starts, strict=True))]


def greedy(model: Decoder, rows: list[list[int]], new: int) -> list[list[int]]:
    """Each row continued by its likeliest tokens, with a full pass for each of them."""
    full, ends = [list(row) for row in rows], [len(row) - 1 for row in rows]
    longest = max(map(len, rows)) + new
    for _ in range(new):
        for row, out in zip(full, logits(model, full, ends, longest), strict=True):
            row.append(int(out[-1].argmax()))
    return [row[end + 1 :] for row, end in zip(full, ends, strict=True)]


def same_bits(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def prompts_of(tokenizer, requests):
    """The requests' prompts as token ids, and where they end."""
    rows = [list(tokenizer(r.prompt)["input_ids"]) for r in requests]
    return rows, [len(row) - 1 for row in rows]


def trees_equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def target_nll(model: Decoder, tokenizer, requests) -> np.ndarray:
    """Mean negative log-likelihood of each request's target, in float64."""
    rows, ends = prompts_of(tokenizer, requests)
    targets = [target_ids(tokenizer, r.prompt, r.target) for r in requests]
    said = logits(model, [row + more[:-1] for row, more in zip(rows, targets, strict=True)], ends)
    found = []
    for out, end, ids in zip(said, ends, targets, strict=True):
        out = out[end:].astype(np.float64)
        log_p = out - np.logaddexp.reduce(out, -1, keepdims=True)
        found.append(-log_p[np.arange(len(ids)), ids].mean())
    return np.asarray(found)
