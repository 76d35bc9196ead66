"""Key second moments: what "all other keys" look like, which is what an edit has to leave alone.

The key of a token is the input of the MLP's second projection; ``E[k kᵀ]`` over ordinary text (not
mean-centred) is the C of every least-squares editor (Meng et al. 2022, "Locating and Editing Factual
Associations in GPT").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxedit_kernels.second_moment import resolve_implementation

from jaxedit.cache import cache_dir, write_atomically
from jaxedit.data.corpus import Corpus, corpus_hash, pack_documents, read_corpus, tokenizer_hash
from jaxedit.distributed import agree, check_same, is_first
from jaxedit.errors import JaxEditError, StatisticsError
from jaxedit.models.config import ModelConfig
from jaxedit.models.fingerprint import fingerprint
from jaxedit.models.layers import wide
from jaxedit.models.sites import refuse_adapters
from jaxedit.models.transformer import Decoder
from jaxedit.moments_pass import PartialSums, moments_of_rows
from jaxedit.sharding import data_shards, mesh_of

FORMAT = "jaxedit-moments-1"
_CPU_TOKENS, _ACCELERATOR_TOKENS = 2048, 8192  # a step; scores of attention stay in a CPU's cache
_ASYMMETRY = 1e-3  # of the largest entry; what float32 sums on an accelerator may differ by


@dataclasses.dataclass(frozen=True, eq=False)
class SecondMoment:
    """The mean of ``k kᵀ`` over `count` tokens: `matrix` ``[d_ff, d_ff]``, float32 or float64, read-only.

    Raises StatisticsError unless the matrix is square, finite and symmetric and its diagonal is not negative.
    """

    matrix: np.ndarray
    count: int

    def __post_init__(self):
        matrix = np.asarray(self.matrix)
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float32)
        matrix = matrix.view()
        matrix.flags.writeable = False
        object.__setattr__(self, "matrix", matrix)
        problem = _problem(matrix) or _count_problem(self.count)
        if problem:
            raise StatisticsError(f"not a second moment: {problem}")
        object.__setattr__(self, "count", int(self.count))

    def merge(self, other: SecondMoment) -> SecondMoment:
        """The moment over the tokens of both: means weighted by counts."""
        if self.matrix.shape != other.matrix.shape:
            raise StatisticsError(f"cannot merge moments of shapes {self.matrix.shape} and {other.matrix.shape}")
        count = self.count + other.count
        return SecondMoment(self.matrix * (self.count / count) + other.matrix * (other.count / count), count)

    __add__ = merge


@dataclasses.dataclass(frozen=True, eq=False)
class SecondMoments(Mapping[int, SecondMoment]):
    """The second moments of some layers of one model: a mapping from layer to `SecondMoment`, in layer order.

    fingerprint: of the model they were computed on, up to the last of the layers and without the matrices
        that editing changes, so that they fit edited versions of the model too; None where it is not known.
    about: where they come from: hashes of corpus and tokenizer, and settings.
    """

    moments: Mapping[int, SecondMoment]
    fingerprint: str | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.moments:
            raise StatisticsError("second moments of no layers")
        shapes = {m.matrix.shape for m in self.moments.values()}
        if len(shapes) > 1:
            raise StatisticsError(f"the layers' second moments have different shapes: {sorted(shapes)}")
        moments = {int(l): self.moments[l] for l in sorted(self.moments)}
        object.__setattr__(self, "moments", MappingProxyType(moments))

    @classmethod
    def from_arrays(cls, matrices: Mapping[int, np.ndarray], count: int | Mapping[int, int], **fields):
        """From ``{layer: [d_ff, d_ff]}``, the means of ``k kᵀ``, and how many tokens they are over, for all
        layers or by layer. Raises StatisticsError naming the layer whose matrix is not a second moment."""
        moments = {}
        for l, matrix in matrices.items():
            try:
                moments[l] = SecondMoment(matrix, count[l] if isinstance(count, Mapping) else count)
            except StatisticsError as error:
                raise StatisticsError(f"layer {l}: {error}") from None
        return cls(moments, **fields)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.moments)

    def __getitem__(self, layer: int) -> SecondMoment:
        try:
            return self.moments[layer]
        except KeyError:
            raise StatisticsError(
                f"there are no second moments of layer {layer}, only of layers {list(self.layers)}"
            ) from None

    def __contains__(self, layer: object) -> bool:  # Mapping's own expects a KeyError
        return layer in self.moments

    def __iter__(self) -> Iterator[int]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)

    def merge(self, other: SecondMoments) -> SecondMoments:
        """The moments over the tokens of both, which must have the same layers and fit the same model.

        The fingerprint is kept where both have it; `about` becomes a list of the two.
        """
        if self.layers != other.layers:
            raise StatisticsError(f"cannot merge moments of layers {self.layers} and {other.layers}")
        known = None not in (self.fingerprint, other.fingerprint)
        if known and self.fingerprint != other.fingerprint:
            raise StatisticsError("cannot merge moments of two different models")
        merged = {l: self[l].merge(other[l]) for l in self.layers}
        about = {"merged": [dict(self.about), dict(other.about)]}
        return SecondMoments(merged, self.fingerprint if known else None, about)

    def check(self, model: Decoder) -> None:
        """Raise StatisticsError unless the moments fit the model; they also fit its edited versions."""
        config, size = model.config, next(iter(self.moments.values())).matrix.shape[0]
        if size != config.d_ff:
            raise StatisticsError(f"the second moments are for keys of {size} channels; the model has {config.d_ff}")
        if self.layers[-1] >= config.n_layer:
            raise StatisticsError(f"the second moments have layer {self.layers[-1]}; the model has {config.n_layer}")
        found = self.fingerprint and fingerprint(model.params, config, self.layers[-1] + 1, edited=False)
        if found != self.fingerprint:
            raise StatisticsError(
                "the second moments were computed on other weights (another model, or the same one in "
                "another dtype); compute them on this model"
            )

    def save(self, path) -> Path:
        """Write one safetensors file, with counts and provenance in its header; whole or not at all."""
        from safetensors.numpy import save_file

        about = {
            "format": FORMAT,
            "counts": {l: m.count for l, m in self.moments.items()},
            "fingerprint": self.fingerprint,
            "about": dict(self.about),
        }
        tensors = {str(l): np.ascontiguousarray(m.matrix) for l, m in self.moments.items()}
        path = Path(path)
        write_atomically(path, lambda p: save_file(tensors, p, metadata={"jaxedit": json.dumps(about)}))
        return path

    @classmethod
    def load(cls, path) -> SecondMoments:
        """Read what `save` wrote. Raises StatisticsError on anything else."""
        import safetensors

        try:
            with safetensors.safe_open(path, framework="numpy") as handle:
                about = json.loads((handle.metadata() or {})["jaxedit"])
                if about["format"] != FORMAT:
                    raise StatisticsError(f"{path} has format {about['format']!r}; this version reads {FORMAT!r}")
                counts = {int(l): n for l, n in about["counts"].items()}
                matrices = {l: handle.get_tensor(str(l)) for l in counts}
            return cls.from_arrays(matrices, counts, fingerprint=about["fingerprint"], about=about["about"])
        except StatisticsError as error:
            raise StatisticsError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise StatisticsError(f"there are no second moments at {path}") from None
        except (
            safetensors.SafetensorError,
            OSError,
            KeyError,
            ValueError,
            TypeError,
            AttributeError,
        ) as error:
            raise StatisticsError(
                f"{path} is not a complete file of second moments: {type(error).__name__}: {error}"
            ) from None


def _problem(matrix: np.ndarray) -> str | None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        return f"shape {matrix.shape}, expected a square matrix"
    finite = np.isfinite(matrix)
    if not finite.all():
        bad = np.argwhere(~finite)
        some = ", ".join(str(tuple(map(int, at))) for at in bad[:4])
        return f"{len(bad)} of {matrix.size} entries are NaN or infinite, at {some}{', …' * (len(bad) > 4)}"
    if (diagonal := matrix.diagonal()).min() < 0:
        return f"{np.count_nonzero(diagonal < 0)} entries of the diagonal are negative"
    gap, largest = _asymmetry(matrix), float(max(matrix.max(), -matrix.min()))
    if gap > _ASYMMETRY * largest:
        return f"not symmetric: largest difference to the transpose {gap:.3g}, largest entry {largest:.3g}"
    return None


def _asymmetry(matrix: np.ndarray, width: int = 1024) -> float:
    """Largest ``|M - Mᵀ|``, in strips: a matrix may be a gigabyte."""
    strips = (slice(a, a + width) for a in range(0, len(matrix), width))
    return max(float(np.abs(matrix[s] - matrix[:, s].T).max()) for s in strips)


def _count_problem(count) -> str | None:
    try:
        fits = math.isfinite(count) and int(count) == count and count >= 1
    except (TypeError, ValueError):
        fits = False
    return None if fits else f"count is {count!r}, expected the number of tokens"


def read_npz(path) -> SecondMoment:
    """The second moment in a statistics file of the ROME, MEMIT or EasyEdit code.

    They hold the *sum* of ``k kᵀ`` as "mom2.mom2" and the number of tokens as "mom2.count" (class
    SecondMoment of ``util/runningstats.py`` in https://github.com/kmeng01/rome). One file is one layer:
    ``SecondMoments({5: read_npz("transformer.h.5.mlp.c_proj_float32_mom2_100000.npz")})``. Nothing is
    unpickled. Raises StatisticsError where the file is anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prefix = "mom2." if "mom2.mom2" in arrays else ""
            total, count = arrays[prefix + "mom2"], arrays[prefix + "count"].item()
        return SecondMoment(total / total.dtype.type(count), count)
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise StatisticsError(f"there are no statistics at {path}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise StatisticsError(
            f"{path} is not a second-moment file (an .npz with mom2.mom2 and mom2.count): {error}"
        ) from None


def rows_a_step(params, length: int) -> int:
    """How many rows of `length` tokens each device runs together, by default."""
    device = next(iter(params["embed"]["tokens"].devices()))
    return max(1, (_CPU_TOKENS if device.platform == "cpu" else _ACCELERATOR_TOKENS) // length)


def second_moments(
    model: Decoder,
    tokenizer,
    corpus: Corpus = None,
    layers: tuple[int, ...] = (),
    *,
    max_tokens: int = 100_000,
    length: int = 512,
    batch: int | None = None,
    mesh: Mesh | None = None,
    cache: bool = True,
    checkpoint_every: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    dtype=None,
    implementation: str = "xla",
) -> SecondMoments:
    """Key second moments of `layers` over the first `max_tokens` tokens of a corpus.

    All layers come from one forward pass over packed documents, which stops at the keys of the last of them.

    corpus: see `jaxedit.data.corpus.read_corpus`; by default the packaged one, of about 150,000 tokens. There
        should be several times as many tokens as the model has MLP channels.
    layers: in any order. They cost one forward pass together.
    length: tokens a row, at most the model's context; longer documents are cut.
    batch: rows a step of all devices together, by default 8192 tokens' worth on each (on a CPU 2048).
    mesh: spread the rows over the "data" axis of a mesh; by default of the one that the model was loaded on. With
        several processes (see `jaxedit.distributed`) each takes its share of the rows, and all get the result.
    cache: keep the result on disk under a hash of weights, tokenizer, corpus and settings, and take it from
    there.
    checkpoint_every: tokens between checkpoints of the sums. A call with the same arguments resumes an
        interrupted one, on any mesh and with any number of processes; on the same ones it returns the same result
        bit for bit.
    on_progress: called with (tokens done, max_tokens) after each step.
    dtype: of the sums, by default float32 (float64 for a float64 model). The Gram matrix of a step is summed
        in float32 (float64) whatever the dtype of the keys, and then added to the sum of the earlier steps.
    implementation: of the Gram products: "xla"; "mosaic_gpu", a kernel for H100 and H200 with 16-bit weights that has
        not run on hardware yet; or "auto", the kernel where it can run. ``about["implementation"]`` of the result
        says which was used.

    Raises StatisticsError where layers are missing or not in the model, or keys are not finite; JaxEditError
    where the corpus cannot be read.
    """
    refuse_adapters(model, "gather second moments")
    config = model.config
    layers = _checked_layers(layers, config)
    if tokenizer is None:
        raise JaxEditError("this model came without a tokenizer; pass one")
    length = min(length, config.max_positions)
    sums = np.dtype(dtype) if dtype is not None else np.dtype(wide(model.dtype))
    about = {
        "corpus": corpus_hash(corpus),
        "tokenizer": tokenizer_hash(tokenizer),
        "max_tokens": max_tokens,
        "length": length,
        "dtype": str(sums),
    }
    params, stop = model.params, layers[-1] + 1
    content = (FORMAT, fingerprint(params, config, stop, edited=True), layers, sorted(about.items()))
    key = hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()
    file = cache_dir() / "moments" / f"{key}.safetensors"
    check_same("models, corpora or settings of second moments", content)
    found = _cached(file, layers) if cache else None
    if agree(found is not None) and found is not None:
        return found
    mesh = mesh if mesh is not None else mesh_of(params)
    if batch is None:
        batch = rows_a_step(params, length) * data_shards(mesh) * jax.process_count()
    if mesh is None or mesh.shape["model"] == 1:
        tokens = batch * length // (data_shards(mesh) * jax.process_count())
        device = next(iter(params["embed"]["tokens"].devices()))
        chosen = resolve_implementation(
            tokens, config.d_ff, model.dtype, sums, implementation=implementation, device=device
        )
        implementation = chosen.implementation
    else:
        implementation = "xla"
    unfinished = file.with_suffix(".partial")
    partial = PartialSums(unfinished / "sums", checkpoint_every or 0)
    matrices, count = moments_of_rows(
        params,
        config,
        pack_documents(tokenizer, read_corpus(corpus), length, max_tokens),
        layers,
        batch=batch,
        mesh=mesh,
        dtype=sums,
        on_tokens=None if on_progress is None else lambda done: on_progress(done, max_tokens),
        partial_sums=partial if checkpoint_every else None,
        implementation=implementation,
    )
    about["implementation"] = implementation
    made = SecondMoments.from_arrays(
        matrices, count, fingerprint=fingerprint(params, config, stop, edited=False), about=about
    )
    if cache and is_first():
        _keep(made, file)
    if checkpoint_every and is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
    return made


def _checked_layers(layers, config: ModelConfig) -> tuple[int, ...]:
    layers = tuple(layers) if layers is not None else ()
    wrong = [l for l in layers if not isinstance(l, (int, np.integer)) or not 0 <= l < config.n_layer]
    if not layers or wrong:
        what = f"there are no layers {wrong}" if wrong else "`layers` is empty; name at least one"
        raise StatisticsError(f"{what}: the model has layers 0 … {config.n_layer - 1}")
    return tuple(sorted({int(l) for l in layers}))


def _cached(file: Path, layers: tuple[int, ...]) -> SecondMoments | None:
    """What an earlier call left, or None. A damaged or foreign file is reported, and will be replaced."""
    if not file.exists():
        return None
    try:
        found = SecondMoments.load(file)
        if found.layers != layers:
            raise StatisticsError(f"{file} has layers {found.layers}, expected {layers}")
        return found
    except StatisticsError as error:
        warnings.warn(f"cached second moments are not usable and are computed again: {error}", stacklevel=3)
        return None


def _keep(made: SecondMoments, file: Path) -> None:
    try:
        made.save(file)
    except OSError as error:
        warnings.warn(f"the second moments could not be cached: {error}", stacklevel=3)
