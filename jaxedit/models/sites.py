"""Sites: where something else can be attached to a layer, and what may be attached there.

An adapter is a pytree under ``params["adapters"]``. Layers without one run as they do without any. It sees what stands
at its layer, and returns what should stand at its site; nothing is hooked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxedit.errors import JaxEditError

if TYPE_CHECKING:
    from jaxedit.models.transformer import Context

Site = Literal["mlp_in", "mlp_key", "mlp_out", "block_out", "logits"]
SITES: tuple[Site, ...] = ("mlp_in", "mlp_key", "mlp_out", "block_out", "logits")
DIGITS = 3  # of a token id, base 256: each is exact in bfloat16


class Seen(NamedTuple):
    """What a layer has computed when it comes to a site: the MLP's input ``[b, s, d_model]``, its key ``[b, s, d_ff]``,
    its output, the block's output, and after the last layer the normed state; None for what comes later."""

    mlp_in: jax.Array
    mlp_key: jax.Array | None = None
    mlp_out: jax.Array | None = None
    block_out: jax.Array | None = None
    logits: jax.Array | None = None


@runtime_checkable
class Adapter(Protocol):
    """What `run` asks of an adapter: a registered dataclass whose `layers`, `site` and `asks` are static.

    layers: where it changes what stands at `site`. For "logits", which is behind the last layer, that one.
    asks, asks_at: the layer and the site at which it decides, or None where nothing is decided; not above any of
    `layers`.
    """

    layers: tuple[int, ...]
    site: Site
    asks: int | None
    asks_at: Site | None

    def decide(self, seen: Seen, context: Context, carried: Any) -> tuple[Any, Any]:
        """Called where `asks` and `asks_at` say, before `change` there.

        Returns what `change` gets, of any structure, and what a later call on tokens that follow gets as `carried`,
        with rows as the leading axis; None on the first call.
        """
        ...

    def change(self, layer: int, seen: Seen, context: Context, decision: Any) -> jax.Array:
        """What should stand at the site, in the dtype of what does. For "logits": the token id ``[b, s]`` to predict
        instead of what the model does, -1 where the model's own prediction stands."""
        ...


def refuse_adapters(model: Any, doing: str):
    """Raise JaxEditError where a Decoder has adapters, which what is being done to it knows nothing of."""
    if model.params.get("adapters"):
        raise JaxEditError(
            f"cannot {doing}: this model has adapters. Take them off first (jaxedit.detach), and attach them again "
            "(jaxedit.attach) where they should stand beside the result"
        )


def at_prompt_end(decision: jax.Array, context: Context, carried: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """What was decided at the last token of each token's prompt.

    decision ``[b, s, …]``: of each token, were it the last of its prompt. carried ``[b, …]``: of rows whose prompt lies
    in the past. Returns the decision for each token, and what to carry on.
    """
    ends = prompt_ends(context)
    extra = (1,) * (decision.ndim - 2)
    known = jnp.take_along_axis(decision, jnp.maximum(ends, 0).reshape(*ends.shape, *extra), 1)
    if carried is not None:
        past = (ends < 0).reshape(*ends.shape, *extra)
        known = jnp.where(past, carried[:, None], known)
    last = jnp.max(jnp.where(context.segments > 0, jnp.arange(ends.shape[1]), 0), 1)
    return known, jnp.take_along_axis(known, last.reshape(-1, 1, *extra), 1)[:, 0]


def prompt_ends(context: Context) -> jax.Array:
    """``[b, s]``: where in this row the prompt of each token ends; negative where before this row."""
    if context.ends is not None:
        return context.ends
    return jnp.broadcast_to(jnp.arange(context.segments.shape[1], dtype=jnp.int32), context.segments.shape)


def answering(context: Context, only_last: bool = False) -> jax.Array:
    """``[b, s]``: whether a token is the last of its prompt or comes after it, padding excluded. only_last: the former
    alone."""
    here, ends = jnp.arange(context.segments.shape[1]), prompt_ends(context)
    return (here == ends if only_last else here >= ends) & (context.segments > 0)


def with_digits(h: jax.Array, token: jax.Array) -> jax.Array:
    """Hidden states ``[b, s, d_model]`` that carry a token id ``[b, s]`` (-1: none) in `DIGITS` columns more, so that
    it goes wherever the states go until they are unembedded."""
    known = token + 1
    digits = [(known // 256**i) % 256 for i in range(DIGITS)]
    return jnp.concatenate([h, jnp.stack(digits, -1).astype(h.dtype)], -1)


def take_digits(h: jax.Array, d_model: int) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states without what `with_digits` added, and the token ids; None where it added nothing."""
    if h.shape[-1] == d_model:
        return h, None
    digits = h[..., d_model:].astype(jnp.int32)
    return h[..., :d_model], digits @ 256 ** jnp.arange(DIGITS) - 1


class Desk:
    """Where the adapters of one pass are asked: what each decided, and what it carries on. Lives for one trace."""

    def __init__(self, adapters: tuple[Adapter, ...], context: Context, carried: tuple | None):
        self.adapters, self.context = adapters, context
        self.carried: list[Any] = list(carried or (None,) * len(adapters))
        self.decided: list[Any] = [None] * len(adapters)

    def visit(self, layer: int, site: Site, seen: Seen) -> Seen:
        """What stands at the site of a layer after all adapters, in their order."""
        for i, adapter in enumerate(self.adapters):
            if adapter.asks == layer and adapter.asks_at == site:
                self.decided[i], self.carried[i] = adapter.decide(seen, self.context, self.carried[i])
            if adapter.site == site and layer in adapter.layers:
                changed = adapter.change(layer, seen, self.context, self.decided[i])
                seen = seen._replace(**{site: changed.astype(getattr(seen, site).dtype)})
        return seen

    def predict(self, layer: int, h: jax.Array, normed: jax.Array) -> jax.Array:
        """The last layer's states, carrying the tokens that adapters predict in the model's place; a later adapter's
        before an earlier one's."""
        seen = Seen(normed, logits=normed)
        token = jnp.full(h.shape[:2], -1, jnp.int32)
        for i, adapter in enumerate(self.adapters):
            if adapter.site == "logits":
                if adapter.asks_at == "logits":
                    self.decided[i], self.carried[i] = adapter.decide(seen, self.context, self.carried[i])
                own = adapter.change(layer, seen, self.context, self.decided[i])
                token = jnp.where(own >= 0, own, token)
        return with_digits(h, token)
