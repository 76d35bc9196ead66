"""iReVa (Zhang et al. 2024, "Interpreting and Retrofitting Key-Value Adaptors for Traceable Model Editing"): one neuron
for each token of each target, beside the MLP of one layer.

A neuron's key is what the MLP reads at the last token before its target token, standardised; its value is the target
token's row of the output embedding. It fires where what the MLP reads correlates with its key by more than θ:

    z = k · s(x) - b,   b = θ ‖k₀‖² = θ (d - 1),   out = MLP(x) + α g(z) v,

g is the model's own activation. Without retrofitting nothing is optimised: one pass over the prompts and their targets
gives all neurons at once, and their order does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxedit.adapters.rows import append, in_use, latest_best, read_last, where_wanted, withdrawn
from jaxedit.config import _check, _check_choice
from jaxedit.data.tokens import CLEAN, validate
from jaxedit.errors import JaxEditError
from jaxedit.layer_loop import Progress
from jaxedit.models.config import ModelConfig
from jaxedit.models.layers import activation, wide
from jaxedit.models.sites import Site, answering
from jaxedit.models.transformer import (
    Context,
    Decoder,
    Params,
    attention,
    attention_added,
    embed,
    layer,
    mlp_input,
    run,
    window_of,
)
from jaxedit.sharding import over_data
from jaxedit.types import EditRequest

_FIXED = ("layers", "act", "alpha", "theta", "gate", "pool", "positions")

# Published values; PARAREL was edited with θ = 0.65. The layers of GPT-J and Llama are not published.
PRESETS: dict[str, dict] = {
    "gpt2-xl": {"layers": (46,)},
    "gpt2-large": {"layers": (34,), "irr_weight": 0.0},
    "gpt-neo-2.7b": {"layers": (30,), "alpha": 0.1},
    "gpt-j-6b": {"layers": (26,), "lr": 5e-3},
    "llama-3-8b": {"layers": (30,)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IReVa:
    """How neurons are made and when they fire.

    layers: the one layer that they stand beside; None for the last but one (46 of 48 in GPT-2-XL, as published).
    alpha: weight of their output. theta: the correlation at which they begin to fire, between 0 and 1.
    pool: "max", only the neuron that fires most adds its value (published for inference), or "sum", all do.
    gate: "activation", g itself, which is slightly negative just below θ; or "hard", zero wherever z <= 0.
    positions: "answer", every token from the last of the prompt on, as published for generation; or "last", that
        token alone, as published where each token of a target is scored in a row of its own.
    retrofit: optimise keys and values too ("+L"), with three losses: the target token's cross-entropy,
        ``rec_weight (k₀ · (k - k₀))²``, and `irr_weight` times the mean over texts out of scope of ``max(z, 0)``.
    steps, lr, betas, weight_decay: AdamW's. Published code has its library's weight decay, 0.01, where the paper says
        Adam. together: edits optimised at once; bounds memory, and changes results by rounding only.
    """

    layers: tuple[int, ...] | None = None
    alpha: float = 0.2
    theta: float = 0.75
    pool: Literal["max", "sum"] = "max"
    gate: Literal["activation", "hard"] = "activation"
    positions: Literal["answer", "last"] = "answer"
    retrofit: bool = False
    rec_weight: float = 1e-3
    irr_weight: float = 1e-3
    steps: int = 5
    lr: float = 5e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    together: int = 32

    def __post_init__(self):
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if len(self.layers or ()) != 1:
                raise JaxEditError(f"IReVa.layers must be one layer, got {self.layers}")
        object.__setattr__(self, "betas", tuple(self.betas))
        _check_choice(self, "pool", ("max", "sum"))
        _check_choice(self, "gate", ("activation", "hard"))
        _check_choice(self, "positions", ("answer", "last"))
        _check(self, not_negative=("alpha", "rec_weight", "irr_weight", "lr", "weight_decay"))
        if not 0 < self.theta < 1:
            raise JaxEditError(f"IReVa.theta is a correlation between 0 and 1, got {self.theta}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise JaxEditError(f"IReVa.betas must be two numbers from 0 to below 1, got {self.betas}")
        if self.steps < 1 or self.together < 1:
            raise JaxEditError("IReVa.steps and together must be at least 1")

    def layer_in(self, config: ModelConfig) -> int:
        """The layer that neurons stand beside. Raises JaxEditError where the model does not have it."""
        index = max(config.n_layer - 2, 0) if self.layers is None else self.layers[0]
        if not 0 <= index < config.n_layer:
            raise JaxEditError(f"layer {index} is out of range: the model has layers 0 to {config.n_layer - 1}")
        return index

    def edit(
        self,
        model: Decoder,
        tokenizer,
        requests: Sequence[EditRequest],
        *,
        state: Neurons | None = None,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> tuple[Neurons, dict[str, np.ndarray]]:
        """Neurons for every target token of `requests`, behind those of `state`.

        model: without adapters. seed: of the texts out of scope. on_progress is told of "keys" and "retrofit".
        Returns the neurons, and for each edit ``neurons [n]``, how many it has; where retrofitted also ``losses [n,
        steps, 3]``, the terms before each update, mean over its neurons, and ``crosstalk [n]``, the largest part of the
        MLP's output that earlier neurons add at its prompts, relative to it.

        Keys and values are float32 (float64 for a float64 model), whatever the dtype of the weights.
        Raises RequestError naming every request that cannot be carried out, JaxEditError where `state` is of another
        configuration.
        """
        config = model.config
        if model.params.get("adapters"):
            raise JaxEditError("pass the model without adapters, and earlier neurons as state=")
        index = self.layer_in(config)
        edits = validate(tokenizer, requests, CLEAN, config.max_positions)
        start = self._empty(model, index)
        if state is not None and (differ := [f for f in _FIXED if getattr(state, f) != getattr(start, f)]):
            raise JaxEditError(f"state was made with other settings: its {', '.join(differ)} differ")
        first = 0 if state is None else int(state.given)
        rows = [(edit.contexts[0].tokens, len(edit.target)) for edit in edits]
        keys = jnp.asarray(np.concatenate(read_last(partial(_keys, index=index), model, rows, on_progress)))
        ids = np.asarray([token for edit in edits for token in edit.target], np.int32)
        counts = np.asarray([len(edit.target) for edit in edits])
        table = model.params["embed"]["tokens"] if config.tied else model.params["unembed"]["w"]
        new = {
            "keys": keys,
            "values": jnp.take(table, ids, axis=0).astype(keys.dtype),
            "biases": self.theta * jnp.sum(keys * keys, -1),
            "owner": jnp.asarray(first + np.repeat(np.arange(len(edits)), counts), jnp.int32),
        }
        columns = append(None if state is None else {name: getattr(state, name) for name in new}, new)
        made = dataclasses.replace(start, **columns, given=jnp.asarray(first + len(edits), jnp.int32))
        trace: dict[str, np.ndarray] = {"neurons": counts}
        if self.retrofit:
            from jaxedit.adapters.ireva_retrofit import retrofit

            made, more = retrofit(self, model, tokenizer, requests, edits, made, keys, seed, on_progress)
            trace |= more
        return made, trace

    def _empty(self, model: Decoder, index: int) -> Neurons:
        dtype, d = wide(model.dtype), model.config.d_model
        return Neurons(
            keys=jnp.zeros((0, d), dtype),
            values=jnp.zeros((0, d), dtype),
            biases=jnp.zeros(0, dtype),
            owner=jnp.zeros(0, jnp.int32),
            given=jnp.zeros((), jnp.int32),
            layers=(index,),
            act=model.config.act,
            **{name: getattr(self, name) for name in _FIXED[2:]},
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "biases", "owner", "given", "withheld"],
    meta_fields=[*_FIXED, "site", "asks", "asks_at"],
)
@dataclasses.dataclass(frozen=True)
class Neurons:
    """The neurons of all edits, an `Adapter`.

    keys, values ``[n, d_model]``, biases ``[n]``; owner: int32 ``[n]``, which edit a neuron belongs to, -1 where there
    is none. given: how many edits there were, those withdrawn included. withheld: see `withholding`.
    The rest as in `IReVa`. Products with keys are float32 (float64) at the highest precision.
    """

    keys: jax.Array
    values: jax.Array
    biases: jax.Array
    owner: jax.Array
    given: jax.Array
    layers: tuple[int, ...]
    act: str
    alpha: float
    theta: float
    gate: str
    pool: str
    positions: str
    withheld: jax.Array | None = None
    site: Site = "mlp_out"
    asks: int | None = None
    asks_at: Site | None = None

    def decide(self, seen, context, carried):
        """Nothing: whether a neuron fires depends on one token alone."""
        return None, None

    def change(self, layer, seen, context, decision):
        """The MLP's output and what neurons add to it."""
        out, wanted = seen.mlp_out, answering(context, self.positions == "last")
        add = where_wanted(self.added, seen.mlp_in, wanted, len(self.owner))
        return jnp.where(wanted[..., None], out.astype(add.dtype) + add, out.astype(add.dtype)).astype(out.dtype)

    def added(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """What neurons add ``[q, d_model]`` where the MLP reads `x`, of that shape, in row ``index [q]`` of a batch."""
        used = in_use(self.owner, None if self.withheld is None else self.withheld[index])
        fired = self.fired(self.potentials(x))
        if self.pool == "sum":
            return self.alpha * _product(jnp.where(used, fired, 0), self.values)
        fired = jnp.where(used, fired, -jnp.inf)
        best = latest_best(fired)
        amount = jnp.take_along_axis(fired, best[:, None], 1)
        return self.alpha * jnp.where(jnp.isfinite(amount), amount, 0) * self.values[best]

    def potentials(self, x: jax.Array) -> jax.Array:
        """``z [q, n]`` of MLP inputs ``x [q, d_model]``."""
        return self.potentials_of(standardised(x.astype(self.keys.dtype)))

    def potentials_of(self, s: jax.Array) -> jax.Array:
        """``z [q, n]`` of MLP inputs that are standardised already."""
        return _product(s, self.keys.T) - self.biases

    def fired(self, z: jax.Array) -> jax.Array:
        """``g(z)``, gated."""
        made = activation(z, self.act)
        return jnp.where(z > 0, made, 0) if self.gate == "hard" else made

    def without(self, edits: Collection[int], how: Literal["delete", "mask"] = "delete") -> Neurons:
        """Edits withdrawn, by their numbers. "delete" takes their neurons away. "mask" sets their values to zero
        (published): such a neuron can still be the one that fires most, and then keeps others from answering."""
        gone = withdrawn(self.owner, edits)
        if how == "mask":
            return dataclasses.replace(self, values=jnp.where(gone[:, None], 0, self.values))
        return dataclasses.replace(self, owner=jnp.where(gone, -1, self.owner))

    def withholding(self, edits: jax.Array | None) -> Neurons:
        """For a batch whose row i does without edit ``edits [b]`` (int32): the same as without that edit, for every row
        at once. See `jaxedit.adapters.rows` for the numbers that mean none and all."""
        return dataclasses.replace(self, withheld=edits)


def standardised(x: jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + 1e-8)`` over features, with the sample variance: ‖·‖² is d - 1."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) / (x.shape[-1] - 1) + 1e-8)


def _product(x, w):
    return jnp.matmul(x, w, precision="highest")


@partial(jax.jit, static_argnames=("config", "mesh", "index"))
def _keys(params: Params, config: ModelConfig, tokens, mask, at, mesh: Mesh | None, *, index: int):
    def share(params, tokens, mask, at):
        x = mlp_entry(params, config, tokens, Context.of_mask(mask), index)[0]
        x = jnp.take_along_axis(x, at[..., None], 1)
        return standardised(x.astype(wide(x.dtype)))

    return over_data(share, mesh)(params, tokens, mask, at)


def mlp_entry(params: Params, config: ModelConfig, tokens, context: Context, index: int):
    """What the MLP of layer `index` reads, and the stream that its output is added to, ``[b, s, d_model]``."""
    h = run(params, config, embed(params, config, tokens, context), context, 0, index)
    p = layer(params, index)
    attended = attention(p, config, h, context, window_of(config, index))[0]
    stream = h + attention_added(p, config, attended)
    return mlp_input(p, config, h, stream), stream
