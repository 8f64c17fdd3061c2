"""What a run is: frozen dataclasses, checked when they are built. No torch here.

A field's docstring is its `--help`. `Free` fields change neither weights nor metrics, so a run may
be resumed with other values of them.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from superclip.errors import UserError, nearest
from superclip.loss_options import LOSS_OPTIONS, LossOptions, at_least_one, free, refuse_set

Precision = Literal["auto", "fp32", "amp", "amp_bf16"]


def is_scenes(spec: str) -> bool:
    """Whether a data name means generated scenes.

    >>> is_scenes("scenes:val"), is_scenes("scenes/val-000000.tar")
    (True, False)
    """
    return spec.partition(":")[0] == "scenes"


def check_seed(flag: str, seed: int | None) -> None:
    """Raises UserError for what no generator takes."""
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"{flag} {seed} must lie in 0..2^63 - 1")


Options = TypeVar("Options", bound=LossOptions)


TOWER_OPTIONS = ["image_weights", "text_weights", "embed_dim", "image_size", "text_pooling"]


@dataclass(frozen=True)
class ImageReduction:
    """How many patches of a training picture the vision tower sees (CLIPA, section 3.1).

    Attributes:
        kind: resize (a smaller picture), or a mask.
        value: pixels a side; of a mask the share of patches that stay.
    """

    kind: Literal["resize", "random", "grid", "block"]
    value: float

    @staticmethod
    def parse(text: str) -> ImageReduction:
        """`KIND:VALUE`.

        >>> str(ImageReduction.parse("random:0.50")), ImageReduction.parse("block:0.25").kept(14)
        ('random:0.5', 49)

        Raises:
            UserError: for anything else.
        """
        kind, _, number = text.partition(":")
        if kind not in typing.get_args(typing.get_type_hints(ImageReduction)["kind"]):
            raise UserError(
                f"--image-reduction {text}: write resize:SIZE, random:KEEP, grid:KEEP or block:KEEP"
            )
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind == "resize" and not (1 <= value < 1e6 and value == int(value)):
            raise UserError(f"--image-reduction {text}: SIZE is a whole number of pixels")
        if kind != "resize" and not 0 < value < 1:
            raise UserError(f"--image-reduction {text}: KEEP is a share between 0 and 1")
        return ImageReduction(kind, value)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    def kept(self, side: int) -> int:
        """Patches that stay of `side` x `side`.

        random: the whole part of the share, at least 1. grid: one of each window of 2 x 2 (KEEP
        1/4), 3 x 3 (1/9), ... block: the square nearest to the share.

        Raises:
            UserError: for a grid whose windows don't tile the picture, or a block that keeps all.
        """
        if self.kind == "resize":
            return side * side
        if self.kind == "random":
            return max(1, math.floor(side * side * self.value + 1e-9))
        if self.kind == "block":
            edge = max(1, round(side * self.value**0.5))
            if edge >= side:
                raise UserError(
                    f"--image-reduction {self} keeps all of {side} x {side} patches; keep fewer"
                )
            return edge**2
        window = round(self.value**-0.5)
        if abs(window**-2 - self.value) > 0.01 * self.value or side % window or window < 2:
            ways = [f"{n**-2:.4g}" for n in range(2, side + 1) if side % n == 0]
            raise UserError(
                f"--image-reduction {self}: windows must tile the {side} x {side} patches: "
                f"{'KEEP ' + ', '.join(ways) if ways else 'none do; use random or block'}"
            )
        return (side // window) ** 2


@dataclass(frozen=True)
class ModelConfig:
    model: str = "scenes-vit"
    """An open_clip model name, one of superclip/model_configs (scenes-vit, small-vit), or a JSON
    file."""
    pretrained: str | None = None
    """An open_clip tag (openai, laion2b_s34b_b79k, ...) or a local file of open_clip weights."""
    init_from: Path | None = None
    """A run (its folder or a checkpoint) whose weights this one begins with, at another resolution
    or context length: position embeddings are interpolated. The token head comes along where its
    columns are the same; optimizer, IDF counts and the loss's own numbers begin anew."""
    init_scale: float | None = None
    """Initial scale of the logits (1 / temperature). Default: that of the loss's paper, or of the
    weights that the run begins with."""
    image_positions: Literal["learnable", "frozen"] | None = None
    """Whether the vision tower's position embeddings learn. Default: as the model says (sin-cos
    ones are frozen)."""
    image_reduction: str | None = None
    """Fewer image tokens in training (CLIPA): resize:SIZE trains on smaller pictures; random:KEEP,
    grid:KEEP or block:KEEP keep a share of the patches (grid:0.25 one of each 2 x 2), drawn anew
    each epoch. Evaluation sees all patches (of the smaller picture)."""
    grad_checkpointing: bool = free(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = free(False)
    """torch.compile the two towers, each as one graph."""
    image_tower: str | None = None
    """With --text-tower, in the place of --model: timm/NAME (timm/resnet50), or timm/FOLDER with a
    local copy of a timm repository (config.json and weights)."""
    text_tower: str | None = None
    """With --image-tower: hf/NAME of a Hugging Face encoder (hf/distilbert-base-uncased), or
    hf/FOLDER with a local copy. The checkpoint does not open in plain open_clip."""
    image_weights: str | None = None
    """published (the default: those of the name or folder), random, or a local file of weights of
    the image tower."""
    text_weights: Literal["published", "random"] | None = None
    """The same of the text tower; its folder holds them."""
    embed_dim: int | None = None
    """Dimensions of the joint space of the two towers, each with a linear head. Default: 256."""
    image_size: int | None = None
    """Pixels a side for --image-tower. Default: the tower's own."""
    context_length: int | None = None
    """Tokens of a text, start and end among them. Default: that of --model; 30 for
    --text-tower."""
    text_pooling: Literal["cls", "mean"] | None = None
    """What --text-tower makes of its last states: the first of them (cls, the default), or the mean
    over the text."""

    def __post_init__(self) -> None:
        if self.init_scale is not None and not 1 <= self.init_scale <= 100:
            raise UserError(f"--init-scale {self.init_scale} must lie in [1, 100]")
        at_least_one(self, "embed_dim", "image_size")
        if self.context_length is not None and self.context_length < 3:
            raise UserError(f"--context-length {self.context_length} must be at least 3")
        if self.init_from is not None and self.pretrained is not None:
            raise UserError("--init-from and --pretrained both say where to begin; leave one out")
        if self.image_reduction is not None:
            ImageReduction.parse(self.image_reduction)
        self._check_towers()

    def _check_towers(self) -> None:
        kinds = {"image_tower": "timm", "text_tower": "hf"}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and (not value.startswith(f"{kind}/") or value == f"{kind}/"):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value!r}: spell it {kind}/NAME or {kind}/FOLDER")
        if (self.image_tower is None) != (self.text_tower is None):
            raise UserError("--image-tower timm/NAME and --text-tower hf/NAME go together")
        if self.image_tower is None:
            for name in TOWER_OPTIONS:
                if getattr(self, name) is not None:
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(f"{flag} goes with --image-tower and --text-tower")
            return
        for name, default in (
            ("model", ModelConfig.model),
            ("pretrained", None),
            ("init_from", None),
            ("image_positions", None),
        ):
            if getattr(self, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} goes with --model, not with "
                    "--image-tower; leave one out"
                )
        if self.reduction is not None:
            raise UserError("--image-reduction goes with --model; a tower has --image-size")

    @property
    def reduction(self) -> ImageReduction | None:
        return ImageReduction.parse(self.image_reduction) if self.image_reduction else None

    @property
    def name(self) -> str:
        """What the model is called; of local folders the last part alone.

        >>> ModelConfig(image_tower="timm/resnet50", text_tower="hf//home/ada/distilbert").name
        'timm/resnet50 + hf/distilbert'
        """
        if self.image_tower is None or self.text_tower is None:
            return self.model
        return " + ".join(
            f"{kind}/{Path(rest).name}" if rest.startswith(("/", ".", "~")) else f"{kind}/{rest}"
            for kind, _, rest in (t.partition("/") for t in (self.image_tower, self.text_tower))
        )

    @property
    def from_scratch(self) -> bool:
        """Whether every weight is drawn at random at the start."""
        if self.image_tower is None:
            return self.pretrained is None and self.init_from is None
        return self.image_weights == self.text_weights == "random"


@dataclass(frozen=True)
class DataConfig:
    train_data: str = "scenes"
    """scenes (generated), tar shards ('shards/train-{000000..000003}.tar'), coco:FOLDER[:SPLIT], or
    a stream (pipe:COMMAND, http://...), which promises less. A::B joins several."""
    train_data_weights: tuple[float, ...] | None = None
    """How often the pictures of each of several sources come in one pass: 2 is twice, 0.5 every
    other pass. Default: once each."""
    val_data: str | None = None
    """Held-out data, spelled like --train-data. Default: scenes' val split, or the val shards of
    the manifest beside the training shards."""
    train_num_samples: int | None = None
    """Pictures per epoch (the first N of the data). Default: all; 115 200 fresh scenes."""
    resize: Literal["crop", "squash", "pad"] = "crop"
    """How pictures become squares: shortest side and centre crop, squashed, or longest side and
    padding."""
    aug_scale: tuple[float, float] | None = None
    """Area range of the random training crop. Default 0.9 1.0 (open_clip's), none on scenes or with
    squash/pad."""
    color_jitter: tuple[float, float, float, float] | None = None
    """Random change of brightness, contrast, saturation and hue in training: their strengths, as
    0.32 0.32 0.32 0.08."""
    color_jitter_prob: float = 0.8
    """Share of the training pictures that --color-jitter changes."""
    gray_scale_prob: float = 0.0
    """Share of the training pictures that lose all colour."""
    text_reduction: Literal["truncate", "random", "shuffle", "block", "syntax"] = "truncate"
    """What training keeps of a caption longer than --context-length (CLIPA): its beginning, a
    random part of the tokens in their order or shuffled, a window, or nouns, adjectives and verbs
    first (syntax: needs a tagger or packed tags). Evaluation truncates."""
    workers: int = free(0)
    """Reader processes per rank; 0 reads in the training process."""
    reader_timeout: float = free(300.0)
    """Seconds after which a reader that hangs is named and the run ends."""
    max_skip_rate: float = free(0.01)
    """Share of unreadable pictures (replaced and counted) above which the run stops."""
    data_seed: int = 0
    """Seed of the generated scenes."""

    def __post_init__(self) -> None:
        if self.train_num_samples is not None and not 1 <= self.train_num_samples <= 10**10:
            raise UserError(f"--train-num-samples {self.train_num_samples} must lie in 1..10^10")
        if self.val_data is not None and not self.val_data:
            raise UserError("--val-data is empty; name held-out data, or leave the flag out")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers} must not be negative")
        if not self.reader_timeout > 0:
            raise UserError(f"--reader-timeout {self.reader_timeout} must be above 0")
        for name in ("max_skip_rate", "color_jitter_prob", "gray_scale_prob"):
            if not 0 <= getattr(self, name) <= 1:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} must lie in [0, 1]")
        if self.color_jitter is None:
            refuse_set(self, ["color_jitter_prob"], "goes with --color-jitter")
        elif not any(self.color_jitter) or not self.color_jitter_prob:
            raise UserError("--color-jitter changes nothing so; leave it out")
        elif not all(0 <= x <= most for x, most in zip(self.color_jitter, (9, 9, 9, 0.5))):
            raise UserError(
                f"--color-jitter {' '.join(map(str, self.color_jitter))}: strengths must not be "
                "negative, and the last (hue) at most 0.5"
            )
        check_seed("--data-seed", self.data_seed)
        weights, parts = self.train_data_weights, self.train_data.count("::") + 1
        if weights is not None and (len(weights) != parts or not all(0 < w < 1e3 for w in weights)):
            raise UserError(
                f"--train-data-weights {' '.join(map(str, weights))}: give one number above 0 for "
                f"each of the {parts} source(s) in --train-data"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"--aug-scale {low} {high} must satisfy 0 < low <= high <= 1")

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Area range of the random crop; (1, 1) means no crop is drawn."""
        if self.aug_scale is not None:
            return self.aug_scale
        plain = is_scenes(self.train_data) or self.resize != "crop"
        return (1.0, 1.0) if plain else (0.9, 1.0)


@dataclass(frozen=True)
class OptimConfig:
    epochs: int | None = None
    """Passes over the data. Default: 1 on scenes, 20 elsewhere."""
    batch_size: int | None = free(None)
    """Pairs per process and micro-step, as in open_clip (default 64); beside --global-batch-size,
    the most of them that fit the memory."""
    accum_freq: int = free(1)
    """Micro-steps per optimizer step; the contrastive loss still sees all of them at once."""
    global_batch_size: int | None = None
    """Pairs per optimizer step over all processes; kept when their number changes, and with it the
    run. Default: batch size x micro-steps x processes."""
    optimizer: Literal["adamw", "adam", "sgd", "lamb", "lion"] = "adamw"
    """adamw, adam, sgd: torch's; lamb, lion: timm's."""
    lr: float | None = None
    """Peak learning rate. Default: 5e-4 from scratch, 5e-5 from pretrained weights. Tune it per
    loss."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    wd: float | None = None
    """Weight decay; never on norms, biases, other 1-D parameters or the logit scale. Default: 0.1
    with adamw and lion, where it is decoupled, and lamb; 0 with adam and sgd, which add it to the
    gradient: .1 would crush the weights there."""
    momentum: float = 0.9
    """Of --optimizer sgd."""
    nesterov: bool = False
    """Of --optimizer sgd."""
    warmup: int = 50
    """Steps of linear warm-up before the cosine decay to --lr-min."""
    lr_min: float = 0.0
    """Learning rate at the end of the run."""
    lr_tau: float | None = None
    """Learning rate of the temperature; 0 holds it constant. Default: --lr (FastCLIP-v3 was
    published with a fifth to a quarter of it, NeuCLIP with an eighth); of a loss that keeps one of
    each sample, its paper's (.0133 fastclip-v2, .03 isogclr)."""
    lr_tau_schedule: Literal["cosine", "const", "step_thresh"] = "cosine"
    """Of the logit scale: as --lr, constant, or a third of it once the temperature is at most .03
    (FastCLIP)."""
    grad_clip_norm: float | None = 1.0
    """Largest gradient norm, of the two towers, of the token head and of the loss's own parameters
    each by itself."""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "accum_freq", "global_batch_size", "epochs")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr {self.lr} must be above 0")
        if self.lr == math.inf:
            raise UserError("--lr inf is no learning rate")
        if self.lr_tau is not None and not 0 <= self.lr_tau < math.inf:
            raise UserError(f"--lr-tau {self.lr_tau} must not be negative")
        if not 0 <= self.lr_min < math.inf:
            raise UserError(f"--lr-min {self.lr_min} must not be negative")
        if self.optimizer != "sgd" and (self.nesterov or self.momentum != 0.9):
            raise UserError(
                f"--momentum and --nesterov belong to --optimizer sgd, not {self.optimizer}; of "
                "the others --beta1 is the momentum"
            )
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must lie in [0, 1)")
        if not 0 < self.eps < math.inf or not 0 <= self.decay < math.inf:
            raise UserError(f"--eps {self.eps} must be above 0 and --wd {self.wd} not below")
        if self.nesterov and self.momentum == 0:
            raise UserError("--nesterov needs a --momentum above 0")
        if self.warmup < 0:
            raise UserError(f"--warmup {self.warmup} must not be negative")
        if self.grad_clip_norm is not None and not self.grad_clip_norm > 0:
            raise UserError(f"--grad-clip-norm {self.grad_clip_norm} must be above 0, or None")

    @property
    def decay(self) -> float:
        """Weight decay in force."""
        return (0.0 if self.optimizer in ("adam", "sgd") else 0.1) if self.wd is None else self.wd

    def dealt(self, processes: int) -> tuple[int, int, int]:
        """Global batch, micro-batch of each process, and micro-steps.

        >>> OptimConfig(batch_size=16).dealt(3)
        (48, 16, 1)
        >>> OptimConfig(batch_size=16, global_batch_size=96).dealt(3)
        (96, 16, 2)

        Raises:
            UserError: if the processes don't divide the global batch; names the numbers that do.
        """
        if self.global_batch_size is None:
            batch = self.batch_size or 64
            return batch * self.accum_freq * processes, batch, self.accum_freq
        share, rest = divmod(self.global_batch_size, processes)
        if rest:
            whole = range(1, self.global_batch_size + 1)
            ways = [str(n) for n in whole if self.global_batch_size % n == 0]
            raise UserError(
                f"--global-batch-size {self.global_batch_size} can't be dealt to {processes} "
                f"processes; use {', '.join(ways)} of them, or another size"
            )
        least = max(self.accum_freq, math.ceil(share / (self.batch_size or share)))
        accum = next(a for a in range(min(least, share), share + 1) if share % a == 0)
        return self.global_batch_size, share // accum, accum


@dataclass(frozen=True)
class TrainConfig(Generic[Options]):
    """Everything that decides a run."""

    options: Options
    loss: str = "superclip"
    """clip, superclip, sogclr, fastclip-v3, ...: --loss NAME --help shows its options."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    """Seed of initialisation, order and draws."""
    precision: Precision = "auto"
    """auto takes amp_bf16 where the hardware has it, else fp32. amp is fp16 with loss scaling."""
    deterministic: bool = free(False)
    """On CUDA, use only deterministic kernels, so that a resumed run is bit-equal there too."""
    device: str = free("auto")
    """auto, cpu, cuda, cuda:1."""
    threads: int | None = free(None)
    """CPU threads per process; results are bit-equal only for equal threads."""
    timeout_minutes: float = free(30.0)
    """Minutes that a process waits for its peers before the run ends."""
    out: Path = free(Path("logs"))
    """Folder of this one run. The same command again resumes it."""
    stage_two: str | None = free(None)
    """A recipe or a TOML file with options of a second run, OUT/stage2, which begins with this
    one's last weights; it inherits all but what made pictures, texts and training short here."""
    overwrite: bool = free(False)
    """Delete the run that stands in --out and start anew."""
    save_every: int | None = free(None)
    """Steps between checkpoints, beside the one at the end of every epoch."""
    save_every_minutes: float | None = free(None)
    """Minutes between checkpoints, likewise."""
    save_frequency: int = free(1)
    """Epochs between checkpoints (open_clip's name)."""
    keep_last: int | None = free(None)
    """Keep only this many of the newest epoch_K.pt and step_N.pt. Default: all."""
    eval_every: int | None = free(None)
    """Steps between evaluations on held-out data, beside the one at the end of every epoch."""
    keep_best: str | None = free(None)
    """A metric of that evaluation (val_i2t_R@1, val_t2i_median_rank, ...): best.pt holds the model
    that did best in it. Chosen on held-out data, so judge it on other data."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop and keep the batch that caused it, or
    skip the update and count it."""
    log_every: int = free(50)
    """Steps between two lines of metrics.jsonl."""
    log_grad_share: int | None = free(None)
    """Steps between two measurements of each term's share in the vision tower's gradient."""
    profile: int | None = free(None)
    """Steps to profile: writes a trace for Perfetto or TensorBoard, says where the time went."""
    track: str = free("")
    """Mirrors of metrics.jsonl: tensorboard, wandb, or both with a comma (pip install
    '.[track]')."""

    def __post_init__(self) -> None:
        expected = LOSS_OPTIONS.get(self.loss)
        if expected is None:
            raise UserError(f"--loss {self.loss!r} is unknown; {nearest(self.loss, LOSS_OPTIONS)}")
        if not isinstance(self.options, expected):
            raise UserError(
                f"--loss {self.loss} takes {expected.__name__}, not {type(self.options).__name__}"
            )
        self._refuse_idle()
        at_least_one(self, "log_every", "save_frequency", "threads", "save_every", "keep_last")
        at_least_one(self, "eval_every")
        at_least_one(self, "log_grad_share", "profile")
        for name in ("save_every_minutes", "timeout_minutes"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1e5:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is no time span")
        if unknown := sorted(set(self.trackers) - {"tensorboard", "wandb"}):
            raise UserError(f"--track {unknown[0]!r} is unknown; use tensorboard, wandb or both")
        check_seed("--seed", self.seed)
        if self.optim.lr_min > self.lr:
            raise UserError(f"--lr-min {self.optim.lr_min:g} is above --lr {self.lr:g}")

    def _refuse_idle(self) -> None:
        """Raises UserError for options that this loss or optimizer never reads."""
        kind, optim = self.options.temperature, self.optim
        keeps = "has no temperature" if kind == "none" else f"keeps {kind} temperatures"
        why = f"is idle: --loss {self.loss} {keeps}"
        if kind in ("constant", "none"):
            refuse_set(optim, ["lr_tau"], why)
        if kind == "none":
            refuse_set(self.model, ["init_scale"], why)
        if kind != "learnable":
            refuse_set(optim, ["lr_tau_schedule"], why)
        elif optim.lr_tau == 0:
            refuse_set(optim, ["lr_tau_schedule"], "is idle: --lr-tau 0 holds the temperature")
        unread = {"sgd": ("beta1", "beta2", "eps"), "lion": ("eps",)}.get(optim.optimizer, ())
        if self.loss != "fastclip-v2":  # its temperatures take Adam's steps, whatever the towers'
            refuse_set(optim, unread, f"is nothing that --optimizer {optim.optimizer} reads")

    @property
    def init_scale(self) -> float:
        return self.model.init_scale or self.options.init_scale

    @property
    def lr_tau(self) -> float:
        """Of the temperatures that the loss keeps."""
        return self.options.lr_tau if self.optim.lr_tau is None else self.optim.lr_tau

    @property
    def trackers(self) -> tuple[str, ...]:
        return tuple(name for name in self.track.split(",") if name)

    @property
    def epochs(self) -> int:
        return self.optim.epochs or (1 if is_scenes(self.data.train_data) else 20)

    @property
    def lr(self) -> float:
        return self.optim.lr or (5e-4 if self.model.from_scratch else 5e-5)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values only (paths as text), ready for JSON and for a `weights_only` checkpoint."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def train_config(values: Mapping[str, Any], origin: str = "config") -> TrainConfig[Any]:
    """Build a checked `TrainConfig` from nested or flat keys (`lr` or `optim.lr`).

    Raises:
        UserError: for an unknown key, an option of another loss, or a value out of range; names
            `origin`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{origin} holds no options")
    loss = values.get("loss", "superclip")
    if not isinstance(loss, str) or loss not in LOSS_OPTIONS:
        raise UserError(f"{origin}: loss {loss!r} is unknown; {nearest(str(loss), LOSS_OPTIONS)}")
    return _build(TrainConfig, _nest(values, loss, origin), {"options": LOSS_OPTIONS[loss]})


def _sections(loss: str) -> dict[str, type]:
    return {
        "options": LOSS_OPTIONS[loss],
        "model": ModelConfig,
        "data": DataConfig,
        "optim": OptimConfig,
    }


def owner_of_keys(loss: str) -> dict[str, str | None]:
    """Flat option name -> its section of `TrainConfig` (None at the top)."""
    sections = _sections(loss)
    owners: dict[str, str | None] = {
        f.name: None for f in dataclasses.fields(TrainConfig) if f.name not in sections
    }
    for section, cls in sections.items():
        owners |= {f.name: section for f in dataclasses.fields(cls)}
    return owners


def _nest(values: Mapping[str, Any], loss: str, origin: str) -> dict[str, Any]:
    sections, owners = _sections(loss), owner_of_keys(loss)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key in sections and isinstance(value, Mapping):
            nested.setdefault(key, {}).update(value)
            continue
        name = key.replace("-", "_")
        if name not in owners:
            raise UserError(
                f"{origin}: unknown option {key!r} for --loss {loss}; {nearest(name, owners)}"
            )
        section = owners[name]
        (nested if section is None else nested.setdefault(section, {}))[name] = value
    return nested


def _build(cls: type, values: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown option {name!r}; {nearest(name, known)}")
        kind = classes.get(name, hints[name])
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, value, {})
            continue
        try:
            arguments[name] = _cast(kind, value)
        except UserError as error:
            raise UserError(f"option {name}: {error}") from None
    if cls is TrainConfig:
        arguments.setdefault("options", classes["options"]())
    return cls(**arguments)


def _cast(kind: Any, value: Any) -> Any:
    """Give a TOML or JSON value the type its field declares; refuse what does not fit."""
    if value is None or kind is Any:
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # the latter of Literal | None
        return _cast(next(k for k in typing.get_args(kind) if k is not type(None)), value)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if isinstance(value, list | tuple) and kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{value!r} is not a list of {len(kinds)} values")
        return tuple(_cast(k, v) for k, v in zip(kinds, value))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"{value!r} is not one of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{value!r} is not a {kind.__name__}")
    return value


def differences(old: TrainConfig[Any], new: TrainConfig[Any]) -> list[str]:
    """Options that decide the result and differ, as `name: old -> new`."""
    found: list[str] = []

    def walk(a: Any, b: Any) -> None:
        for f in dataclasses.fields(a):
            if f.metadata.get("free"):
                continue
            x, y = getattr(a, f.name), getattr(b, f.name)
            if dataclasses.is_dataclass(x) and type(x) is type(y):
                walk(x, y)
            elif x != y and not dataclasses.is_dataclass(x):
                found.append(f"{f.name}: {x} -> {y}")

    walk(old, new)
    return found
