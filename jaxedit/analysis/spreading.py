"""Does a residual that is spread backward point the right way? (Liu et al. 2026, "From Backward Spreading to Forward
Replay", §4.)

Backward spreading gives a lower layer the residual that remains at the last edited one, as if what a layer adds were
still that, and nothing else, some layers later. Here what becomes of real edits is followed layer by layer, and the
premises of the paper's two theorems are measured where the edits were made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxedit.analysis.jacobian import passive, stretch
from jaxedit.analysis.krylov import eigenvalues_near, extremes, forward
from jaxedit.data.tokens import Packed, chunks, pack, prompt_row
from jaxedit.edit import EditResult
from jaxedit.errors import JaxEditError
from jaxedit.export.patch import with_matrices
from jaxedit.models.config import ModelConfig
from jaxedit.models.fingerprint import matrix_hash
from jaxedit.models.stretch import Stretch, push
from jaxedit.models.transformer import Context, Decoder, Params, embed, layer, mlp_output, run
from jaxedit.types import EditRequest

SCALES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine along the last axis, in float64; NaN where one of the two is nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide(np.sum(a * b, -1), size, out=np.full(size.shape, np.nan), where=size > 0)


@dataclasses.dataclass(frozen=True)
class Walk:
    """What an edit did at the decisive tokens, layer by layer from the bottom, each on top of the ones below.

    site: what is looked at, "block_out" or "mlp_out". change ``[layers, n, d_model]``: δ_{m_l}, what the edit of a
    layer changed there; passive, of the same shape: δ_{m_L}^l, what that changed at the last edited layer; residual
    ``[layers + 1, n, d_model]``: what was missing there to the target, before the first edit and after each layer.
    """

    layers: tuple[int, ...]
    site: str
    change: np.ndarray
    passive: np.ndarray
    residual: np.ndarray

    @property
    def cosine(self) -> np.ndarray:
        """``[layers, n]``: between δ_{m_l} and δ_{m_L}^l (Table 1)."""
        return cosine(self.change, self.passive)

    @property
    def aim(self) -> np.ndarray:
        """``[layers, n]``: between δ_{m_L}^l and the residual that was left before it."""
        return cosine(self.passive, self.residual[:-1])

    @property
    def remaining(self) -> np.ndarray:
        """``[layers, n]``: norm of the residual after each layer over that before the first (Tables 2 and 5)."""
        size = np.linalg.norm(self.residual.astype(np.float64), axis=-1)
        return size[1:] / np.where(size[0] > 0, size[0], np.nan)

    def to_dict(self) -> dict[str, Any]:
        """Means over the edits, by layer."""
        found = {"cosine": self.cosine, "aim": self.aim, "remaining": self.remaining}
        return {"layers": list(self.layers), "site": self.site} | {k: _means(x) for k, x in found.items()}


def _means(x: np.ndarray) -> list[float]:
    return [float(v) for v in np.nanmean(x, -1)]


def models_on_the_way(model: Decoder, result: EditResult) -> Iterator[Decoder]:
    """The model before the edit, with its lowest edited layer edited, with the two lowest ones, …, and the result's."""
    layers = result.info.solved.layers
    down = result.model.params["blocks"]["down"]["w"]
    yield model
    for i in range(1, len(layers) + 1):
        yield with_matrices(model, {l: np.asarray(down[l]) for l in layers[:i]})


def walk(model: Decoder, tokenizer, requests: Sequence[EditRequest], result: EditResult) -> Walk:
    """Follow an edit layer by layer, at the clean prompts of its requests.

    model: the one that was edited. Raises JaxEditError where `result` is of another model, of other requests, or has no
    target at its last layer.
    """
    layers, site = result.info.solved.layers, _site(result)
    assert result.targets is not None
    aim = result.targets.at(layers[-1])
    if len(aim) != len(requests):
        raise JaxEditError(f"the result is of {len(aim)} edits, and there are {len(requests)} requests")
    if tuple(requests) != result.patch.requests:
        raise JaxEditError("the result is of other requests; give those that were edited, in their order")
    down = model.params["blocks"]["down"]["w"]
    wrong = [l for l in layers if matrix_hash(np.asarray(down[l])) != result.patch.base[l]]
    if wrong:
        raise JaxEditError(f"the result is of another model: its layers {wrong} were others before the edit")
    rows = pack([(prompt_row(tokenizer, r),) for r in requests], until_lookup=True)
    states = [_states(at, rows, layers, site) for at in models_on_the_way(model, result)]
    change = np.stack([after[i] - before[i] for i, (before, after) in enumerate(itertools.pairwise(states))])
    ends = np.stack([s[-1] for s in states])
    return Walk(layers, site, change, np.diff(ends, axis=0), aim - ends)


def _states(model: Decoder, rows: Packed, layers: tuple[int, ...], site: str) -> np.ndarray:
    """What the layers make of the decisive tokens, ``[layers, n, d_model]``, float64."""
    parts = [
        np.asarray(_look(model.params, model.config, *part, layers, site), np.float64)
        for part in chunks(rows.as_tuple(), rows.tokens.shape[1])
    ]
    return np.concatenate(parts, 1)[:, : len(rows.tokens)]


@partial(jax.jit, static_argnames=("config", "layers", "site"))
def _look(params: Params, config: ModelConfig, tokens, positions, segments, lookup, layers: tuple[int, ...], site: str):
    context = Context(positions, segments)

    def probe(inside):
        seen = inside.h if site == "block_out" else inside.key
        return jnp.take_along_axis(seen, lookup[..., None], 1)[:, 0]

    h = run(params, config, embed(params, config, tokens, context), context, 0, layers[0])
    _, seen = run(params, config, h, context, layers[0], layers[-1] + 1, probe=probe)
    seen = [seen[l - layers[0]] for l in layers]
    if site == "mlp_out":
        seen = [mlp_output(layer(params, l), key) for l, key in zip(layers, seen, strict=True)]
    return jnp.stack(seen)


def _site(result: EditResult) -> str:
    return "mlp_out" if result.info.solved.anchor.of_mlp else "block_out"


@dataclasses.dataclass(frozen=True)
class Premises:
    """The premises of Theorems 1 and 2 per (layer below the last, prompt): every array is ``[layers, n]`` but for
    `random_cosine` ``[layers, n, directions]``. J is from the layer's output to the last edited one's, on the model
    with the layers below edited; δ is what is steered with there.

    Theorem 1 asks that δ be an eigenvector. cosine: of J δ and δ; rayleigh: β = δᵀJδ / ‖δ‖²; misfit:
    ‖J δ − β δ‖ / ‖J δ‖, 0 for an eigenvector; eigenvector_cosine: between δ and the closest eigenvector that Arnoldi
    finds from δ, and its error ‖J x − θ x‖; random_misfit: the misfit of random directions, mean.
    Theorem 2 asks that (J + Jᵀ)/2 be positive definite. smallest, largest: its eigenvalues, known up to `error`;
    random_cosine: of J v and v for random v. measured: the cosine of the real passive change of δ with δ.
    """

    layers: tuple[int, ...]
    last: int
    cosine: np.ndarray
    rayleigh: np.ndarray
    misfit: np.ndarray
    eigenvector_cosine: np.ndarray
    eigenvector_error: np.ndarray
    random_misfit: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    error: np.ndarray
    random_cosine: np.ndarray
    measured: np.ndarray

    @property
    def definite(self) -> np.ndarray:
        """Where Theorem 2's premise holds: the smallest eigenvalue is positive by more than its error."""
        return self.smallest > self.error

    @property
    def violations(self) -> np.ndarray:
        """Where the theorem would be wrong: the premise holds, and a tested direction has no positive cosine."""
        tested = np.concatenate([self.cosine[..., None], self.random_cosine], -1)
        return self.definite & ~(tested > 0).all(-1)

    @property
    def counterexamples(self) -> np.ndarray:
        """Where the premise fails and δ has a positive cosine all the same: the theorem is about all δ, and its premise
        is not necessary for one of them."""
        return (self.smallest < -self.error) & (self.cosine > 0)

    @property
    def agreement(self) -> np.ndarray:
        """Where premise and measurement agree: it holds and the cosine is positive, or neither."""
        return self.definite == (self.measured > 0)

    def to_dict(self) -> dict[str, Any]:
        """Means and shares over the prompts, by layer."""
        means = {
            name: _means(getattr(self, name))
            for name in ("cosine", "measured", "rayleigh", "misfit", "eigenvector_cosine", "smallest", "largest")
        }
        return {
            "layers": list(self.layers),
            "last": self.last,
            **means,
            "random_misfit": _means(self.random_misfit),
            "random_cosine": _means(self.random_cosine.reshape(len(self.layers), -1)),
            "random_positive": _means((self.random_cosine > 0).reshape(len(self.layers), -1)),
            "definite": _means(self.definite),
            "positive": _means(self.measured > 0),
            "agreement": _means(self.agreement),
            "counterexamples": _means(self.counterexamples),
            "violations": int(self.violations.sum()),
            "pairs": int(self.definite.size),
        }


def premises(
    model: Decoder,
    tokenizer,
    requests: Sequence[EditRequest],
    result: EditResult,
    *,
    directions: int = 32,
    steps: int = 200,
    arnoldi: int = 30,
    seed: int = 0,
    followed: Walk | None = None,
) -> Premises:
    """Measure both theorems' premises for a real edit of `model`, at every edited layer but the last.

    δ is what the edit changed in a layer. directions: random ones a prompt, normally distributed. steps: at most, of
    Lanczos for the ends of the symmetric part's spectrum. arnoldi: steps from δ. Nothing of J is written out.
    followed: `walk` of the same arguments, where it is known.

    Raises JaxEditError where only one layer was edited.
    """
    layers: tuple[int, ...] = result.info.solved.layers
    if len(layers) == 1:
        raise JaxEditError(f"only layer {layers[0]} was edited: there is nothing between it and the last one")
    followed = walk(model, tokenizer, requests, result) if followed is None else followed
    site, changes = followed.site, followed.change
    random, rows = np.random.default_rng(seed), []
    for i, (at, l) in enumerate(zip(models_on_the_way(model, result), layers[:-1], strict=False)):
        of = stretch(at, tokenizer, requests, l, layers[-1], site=site)
        rows.append(_premises_of(of, changes[i], random.standard_normal((*of.shape, directions)), steps, arnoldi))
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Premises(layers[:-1], layers[-1], **stacked)


def _premises_of(of: Stretch, delta: np.ndarray, random: np.ndarray, steps: int, arnoldi: int) -> dict[str, np.ndarray]:
    random = np.moveaxis(random, 2, 1)
    moved, others = forward(of, delta), forward(of, random)
    aligned, aside = cosine(moved, delta), cosine(others, random)
    ends, near = extremes(of, steps=steps), eigenvalues_near(of, delta, steps=arnoldi)
    scale = np.linalg.norm(delta, axis=-1)
    actual = np.asarray(passive(of, delta), np.float64)
    return {
        "cosine": aligned,
        "rayleigh": np.sum(moved * delta, -1) / scale**2,
        # with the Rayleigh quotient for β, what is left over of J δ is orthogonal to δ
        "misfit": np.sqrt(np.maximum(1 - aligned**2, 0)),
        "eigenvector_cosine": near.cosine[:, 0],
        "eigenvector_error": near.error[:, 0],
        "random_misfit": np.sqrt(np.maximum(1 - aside**2, 0)).mean(-1),
        "smallest": ends.smallest,
        "largest": ends.largest,
        "error": ends.error.max(-1),
        "random_cosine": aside,
        "measured": cosine(actual, delta),
    }


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """One layer steered by parts of the residual at the last one, per scale and prompt ``[scales, n]``.

    error: ‖actual − J δ‖ / ‖J δ‖, how far the passive change is from the linearisation; remaining: what is left of the
    residual, over what it was (Figure 3: above 1 the step leads away); cosine: of the passive change and the residual.
    size ``[n]``: ‖R‖ / ‖h‖, what a scale of 1 means.
    """

    layer: int
    scales: tuple[float, ...]
    error: np.ndarray
    remaining: np.ndarray
    cosine: np.ndarray
    size: np.ndarray

    def radius(self, tolerance: float = 0.1) -> np.ndarray:
        """``[n]``: the largest step ‖δ‖ / ‖h‖ up to which `error` stays below `tolerance`; at least that many, where it
        does so to the last scale."""
        inside = np.cumprod(self.error <= tolerance, axis=0).sum(0)
        reached = np.concatenate([[0.0], self.scales])[inside]
        return reached * self.size


def step_sizes(of: Stretch, residual: np.ndarray, layer: int, *, scales: Sequence[float] = SCALES) -> StepSizes:
    """Steer the first layer of a stretch by ``scale × residual`` ``[n, d_model]`` and see what arrives at its last."""
    given = np.asarray(residual, of.stream.dtype)
    along = np.asarray(scales, given.dtype)[:, None, None]
    actual = np.asarray(passive(of, along * given), np.float64)
    linear = along * np.asarray(push(of, given), np.float64)
    size = np.linalg.norm(given.astype(np.float64), axis=-1)
    at_rest = np.asarray(of.stream + of.out, np.float64) if of.site == "block_out" else np.asarray(of.out, np.float64)
    return StepSizes(
        layer,
        tuple(map(float, scales)),
        np.linalg.norm(actual - linear, axis=-1) / np.linalg.norm(linear, axis=-1),
        np.linalg.norm(given - actual, axis=-1) / size,
        cosine(actual, given[None].repeat(len(along), 0)),
        size / np.linalg.norm(at_rest, axis=-1),
    )
