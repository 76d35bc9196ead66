"""What a decoder is made of, as a hashable value that passes through `jax.jit` as a static argument."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: `dim` of the head's channels are rotated.

    pairing: "half" rotates channel i with i + dim/2 (Llama, NeoX), "interleaved" 2i with 2i + 1 (GPT-J).
    scaling: "linear" divides every frequency by `factor`; "llama3" leaves high frequencies alone, divides low
        ones, and interpolates between `low_freq_factor` and `high_freq_factor`.
    """

    dim: int
    theta: float = 10000.0
    pairing: Literal["half", "interleaved"] = "half"
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    norm: "layer" (scale and bias), "rms", or "rms_plus_one" (Gemma: the scale is stored minus one).
    parallel: "none" is the usual sequential block; "shared" feeds attention and MLP from one norm (GPT-J);
        "separate" from two norms of the same input (NeoX).
    windows: attention window of each layer, 0 for unlimited. A token sees itself and the window - 1 before it.
    post_norms: norms on the outputs of attention and MLP before they are added (Gemma-2).
    """

    family: str
    vocab: int
    d_model: int
    d_ff: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    max_positions: int
    norm: Literal["layer", "rms", "rms_plus_one"]
    norm_eps: float
    act: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool
    parallel: Literal["none", "shared", "separate"] = "none"
    rope: Rope | None = None
    learned_positions: bool = False
    attn_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int, ...] = ()
    q_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    tied: bool = False
    unembed_bias: bool = False


Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[Shape, Axes]]:
    """Every parameter of a decoder, declared once: dotted path to (shape, logical axes).

    Block parameters carry a leading `layer` axis. Weights are ``[d_in, d_out]``.
    """
    c, out = config, {}
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim

    def block(name: str, shape: Shape, axes: Axes):
        out[f"blocks.{name}"] = ((c.n_layer, *shape), ("layer", *axes))

    def norm(name: str, place=block, width: int = c.d_model):
        place(f"{name}.scale", (width,), (None,))
        if c.norm == "layer":
            place(f"{name}.bias", (width,), (None,))

    def top(name: str, shape: Shape, axes: Axes):
        out[name] = (shape, axes)

    top("embed.tokens", (c.vocab, c.d_model), ("vocab", None))
    if c.learned_positions:
        top("embed.positions", (c.max_positions, c.d_model), (None, None))
    norm("attn_norm")
    if c.parallel != "shared":
        norm("mlp_norm")
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        block(f"{name}.w", (c.d_model, width), (None, "heads"))
        if c.q_bias:
            block(f"{name}.b", (width,), ("heads",))
    block("o.w", (q, c.d_model), ("heads", None))
    if c.o_bias:
        block("o.b", (c.d_model,), (None,))
    if c.qk_norm:
        block("q_norm.scale", (c.head_dim,), (None,))
        block("k_norm.scale", (c.head_dim,), (None,))
    for name in ("gate", "up") if c.gated else ("up",):
        block(f"{name}.w", (c.d_model, c.d_ff), (None, "ff"))
        if c.mlp_bias:
            block(f"{name}.b", (c.d_ff,), ("ff",))
    block("down.w", (c.d_ff, c.d_model), ("ff", None))
    if c.mlp_bias:
        block("down.b", (c.d_model,), (None,))
    if c.post_norms:
        norm("attn_post_norm")
        norm("mlp_post_norm")
    norm("final_norm", top)
    if not c.tied:
        top("unembed.w", (c.vocab, c.d_model), ("vocab", None))
    if c.unembed_bias:
        top("unembed.b", (c.vocab,), ("vocab",))
    return out
