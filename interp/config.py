"""What the interp commands are asked for: frozen dataclasses; a field's docstring is its
`--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from tyro.conf import Fixed, Positional, Suppress

from superclip.config import check_seed
from superclip.errors import UserError, check_checkpoint

Kind = Literal["class", "patches"]
T = TypeVar("T")
Hidden = Annotated[T, Fixed, Suppress]  # no flag
PAIRS = ("fill", "swap", "colour", "category")


@dataclass(frozen=True)
class SweepConfig:
    """What `interp.sweep` scores."""

    follows_runs: ClassVar[bool] = True
    """Whether a pattern of checkpoints will do."""
    ckpt: Path | None = None
    """A checkpoint of superclip.train. Default: the newest under logs/. With --model: plain
    open_clip weights."""
    model: str | None = None
    """An open_clip model name, for weights that bring no configuration."""
    pretrained: str | None = None
    """With --model: an open_clip tag instead of --ckpt."""
    data: str | None = None
    """scenes, coco, tar shards, or a folder as coco:FOLDER. Default: the checkpoint's held-out
    data."""
    root: Path | None = None
    """Folder of --data coco."""
    split: str | None = None
    """Split of the data. Default: its held-out one."""
    num: int | None = None
    """Pictures to look at, before the confirm split is set aside. Default: 1 000 scenes, or all."""
    kind: Kind = "class"
    """Whose attention: the class token's, which the contrastive feature reads, or the mean of the
    patch queries, which SuperCLIP's token head reads."""
    metric: Literal["excess", "legacy-mass"] = "excess"
    """legacy-mass also reproduces the small study's measure (squashed picture, union of boxes,
    centre-in-box) and prints it beside the excess. The champion is chosen by the excess either
    way."""
    untrained: int = 5
    """Untrained towers swept beside: the run's own initialisation and further seeds. 0 leaves them
    out."""
    draws: int = 9999
    """Permutations and bootstrap draws."""
    seed: int = 0
    """Seed of the permutations and draws."""
    gallery: int = 24
    """Pictures kept in the results for galleries and animations."""
    batch_size: int = 32
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads."""
    allow_trained: bool = False
    """Score pictures that the checkpoint was trained on (the result says so)."""
    out: Path | None = None
    """Folder of the results. Default: sweep/ beside the checkpoint (sweep-patches/ for --kind
    patches)."""
    overwrite: bool = False
    """Replace the results that stand in --out."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num is not None and self.num < 1:
            raise UserError(f"--num {self.num} must be at least 1")
        for name in ("untrained", "gallery"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative")
        if self.pretrained is not None and self.model is None:
            raise UserError("--pretrained needs --model NAME")
        if self.data == "coco" and self.root is None:
            raise UserError("--data coco needs --root FOLDER (with annotations/ in it)")


@dataclass(frozen=True)
class OfSweep:
    """What every command asks for that goes on from a sweep."""

    follows_runs: ClassVar[bool] = False
    ckpt: Path | None = None
    """A checkpoint. Default: the newest under logs/."""
    results: Path | None = None
    """Folder of its sweep. Default: sweep/ beside the checkpoint."""
    model: str | None = None
    """The open_clip model name of the sweep, for weights that bring no configuration."""
    pretrained: str | None = None
    """With --model: an open_clip tag instead of --ckpt."""
    data: str | None = None
    """The data of the sweep, where that was not the checkpoint's own; with --root and --split as
    there."""
    root: Path | None = None
    """Folder of --data coco."""
    split: str | None = None
    """Split of the data."""
    seed: int = 0
    """Seed of all draws."""
    draws: int = 9999
    """Bootstrap draws and permutations."""
    batch_size: int = 32
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    threads: int | None = None
    """CPU threads."""
    overwrite: bool = False
    """Replace what this command wrote beside the sweep before."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.pretrained is not None and self.model is None:
            raise UserError("--pretrained needs --model NAME")
        if self.data == "coco" and self.root is None:
            raise UserError("--data coco needs --root FOLDER (with annotations/ in it)")


@dataclass(frozen=True)
class AblateConfig(OfSweep):
    """What `interp.ablate` removes."""

    follows_runs: ClassVar[bool] = True
    units: str = "heads"
    """Comma list of what is removed, one at a time: heads, mlps, attentions, layers (all of each);
    L11H5, L3H1+L2H0 (together); champion, top:K (K best of discovery), random:K (K other heads),
    attributed:K (K heads of the largest attribution on discovery)."""
    kinds: tuple[Literal["mean", "resample", "zero"], ...] = ("mean", "resample", "zero")
    """What stands in: the mean over discovery pictures, another picture's output, nothing."""
    resamples: int | None = None
    """Other pictures that each picture's outputs are replaced by, in turn; effects are averaged.
    Default: 3."""
    sets: int | None = None
    """Random sets of as many heads, to set the removal of the four best heads together against (by
    mean ablation). 0 leaves this out. Default: 20."""
    tokens: Literal["all", "class"] = "all"
    """Replace the heads' outputs at every token or at the class token only."""
    downstream: bool = False
    """Also measure how later heads' in-box mass changes when a head is removed."""
    max_memory: float = 1.0
    """GiB of activations beside the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError("--kinds needs one or more of mean, resample, zero, each once")
        for name, least, kind in (("sets", 0, "mean"), ("resamples", 1, "resample")):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} {value} must be at least {least}")
            if value and kind not in self.kinds:
                raise UserError(f"--{name} goes with --kinds {kind}; leave it out")
        _check_memory(self.max_memory)

    @property
    def resamples_drawn(self) -> int:
        return 3 if self.resamples is None else self.resamples

    @property
    def sets_drawn(self) -> int:
        return 20 if self.sets is None else self.sets


@dataclass(frozen=True)
class RelevanceConfig(OfSweep):
    """Which relevance maps `interp.relevance` scores."""

    methods: str = "all"
    """Comma list of attention, rollout, chefer, chefer-all, legrad, legrad-all, legrad-mean,
    legrad-mean-all, gradcam, maskclip, sclip (-all: from the first layer on, not the last one or
    two). Default: all that the tower allows. Raw attention is always among them."""


@dataclass(frozen=True)
class LensConfig(OfSweep):
    """What `interp.lens` reads."""

    concepts: str | None = None
    """Comma list of words, as table,woman. Default: the sweep's categories, at most the twelve
    that most captions hold."""
    lens: Literal["auto", "tokens", "texts"] = "auto"
    """Read through the token head, or by cosine with texts. Default: the token head where there is
    one; two checkpoints compare by one lens alone."""


@dataclass(frozen=True)
class PatchConfig(OfSweep):
    """What `interp.patch` patches."""

    pairs: str = "fill"
    """How a picture is corrupted. fill: an object is filled with its surroundings. swap: replaced
    by another picture's. colour, category: redrawn otherwise (scenes only). Or a JSON file, a list
    of {"clean": FILE, "corrupted": FILE, "text_clean": TEXT, "text_corrupted": TEXT}; the last may
    be missing."""
    num: int | None = None
    """Validation pictures to make pairs of. Default: all."""
    tau: float = 0.01
    """Pairs whose metric differs by less than this between the two pictures are dropped."""
    every_patch: bool = False
    """Patch every patch by itself too: as many passes more as there are patches."""
    max_memory: float = 1.0
    """GiB of activations beside the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_memory(self.max_memory)
        if self.num is not None and self.num < 1:
            raise UserError(f"--num {self.num} must be at least 1")
        if not 0 <= self.tau < float("inf"):
            raise UserError(f"--tau {self.tau} must be 0 or above, and finite")
        if self.pairs not in PAIRS and not self.pairs.endswith(".json"):
            raise UserError(
                f"--pairs {self.pairs!r} is none of {', '.join(PAIRS)} nor a .json file"
            )


@dataclass(frozen=True)
class CircuitConfig(OfSweep):
    """What `interp.circuit` looks for."""

    faithfulness: float = 0.9
    """Share of what all heads do for the margin that the circuit must keep on discovery."""
    wrong: Literal["mean", "hardest"] = "mean"
    """Margin over all wrong captions, or over the one that is hardest for the intact model. That
    one is picked against the intact model alone, so little may be left for a circuit to keep."""
    kind: Literal["zero", "mean", "resample"] = "mean"
    """Ablation under which the circuit is chosen; it is judged under all three."""
    mlps: bool = False
    """Let MLPs be left out, too."""
    steps: int = 10
    """Points of the path of integrated gradients by which edges are scored."""
    edges: int = 60
    """Edges that are judged, listed and drawn: the strongest of discovery."""
    sets: int = 20
    """Random sets of the circuit's size to set it against, and as many with its size a layer."""
    pictures: int = 512
    """Discovery pictures that choose, at most; of validation, all judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.faithfulness <= 1:
            raise UserError(f"--faithfulness {self.faithfulness} must lie above 0 and up to 1")
        for name, least in (("steps", 1), ("edges", 1), ("sets", 1), ("pictures", 20)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class CompareConfig(OfSweep):
    """What `interp.compare` sets side by side; each checkpoint in turn becomes its `ckpt`."""

    ckpt: Hidden[Path | None] = None
    results: Hidden[Path | None] = None
    model: Hidden[str | None] = None
    pretrained: Hidden[str | None] = None
    ckpts: Positional[tuple[Path, ...]] = ()
    """Two checkpoints of superclip.train, swept before. With --against: those of the first side,
    one, or one a seed of the same recipe."""
    against: tuple[Path, ...] | None = None
    """Checkpoints of the second side: one, or one a seed."""
    also: tuple[Path, ...] = ()
    """Further towers for the table of grounding: checkpoints, or folders of sweeps (of plain
    open_clip weights, say)."""
    kind: Kind = "class"
    """Whose attention: which of the sweeps beside the checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ckpts or (self.against is None and len(self.ckpts) != 2):
            raise UserError(
                f"{len(self.ckpts)} checkpoint(s) named; name two, or the seeds of two sides: "
                "A ... --against B ..."
            )
        for path in (*self.ckpts, *(self.against or ())):
            check_checkpoint(path)

    @property
    def sides(self) -> tuple[tuple[Path, ...], ...]:
        return (self.ckpts, self.against) if self.against else (self.ckpts[:1], self.ckpts[1:])


@dataclass(frozen=True)
class HypothesisConfig:
    """What `interp.hypothesis` decides."""

    file: Positional[Path | None] = None
    """The claim, a TOML file as those in research/hypotheses."""
    ckpt: tuple[Path, ...] = ()
    """Checkpoints of superclip.train: one, or one a seed of the same recipe (for sensitivity, one a
    seed and learning rate)."""
    against: tuple[Path, ...] | None = None
    """The second side of a claim that compares two recipes."""
    exploratory: bool = False
    """The claim was made, or changed, after a look at the answer; the result says so."""
    out: Path | None = None
    """The result. Default: hypothesis-NAME.json beside the first checkpoint."""
    draws: int = 9999
    """Bootstrap draws."""
    batch_size: int = 64
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def __post_init__(self) -> None:
        if self.file is None:
            raise UserError("name a hypothesis file, as research/hypotheses/early_grounding.toml")
        if not self.ckpt:
            raise UserError("--ckpt: name a checkpoint, or one a seed")
        for name, least in (("draws", 99), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
        for path in (*self.ckpt, *(self.against or ())):
            check_checkpoint(path)

    @property
    def sides(self) -> tuple[tuple[Path, ...], ...]:
        return (self.ckpt,) if self.against is None else (self.ckpt, self.against)


@dataclass(frozen=True)
class AnimateConfig:
    """What `interp.animate` draws."""

    results: Positional[Path | None] = None
    """Folder of a sweep. Default: the newest under logs/. For --what training: the folder of the
    run, whose numbered checkpoints were swept by a pattern."""
    what: Literal["duel", "layer", "layers", "training", "sheets"] = "duel"
    """duel: champion and challenger, picture by picture. layer: all heads of --layer, picture by
    picture. layers: all heads, layer by layer, on one picture. training: --head, checkpoint by
    checkpoint, on one picture. sheets: for papers, the gallery of --head and a sheet of all heads
    on one picture, as PNG and PDF."""
    head: str | None = None
    """As L11H5. Default: the champion of discovery (of the last checkpoint)."""
    challenger: str | None = None
    """For duel and training: the head beside it. Default: the second of discovery."""
    layer: int | None = None
    """Default: that of the champion."""
    image: str | None = None
    """Public id of a picture that the sweep kept. Default: the first that is of validation."""
    largest: float = 5.0
    """MB of a GIF, at most; frames that do not fit are left out, and counted."""
    out: Path | None = None
    """File, or for sheets a folder. Default: WHAT.gif, or sheets/, in the folder of the results."""
    overwrite: bool = False
    """Replace what stands there."""

    def __post_init__(self) -> None:
        if self.out == Path():
            raise UserError("--out is empty; name a file, or leave it out")
        if not 0.05 <= self.largest < 1000:
            raise UserError(f"--largest {self.largest:g} must lie in 0.05..1000 (MB)")
        for name, only in (
            ("head", ("training", "sheets")),
            ("challenger", ("duel", "training")),
            ("layer", ("layer",)),
            ("image", ("layers", "training", "sheets")),
        ):
            if getattr(self, name) is not None and self.what not in only:
                raise UserError(f"--{name} goes with --what {' or '.join(only)}; leave it out")


@dataclass(frozen=True)
class ReportConfig:
    """What `interp.report` shows."""

    results: Positional[tuple[Path, ...]] = ()
    """Folders of sweeps, one or several. Default: the newest sweep under logs/."""
    out: Path | None = None
    """The page. Default: report.html in the folder of the sweep, or above the folders of several.
    The pictures are written beside it."""
    challenger: str | None = None
    """The head set against the champion, as L11H5. Default: the second of discovery."""
    overwrite: bool = False
    """Replace a page and pictures that stand there."""


def _check_sizes(config: SweepConfig | OfSweep) -> None:
    """What all commands need; fewer than 99 draws make no 95 % interval."""
    check_seed("--seed", config.seed)
    for name in ("ckpt", "results", "out"):
        if getattr(config, name, None) == Path():
            raise UserError(f"--{name} is empty; name something, or leave it out")
    if config.ckpt is not None and not (config.follows_runs and is_pattern(config.ckpt)):
        check_checkpoint(config.ckpt)
    for name, least in (("draws", 99), ("batch_size", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def is_pattern(ckpt: Path | None) -> bool:
    """Whether `--ckpt` stands for several files: it has `*`, `?` or `[` and is no file itself."""
    return ckpt is not None and bool(set(ckpt.name) & set("*?[")) and not ckpt.is_file()


def _check_memory(gib: float) -> None:
    if not 0 < gib < 1e6:
        raise UserError(f"--max-memory {gib:g} must be above 0 and finite (GiB)")
