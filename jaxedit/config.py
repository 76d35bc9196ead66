"""How an edit is made: frozen dataclasses that fill the slots of the pipeline, and presets per model."""

from __future__ import annotations

import dataclasses
import math

from jaxedit.errors import JaxEditError

SITES = ("block_out", "mlp_out", "attention_and_mlp")
KEYS = ("recomputed", "replayed")
KEY_AVERAGES = ("by_group", "flat", "clean")


def _check(of, positive=(), not_negative=(), shares=()):
    """Raise JaxEditError naming the field of a configuration whose value is out of range."""
    name = type(of).__name__
    for field in positive:
        if not 0 < getattr(of, field) < math.inf:
            raise JaxEditError(f"{name}.{field} must be positive and finite, got {getattr(of, field)}")
    for field in not_negative:
        if not 0 <= getattr(of, field) < math.inf:
            raise JaxEditError(f"{name}.{field} must be finite and not negative, got {getattr(of, field)}")
    for field in shares:
        if not 0 < getattr(of, field) <= 1:
            raise JaxEditError(f"{name}.{field} is a share, above 0 and at most 1, got {getattr(of, field)}")


def _check_choice(of, field: str, choices: tuple):
    if getattr(of, field) not in choices:
        listed = ", ".join(map(repr, choices))
        raise JaxEditError(f"{type(of).__name__}.{field} must be one of {listed}; got {getattr(of, field)!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """How anchors are optimised (see `jaxedit.targets.anchor`).

    steps: loss evaluations, so at most ``steps - 1`` updates. clamp: largest ‖δ‖ as a multiple of ‖h‖. threshold: an
        edit stops when its loss is below it.
    lr, betas: Adam's; (0.5, 0.9) took a quarter fewer steps than the published (0.9, 0.999), to smaller δ that disturb
        less and generalise slightly less (``benchmarks/results/step_rules_32_smollm2.json``).
    site: what δ is added to, and what targets are of: "block_out", the layer's output (MEMIT); "mlp_out", its MLP's
        output (ROME); or "attention_and_mlp", a δ of its own for each of the two, of which only the MLP's becomes a
        target (PMET).
    left_padded: positions as if the rows of an edit were padded on the left to the longest of them, which for
        learned positions moves the shorter ones (NAMET).
    tokens_per_step: suffix tokens optimised together, None for a default of the device; bounds memory.
    bucket_growth: largest over smallest suffix in a bucket of edits that one step cannot take together: fewer
        compilations against more padding.
    resident_rounds: edits held on the device, as a multiple of those optimised together.
    """

    steps: int = 25
    lr: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    clamp: float = 0.75
    kl_weight: float = 0.0625
    weight_decay: float = 0.5
    threshold: float = 5e-2
    site: str = "block_out"
    left_padded: bool = False
    tokens_per_step: int | None = None
    bucket_growth: float = 1.25
    resident_rounds: int = 8

    @property
    def of_mlp(self) -> bool:
        """Whether targets are of an MLP's output and not of its layer's."""
        return self.site != "block_out"

    def __post_init__(self):
        _check(self, positive=("lr", "clamp", "threshold"), not_negative=("kl_weight", "weight_decay"))
        _check_choice(self, "site", SITES)
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise JaxEditError(f"AnchorConfig.betas must be two numbers from 0 to below 1, got {self.betas}")
        if self.steps < 1 or self.resident_rounds < 1 or self.bucket_growth < 1:
            raise JaxEditError("AnchorConfig.steps, resident_rounds and bucket_growth must be at least 1")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise JaxEditError(f"AnchorConfig.tokens_per_step must be positive, got {self.tokens_per_step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardSpread:
    """An anchor at the last edited layer; the residual that remains there is spread over the layers left to edit.

    divide: by the number of layers left (True, MEMIT), by its square root ("sqrt", PMET), or not at all (False).
    """

    divide: bool | str = True

    def __post_init__(self):
        if self.divide not in (True, False, "sqrt"):
            raise JaxEditError(f"BackwardSpread.divide must be True, False or 'sqrt', got {self.divide!r}")

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers[-1:]

    def share(self, layers_left: int) -> float:
        """What part of the residual the next layer takes, with `layers_left` of them still to edit."""
        return {True: 1 / layers_left, False: 1.0, "sqrt": layers_left**-0.5}[self.divide]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacobianSpread(BackwardSpread):
    """A BackwardSpread that asks of a layer not the residual itself but the least change that becomes it: the δ that
    minimises ``‖J δ − R‖² + damping ‖δ‖²``, with J from this layer's output to the last one's (FE, eq. 7) on the model
    as edited so far, and R this layer's share of the residual (`divide`).

    iterations: of conjugate gradients, each one product with J and one with its transpose, at one token an edit.
    """

    divide: bool | str = False
    damping: float = 1.0
    iterations: int = 10

    def __post_init__(self):
        super().__post_init__()
        _check(self, not_negative=("damping",))
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise JaxEditError(f"JacobianSpread.iterations must be a whole number from 1 on, got {self.iterations}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardReplay:
    """An anchor at the first edited layer; later targets are what the model makes of it (FE, §5)."""

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers[:1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer:
    """An anchor of its own at each edited layer, found on the model as edited so far (BLUE)."""

    def anchor_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers


Strategy = BackwardSpread | JacobianSpread | ForwardReplay | PerLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ridge:
    """``ΔW = (λC + l2·I + KᵀK)⁻¹ KᵀR`` with λ = `cov_weight` (MEMIT, eq. 14; FE, eq. 5)."""

    cov_weight: float = 15000.0
    l2: float = 0.0

    def __post_init__(self):
        _check_matrix(self)


def _check_matrix(of):
    _check(of, not_negative=("cov_weight", "l2"))
    if of.cov_weight == 0 and of.l2 == 0:
        name = type(of).__name__
        raise JaxEditError(f"{name} needs cov_weight > 0 or l2 > 0; with neither nothing protects other knowledge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualityConstrained:
    """``ΔW = A⁻¹Kᵀ (K A⁻¹ Kᵀ + slack·I)⁻¹ R`` with ``A = λC + l2·I``: targets are met exactly, or up to `slack`, and
    other keys are disturbed least (EMMET, eq. 9; with one edit, ROME, eq. 2).

    denominator: the keys that meet the targets, on the left of the inverse: "same", those that are written (R-ROME),
        or "clean", those of the clean prompt alone, though contexts are averaged in what is written (ROME as
        published, which disables models after some edits).
    cov_weight=0 with l2=1 is the published option without second moments.
    """

    cov_weight: float = 1.0
    l2: float = 0.0
    slack: float = 0.0
    denominator: str = "same"

    def __post_init__(self):
        _check_matrix(self)
        _check(self, not_negative=("slack",))
        _check_choice(self, "denominator", ("same", "clean"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NullSpace:
    """``ΔW = (P KᵀK + l2·I)⁻¹ P KᵀR`` with P the projection onto what other keys hardly use: eigenvectors of C with
    small eigenvalues (AlphaEdit, eq. 13).

    measure: what is small: an eigenvalue below `threshold` ("absolute", as published, which depends on the scale of a
        model's keys), below `threshold` times the largest one ("relative"), or the smallest ones that together are at
        most the share `threshold` of their sum ("energy").
    """

    threshold: float = 2e-2
    measure: str = "absolute"
    l2: float = 10.0

    def __post_init__(self):
        _check(self, positive=("threshold", "l2"))
        _check_choice(self, "measure", ("absolute", "relative", "energy"))
        if self.measure != "absolute":
            _check(self, shares=("threshold",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronSubset:
    """Ridge on the channels in which the keys of the edits are largest, in rounds (NSE).

    share: of the sum of all |key| that the chosen channels hold. rounds: how often all layers are edited; before each
    one the edits whose residual at the last layer is not above `lower` and below `upper` (None: no limit) drop out.
    """

    cov_weight: float = 15000.0
    share: float = 0.8
    rounds: int = 2
    lower: float = 0.0
    upper: float | None = None

    def __post_init__(self):
        _check(self, positive=("cov_weight",), not_negative=("lower",), shares=("share",))
        if self.rounds < 1 or not (self.upper is None or self.lower < self.upper):
            raise JaxEditError("NeuronSubset needs rounds of at least 1, and lower < upper")


Solver = Ridge | EqualityConstrained | NullSpace | NeuronSubset
WHEN = ("layer", "end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeSparsify:
    """Only the largest entries of ΔW are kept (RECT).

    measure: "relative", ``|ΔW / (W + epsilon)|``, or "absolute", ``|ΔW|``. keep: the share of entries that stay.
    when: "layer", before the layers above are solved, or "end", when all are.

    Three definitions were published: `original`, `alphaedit` (the default) and `fe`.
    """

    keep: float = 0.4
    measure: str = "relative"
    epsilon: float = 1e-8
    when: str = "end"

    def __post_init__(self):
        _check(self, not_negative=("epsilon",), shares=("keep",))
        _check_choice(self, "measure", ("relative", "absolute"))
        _check_choice(self, "when", WHEN)

    @classmethod
    def original(cls) -> RelativeSparsify:
        """RECT's own code: the fifth of the entries that change most, relatively."""
        return cls(keep=0.2, epsilon=0.0)

    @classmethod
    def alphaedit(cls) -> RelativeSparsify:
        """AlphaEdit's code: 40 %, by relative change, of updates that were solved without it."""
        return cls()

    @classmethod
    def fe(cls) -> RelativeSparsify:
        """FE's code: 60 %, by size, before the layers above are solved."""
        return cls(keep=0.6, measure="absolute", when="layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralClamp:
    """Singular values of ΔW that are at least the largest one s of W are brought down towards it (PRUNE).

    growth: "log" (published), "log2", "log1.5", "log1.2": ``log x - log s + s`` with that base; "linear":
        ``(x + s) / 2``.
    when: "layer" (FE's code), before the layers above are solved, or "end" (PRUNE's), when all are.
    """

    growth: str = "log"
    when: str = "layer"

    def __post_init__(self):
        _check_choice(self, "growth", ("log", "log2", "log1.5", "log1.2", "linear"))
        _check_choice(self, "when", WHEN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralSparsify:
    """Of ΔW the first share `rank` of its singular triplets is kept, and of each singular vector the share `keep` of
    largest entries; both sides are scaled back to their norms (AdaEdit).

    Where the update has fewer triplets than that, published code takes arbitrary vectors with singular value 0 into
    those norms, which moves the scale by up to a per cent, in another way with each LAPACK; here they are left out.
    """

    rank: float = 0.6
    keep: float = 0.6
    when: str = "layer"

    def __post_init__(self):
        _check(self, shares=("rank", "keep"))
        _check_choice(self, "when", WHEN)


Regulariser = RelativeSparsify | SpectralClamp | SpectralSparsify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One locate-then-edit method: where targets come from, how they are solved for, what updates are trimmed to, and
    in which layers.

    keys: "recomputed" takes each layer's keys after the layers below are edited (as published); "replayed" takes
        all keys from the replay of the anchor, so that every layer is factored and solved at once (ForwardReplay).
    key_average: of the keys in all contexts: "by_group", the mean over groups of templates of the mean within a group
        (MEMIT); "flat", over all contexts alike (ROME); "clean", the clean prompt's alone.
    at_once: edits that are made together, the next ones on the model edited so far; None for all (ROME: 1).
    protect: hold the keys of earlier edits in place when a result is edited further.
    """

    name: str
    targets: Strategy
    layers: tuple[int, ...]
    solver: Solver = Ridge()
    regulariser: Regulariser | None = None
    anchor: AnchorConfig = AnchorConfig()
    keys: str = "recomputed"
    key_average: str = "by_group"
    at_once: int | None = None
    protect: bool = True

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or min(self.layers) < 0:
            raise JaxEditError(f"layers must be different, not negative, and in rising order, got {self.layers}")
        _check_choice(self, "keys", KEYS)
        _check_choice(self, "key_average", KEY_AVERAGES)
        if self.keys == "replayed" and not isinstance(self.targets, ForwardReplay):
            raise JaxEditError("keys='replayed' needs targets made by ForwardReplay")
        if self.at_once is not None and self.at_once < 1:
            raise JaxEditError(f"Method.at_once must be at least 1, got {self.at_once}")
