"""Specificity without ground truth: how far an edit moves the predictions it should leave alone.

As in the forward-replay paper: at the last token of each neighbourhood prompt, that is, where the first token
of the answer is predicted and no later one, the divergence ``D_KL(base || edited)`` in nats and the overlap
of the two models' likeliest tokens.
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

from jaxedit.data.tokens import encode
from jaxedit.errors import JaxEditError, RequestError
from jaxedit.evaluation.batching import MIN_LENGTH, batches, bucket, chunk, pad
from jaxedit.models.config import ModelConfig
from jaxedit.models.transformer import Context, Decoder, Params, embed, run, unembed
from jaxedit.sharding import data_shards, mesh_of, over_data, place_rows

TOP = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Specificity:
    """Per prompt: `kl` ``[n]`` in nats, and `overlap` ``[n, 3]``, the share of common top 1, 5, 10 tokens."""

    kl: np.ndarray
    overlap: np.ndarray

    def summary(self) -> dict[str, float | None]:
        """Means over prompts: keys kl, top1, top5, top10. None where there are no prompts."""
        if not len(self.kl):
            return {"kl": None, **{f"top{k}": None for k in TOP}}
        tops = zip(TOP, self.overlap.mean(0).tolist(), strict=True)
        return {"kl": float(self.kl.mean()), **{f"top{k}": share for k, share in tops}}


def specificity(
    base: Decoder, edited: Decoder, tokenizer, prompts: Sequence[str], batch_tokens: int = 8192
) -> Specificity:
    """Compare two models at the last token of each prompt, in float32 (float64 for float64 models).

    Raises JaxEditError where the models differ in architecture, RequestError naming prompts that do not fit.
    """
    check_models(base, edited, tokenizer)
    rows = [encode(tokenizer, prompt)[0] for prompt in prompts]
    most = base.config.max_positions
    bad = [
        f"prompt {p!r} has {len(r)} tokens; the model takes 1 to {most}"
        for p, r in zip(prompts, rows, strict=True)
        if not 0 < len(r) <= most
    ]
    if bad:
        raise RequestError(bad)
    kl, overlap = np.zeros(len(rows)), np.zeros((len(rows), len(TOP)))
    models, mesh = (base.params, edited.params), mesh_of(base.params)
    for batch in batches([(bucket(len(row), MIN_LENGTH),) for row in rows], batch_tokens, data_shards(mesh)):
        tokens, mask = place_rows(pad(batch.take(rows), batch.shape[0]), mesh)
        last = [last_hidden(params, base.config, tokens, mask, mesh) for params in models]
        found = divergence(*models, base.config, *last, mesh)
        n = len(batch.index)
        kl[batch.index], overlap[batch.index] = (np.asarray(x)[:n] for x in found)
    return Specificity(kl, overlap)


def check_models(base: Decoder, edited: Decoder, tokenizer):
    """Raise JaxEditError unless the two models can be compared on the same tokens."""
    for name, model in (("base", base), ("edited", edited)):
        if not isinstance(model, Decoder):
            hint = " (pass result.model)" if hasattr(model, "model") else ""
            raise JaxEditError(f"{name} must be a Decoder, got {type(model).__name__}{hint}")
    if base.config != edited.config:
        ours, theirs = (dataclasses.asdict(m.config) for m in (base, edited))
        differ = [name for name in ours if ours[name] != theirs[name]]
        raise JaxEditError(f"base and edited are different architectures: their {', '.join(differ)} differ")
    if mesh_of(base.params) != mesh_of(edited.params):
        raise JaxEditError("base and edited are on different devices; load both with the same mesh=")
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")


@partial(jax.jit, static_argnames=("config", "mesh"))
def last_hidden(params: Params, config: ModelConfig, tokens, mask, mesh: Mesh | None = None):
    """The hidden state ``[b, d_model]`` that predicts what follows each right-padded row ``[b, s]``."""

    def share(params, tokens, mask):
        context = Context.of_mask(mask).as_prompts()
        h = run(params, config, embed(params, config, tokens, context), context, 0, config.n_layer)
        return h[jnp.arange(len(h)), mask.sum(-1) - 1]

    return over_data(share, mesh)(params, tokens, mask)


@partial(jax.jit, static_argnames=("config", "mesh"))
def divergence(base: Params, edited: Params, config: ModelConfig, base_last, edited_last, mesh: Mesh | None = None):
    """Last hidden states ``[b, d_model]`` of both models to ``(kl [b], overlap [b, 3])``.

    Logits exist for a few hundred rows at a time only.
    """
    return over_data(partial(_divergence, config=config), mesh, 2)(base, edited, base_last, edited_last)


def _divergence(base, edited, base_last, edited_last, *, config: ModelConfig):
    most = min(max(TOP), config.vocab)

    def compare(pair):
        logits = unembed(base, config, pair[0]), unembed(edited, config, pair[1])
        p, q = (jax.nn.log_softmax(x) for x in logits)
        kl = jnp.sum(jnp.exp(p) * (p - q))
        mine, theirs = (lax.top_k(x, most)[1] for x in logits)
        same = mine[:, None] == theirs[None, :]
        return kl, jnp.stack([same[:k, :k].sum(dtype=p.dtype) / min(k, most) for k in TOP])

    return lax.map(compare, (base_last, edited_last), batch_size=chunk(len(base_last)))
