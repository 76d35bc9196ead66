"""FLOPs and bytes counted from shapes. A multiply-add is two; attention scores, norms and softmax are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxedit.data.tokens import EditTokens
from jaxedit.models.config import ModelConfig
from jaxedit.targets.anchor_plan import n_asks, rows_of, suffix_tokens

ANCHORS_USED = (
    "2 per weight and token: every row once up to the anchor layer, its prefix once through the layers above, and per "
    "loss evaluation suffix tokens forward and back through the layers above and logits at target positions"
)
ANCHORS_NAIVE = (
    "2 per weight and token, per loss evaluation: all rows padded to the longest forward through every layer, back "
    "through the layers above the anchor, and logits at every position"
)
ANCHORS_BASELINE = "as the published procedure, but logits only where the loss reads them"


class Product(NamedTuple):
    """``[rows, into] @ [into, out]``, and where `back` the gradient's ``[rows, out] @ [out, into]``."""

    rows: int
    into: int
    out: int
    back: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.into * self.out * (1 + self.back)


def layer_flops(config: ModelConfig) -> int:
    """Matrix-product FLOPs of one token in one layer, forward."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    weights = config.d_model * (2 * q + 2 * kv) + config.d_model * config.d_ff * (3 if config.gated else 2)
    return 2 * weights


def anchors_used(config: ModelConfig, edits: Sequence[EditTokens], updates, layer: int) -> float:
    """What jaxedit's anchor stage has to multiply for these edits; lanes that run on without work left out."""
    above, per_layer = config.n_layer - layer - 1, layer_flops(config)
    logit = 2 * config.d_model * config.vocab
    total = 0.0
    for e, made in zip(edits, updates, strict=True):
        rows = rows_of(e)
        packed, before = sum(len(r.tokens) for r in rows), sum(r.lookup for r in rows)
        total += per_layer * ((layer + 1) * packed + above * (before + 1)) + logit
        total += (int(made) + 1) * 2 * (per_layer * above * suffix_tokens(e) + logit * (n_asks(e) + 1))
    return total


def anchors_naive(config: ModelConfig, edits: Sequence[EditTokens], updates, layer: int, all_logits=True) -> float:
    """The published procedure for the same edits and as many steps; `all_logits`: at every position."""
    per_layer, logit = layer_flops(config), 2 * config.d_model * config.vocab
    total = 0.0
    for e, made in zip(edits, updates, strict=True):
        rows = (*e.contexts, e.essence)
        tokens = len(rows) * max(len(r.tokens) for r in rows)
        asked = tokens if all_logits else len(e.target) * len(e.contexts) + 1
        backward = (config.n_layer - layer - 1) * per_layer
        total += (int(made) + 1) * (tokens * (config.n_layer * per_layer + backward) + 2 * logit * asked)
    return total


def statistics_one_pass(config: ModelConfig, tokens: int, layers: Sequence[int]) -> float:
    """One pass up to the keys of the last layer, and the upper triangle of each layer's Gram matrix."""
    gram = config.d_ff * (config.d_ff + 1)
    return tokens * (layer_flops(config) * max(layers) + key_flops(config) + len(layers) * gram)


def statistics_per_layer(config: ModelConfig, tokens: int, layers: Sequence[int]) -> float:
    """A pass for each layer up to its keys, and whole Gram matrices."""
    return tokens * sum(layer_flops(config) * l + key_flops(config) + 2 * config.d_ff**2 for l in layers)


def key_flops(config: ModelConfig) -> int:
    """A layer without its last projection."""
    return layer_flops(config) - 2 * config.d_ff * config.d_model


def solve_cached(d_ff: int, d_model: int, n: int) -> float:
    """n edits with a factor L at hand: Y = L^-1 K^T, Y^T Y and its Cholesky, that on R, Z = L^-T Y, and Z R.

    The product of the update's two low-rank factors is included, as it has to be written into the weights.
    """
    inner = 2 * d_ff * n**2 + n**3 / 3 + 2 * n**2 * d_model
    return 2 * d_ff**2 * min(n, (n + d_model) / 2) + inner + 2 * d_ff * n * d_model


def solve_naive(d_ff: int, d_model: int, n: int) -> float:
    """LU of a d_ff x d_ff matrix and its triangular solves, after K^T K and K^T R."""
    return 2 / 3 * d_ff**3 + 2 * d_ff**2 * d_model + 2 * d_ff**2 * n + 2 * d_ff * n * d_model


def loop_products(config: ModelConfig, layer: int, tokens: int, asks: int, naive: bool) -> list[Product]:
    """The matrix products of one loss evaluation and its gradient.

    jaxedit's run `tokens` suffix tokens through the layers above `layer`, forward and back; the naive ones run all
    tokens through all layers and go back through those above. Weights take no gradient.
    """
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    d, f = config.d_model, config.d_ff
    block = [(d, q), (d, kv), (d, kv), (q, d), *[(d, f)] * (2 if config.gated else 1), (f, d)]
    above = [Product(tokens, *each, True) for _ in range(config.n_layer - layer - 1) for each in block]
    below = [Product(tokens, *each, False) for _ in range(layer + 1) for each in block] if naive else []
    return [*below, *above, Product(asks, d, config.vocab, True)]
