"""The options of every loss, and what it says of itself. No torch here.

A field's docstring is its `--help`. `Free` fields change neither weights nor metrics, so a run may
be resumed with other values of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from superclip.errors import UserError


def free(default: Any) -> Any:
    """A field that may differ between a run and its continuation."""
    return field(default=default, metadata={"free": True})


def at_least_one(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def refuse_set(options: Any, names: Iterable[str], why: str) -> None:
    """Raises UserError for an option that has no effect here but was given another value."""
    defaults = {f.name: f.default for f in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')} {why}; leave it out")


Temperature = Literal["learnable", "constant", "individual", "none"]


@dataclass(frozen=True)
class LossOptions:
    """What every loss says of itself beside its options.

    Attributes:
        temperature: learnable (the model's logit scale), constant, individual (the loss keeps one
            of each sample, and the logit scale stays where it begins), or none (it reads no
            temperature at all).
        init_scale: the logit scale that its paper begins with.
        lr_tau: learning rate of individual temperatures.
        keeps_samples: whether it keeps numbers of every sample, idle in the first pass.
    """

    temperature: ClassVar[Temperature] = "learnable"
    init_scale: ClassVar[float] = 1 / 0.07
    lr_tau: ClassVar[float] = 0.0
    keeps_samples: ClassVar[bool] = False


@dataclass(frozen=True)
class ClipOptions(LossOptions):
    """Options of `--loss clip`: none."""


@dataclass(frozen=True)
class SuperClipOptions(LossOptions):
    """Options of `--loss superclip` (Zhao et al., NeurIPS 2025)."""

    token_loss: Literal["idf", "bce"] = "idf"
    """idf: softmax cross-entropy on IDF-weighted soft labels (the paper). bce: multi-hot binary
    cross-entropy."""
    token_weight: float = 1.0
    """Weight of the token term beside the contrastive term."""
    head_input: Literal["patches", "pooled"] = "patches"
    """patches: mean of the patch tokens after the final LayerNorm, LayerNorm, Linear (the paper).
    pooled: the projected image feature, one Linear."""
    head_vocab: Literal["full", "seen"] = "full"
    """full: the tokenizer's whole vocabulary. seen: only tokens that occur in the training
    captions; the rest are never positive, and on small closed vocabularies they cost a third of the
    step."""
    keep_special_tokens: bool = False
    """Supervise start, end and padding ids too, as the published runs did."""

    def __post_init__(self) -> None:
        if not self.token_weight > 0:
            raise UserError(
                f"--token-weight {self.token_weight} must be above 0; without it use --loss clip"
            )


def _within(options: Any, low: float, high: float, *names: str) -> None:
    """Raises UserError for what lies outside (low, high]."""
    for name in names:
        if not low < getattr(options, name) <= high:
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UserError(f"{flag} must lie in ({low:g}, {high:g}]")


@dataclass(frozen=True)
class TableOptions(LossOptions):
    """Options of every loss that keeps a normaliser of each picture and each caption."""

    keeps_samples: ClassVar[bool] = True
    loss_state_device: Literal["device", "host"] = free("device")
    """Where the table lies: 4 bytes a number and sample on the device, or in main memory."""
    communication: Literal["reduction", "gather"] = free("reduction")
    """reduction: features are gathered without gradient, and a few numbers a sample (FastCLIP).
    gather: the differentiable gather, as in open_clip. Equal gradients."""


@dataclass(frozen=True)
class SogClrOptions(TableOptions):
    """Options of `--loss sogclr` (Yuan et al., ICML 2022)."""

    temperature: ClassVar[Temperature] = "constant"
    init_scale: ClassVar[float] = 100.0
    gamma: float = 0.8
    """Weight of this batch's normaliser in the moving average."""
    normalizer_eps: float = 1e-10
    """Added to the normaliser."""
    include_positive: bool = False
    """Count the positive among the negatives, as the released code does."""

    def __post_init__(self) -> None:
        _within(self, 0, 1, "gamma")
        _within(self, 0, 1, "normalizer_eps")


@dataclass(frozen=True)
class RobustOptions(TableOptions):
    """Options of the losses that keep a temperature of each picture and each caption."""

    temperature: ClassVar[Temperature] = "individual"
    rho: float = 8.0
    """Weight of the temperature itself in the robust objective: the larger, the lower temperatures
    are pushed (radius of its KL ball)."""
    tau_range: tuple[float, float] = (0.005, 1.0)
    """Least and largest temperature of a sample."""
    normalizer_eps: float = 1e-10
    """Added to the normaliser: it bounds the weight of easy samples."""

    def __post_init__(self) -> None:
        _within(self, 0, 1, "normalizer_eps")
        _check_rho(self.rho)
        low, high = self.tau_range
        if not 0 < low < high <= 10:
            raise UserError(f"--tau-range {low} {high} must satisfy 0 < least < largest <= 10")


def _check_rho(rho: float) -> None:
    if not 0 <= rho < math.inf:
        raise UserError(f"--rho {rho} must not be negative")


@dataclass(frozen=True)
class ISogClrOptions(RobustOptions):
    """Options of `--loss isogclr` (Qiu et al., ICML 2023)."""

    init_scale: ClassVar[float] = 100.0
    lr_tau: ClassVar[float] = 0.03
    gamma: float = 0.8
    """Weight of this batch's normaliser in the moving average."""
    tau_momentum: float = 0.9
    """Weight of the new gradient in the temperature's step (the paper's beta)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self, 0, 1, "gamma", "tau_momentum")


@dataclass(frozen=True)
class FallingGamma:
    """The weight of this batch's normaliser falls from 1, epoch by epoch (FastCLIP)."""

    gamma: float = 0.2
    """Least weight of this batch's normaliser in the moving average; 1 in the first epoch."""
    gamma_schedule: Literal["cosine", "constant"] = "cosine"
    """How the weight falls from 1: along half a cosine, or at once after the first epoch."""
    gamma_decay_epochs: int | None = None
    """Epochs until it is least. Default: half of the run's."""

    def check_gamma(self) -> None:
        """Raises UserError for what is no weight."""
        _within(self, 0, 1, "gamma")
        at_least_one(self, "gamma_decay_epochs")
        if self.gamma_schedule == "constant" and self.gamma_decay_epochs is not None:
            raise UserError("--gamma-decay-epochs goes with --gamma-schedule cosine")

    def gamma_at(self, epoch: int, epochs: int) -> float:
        """The weight in an epoch counted from 0.

        >>> [round(FallingGamma(0.2).gamma_at(e, 8), 3) for e in range(6)]
        [1.0, 0.883, 0.6, 0.317, 0.2, 0.2]
        """
        fall = self.gamma_decay_epochs or max(1, epochs // 2)
        if epoch == 0:
            return 1.0
        if epoch >= fall or self.gamma_schedule == "constant":
            return self.gamma
        return self.gamma + 0.5 * (1 - self.gamma) * (1 + math.cos(math.pi * epoch / fall))


@dataclass(frozen=True)
class FastClipOptions(FallingGamma, TableOptions):
    """Options of `--loss fastclip-v0`, `-v1` and `-v3` (Wei et al. 2024)."""

    normalizer_eps: float = 1e-14
    """Added to the normaliser: it bounds the weight of easy samples (1e-6 in LAION400M's runs)."""

    def __post_init__(self) -> None:
        self.check_gamma()
        _within(self, 0, 1, "normalizer_eps")


@dataclass(frozen=True)
class FastClipV0Options(FastClipOptions):
    """Options of `--loss fastclip-v0`: one learnable temperature, no factor before the log."""

    published_tau_gradient: bool = False
    """Weigh the temperature's gradient through the normaliser twice, as the released code does."""


@dataclass(frozen=True)
class FastClipV1Options(FastClipOptions):
    """Options of `--loss fastclip-v1`: SogCLR with the falling weight."""

    temperature: ClassVar[Temperature] = "constant"


@dataclass(frozen=True)
class FastClipV2Options(FallingGamma, RobustOptions):
    """Options of `--loss fastclip-v2`: iSogCLR with the falling weight and Adam's steps."""

    init_scale: ClassVar[float] = 1 / 0.03
    lr_tau: ClassVar[float] = 0.0133
    rho: float = 7.0
    """Weight of the temperature itself in the robust objective: the larger, the lower temperatures
    are pushed (radius of its KL ball)."""
    tau_range: tuple[float, float] = (0.01, 1.0)
    """Least and largest temperature of a sample."""
    normalizer_eps: float = 1e-14
    """Added to the normaliser: it bounds the weight of easy samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_gamma()


@dataclass(frozen=True)
class FastClipV3Options(FastClipOptions):
    """Options of `--loss fastclip-v3`: the robust objective with one learnable temperature."""

    rho: float = 6.5
    """Weight of the temperature itself in the robust objective: the larger, the lower temperatures
    are pushed (radius of its KL ball; 8.5 on CC12M, 16 on
    LAION400M)."""
    published_tau_gradient: bool = False
    """Weigh the temperature's gradient through the normaliser twice, as the released code does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rho(self.rho)


@dataclass(frozen=True)
class NeuClipOptions(LossOptions):
    """Options of `--loss neuclip` (Wei et al., ICLR 2026); defaults of its DFN-14M run."""

    communication: Literal["reduction", "gather"] = free("reduction")
    """reduction: features are gathered without gradient, and a few numbers a sample. gather: the
    differentiable gather, as in open_clip. Equal gradients."""
    rho: float = 11.0
    """Weight of the temperature itself in the robust objective: the larger, the lower temperatures
    are pushed (radius of its KL ball)."""
    normalizer_eps: float = 1e-6
    """Added to the normaliser: it bounds the weight of easy samples."""
    npn_num_protos: int = 4096
    """Prototypes of each modality."""
    npn_repetition: int = 10
    """Steps of the network on each batch; 0 leaves it at its last restart."""
    npn_restart_iter: int = 500
    """Steps between two restarts from recent features."""
    npn_lr: float = 1.0
    """AdaGrad's learning rate."""
    npn_adagrad: Literal["coordinate", "norm"] = "coordinate"
    """coordinate: an accumulator of each number, as torch's. norm: one a modality, which fits worse
    (on scenes the log-normalisers lay .14 from the batch's at the end, with coordinate .09)."""
    npn_accumulator: float = 0.0
    """What AdaGrad's accumulators begin with."""
    npn_reset: bool = True
    """Begin AdaGrad anew at a restart. Left open by the paper."""
    npn_own_partner: bool = False
    """Let a restart take the current batch's features, an anchor's own partner among them. Left
    open by the paper."""

    def __post_init__(self) -> None:
        _within(self, 0, 1, "normalizer_eps")
        _check_rho(self.rho)
        at_least_one(self, "npn_num_protos", "npn_restart_iter")
        _within(self, 0, math.inf, "npn_lr")
        if self.npn_repetition < 0 or not 0 <= self.npn_accumulator < math.inf:
            raise UserError("--npn-repetition and --npn-accumulator must not be negative")
        if not self.npn_repetition:
            idle = "npn_lr", "npn_adagrad", "npn_accumulator", "npn_reset"
            refuse_set(self, idle, "is AdaGrad's, and --npn-repetition 0 takes none of its steps")


def _not_negative(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < math.inf:
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UserError(f"{flag} must not be negative")


@dataclass(frozen=True)
class CyClipOptions(LossOptions):
    """Options of `--loss cyclip` (Goel et al., NeurIPS 2022)."""

    lambda_in_modal: float = 0.25
    """Weight of the penalty on pictures that are not as alike as their captions."""
    lambda_cross_modal: float = 0.25
    """Weight of the penalty on similarities that are not symmetric."""

    def __post_init__(self) -> None:
        _not_negative(self, "lambda_in_modal", "lambda_cross_modal")
        if not self.lambda_in_modal + self.lambda_cross_modal:
            raise UserError("--lambda-in-modal 0 --lambda-cross-modal 0: use --loss clip")


@dataclass(frozen=True)
class VicRegOptions(LossOptions):
    """Options of `--loss vicreg` (Bardes et al., ICLR 2022)."""

    temperature: ClassVar[Temperature] = "none"
    sim_coeff: float = 25.0
    """Weight of the squared distance between partners."""
    std_coeff: float = 25.0
    """Weight of the hinge that keeps every dimension's standard deviation at 1 or above."""
    cov_coeff: float = 1.0
    """Weight of the squared covariances between dimensions."""

    def __post_init__(self) -> None:
        _not_negative(self, "sim_coeff", "std_coeff", "cov_coeff")


@dataclass(frozen=True)
class OnlineClrOptions(LossOptions):
    """Options of `--loss onlineclr` (the contrastive loss of that name in iSogCLR's code)."""

    temperature: ClassVar[Temperature] = "constant"
    init_scale: ClassVar[float] = 100.0
    gamma: float = 0.8
    """Weight of this batch in the two moving averages."""
    positive_tau_ratio: float = 10.0
    """The positives' temperature over the negatives', which is 1 / --init-scale."""

    def __post_init__(self) -> None:
        _within(self, 0, 1, "gamma")
        _within(self, 0, 1e4, "positive_tau_ratio")


@dataclass(frozen=True)
class SigLipOptions(LossOptions):
    """Options of `--loss siglip` (Zhai et al., ICCV 2023)."""

    init_scale: ClassVar[float] = 10.0
    init_bias: float = -10.0
    """Where the learnable bias of the logits begins: at -10 a pair is taken for a wrong one, as
    nearly all are."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.init_bias):
            raise UserError(f"--init-bias {self.init_bias} is no number to begin with")


LOSS_OPTIONS: dict[str, type[LossOptions]] = {
    "clip": ClipOptions,
    "superclip": SuperClipOptions,
    "sogclr": SogClrOptions,
    "isogclr": ISogClrOptions,
    "fastclip-v0": FastClipV0Options,
    "fastclip-v1": FastClipV1Options,
    "fastclip-v2": FastClipV2Options,
    "fastclip-v3": FastClipV3Options,
    "neuclip": NeuClipOptions,
    "cyclip": CyClipOptions,
    "vicreg": VicRegOptions,
    "onlineclr": OnlineClrOptions,
    "siglip": SigLipOptions,
}
