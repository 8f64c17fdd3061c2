"""What `superclip.evaluate` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from superclip.config import Precision, check_seed, is_scenes
from superclip.errors import UserError, check_checkpoint

Task = Literal["retrieval", "zeroshot", "compositional", "probe"]


@dataclass(frozen=True)
class EvalConfig:
    """What `superclip.evaluate` measures."""

    ckpt: tuple[Path, ...] = ()
    """Checkpoints: one, or one a seed of the same recipe. Default: the newest under logs/ (numeric
    order)."""
    against: tuple[Path, ...] | None = None
    """Checkpoints to compare with, on the same pictures: one, or one a seed."""
    model: str | None = None
    """An open_clip model name, for --pretrained, and for files that bring no configuration."""
    pretrained: str | None = None
    """With --model: an open_clip tag instead of --ckpt."""
    tasks: tuple[Task, ...] = ()
    """Default: retrieval and whatever data is named for below; on scenes all but the probe."""
    val_data: str | None = None
    """Retrieval: pictures and captions, spelled like --train-data. Default: the checkpoint's
    held-out data."""
    split: Literal["val", "train"] = "val"
    """train evaluates on the training data itself, as a check of convergence."""
    protocol: Literal["all-captions", "first-caption", "coco-5k", "coco-1k", "flickr"] = (
        "all-captions"
    )
    """all-captions: any of a picture's captions counts. first-caption: one caption a picture (small
    fine-tuning studies). coco-5k, coco-1k (mean of five folds), flickr: the published ones, five
    captions a picture; refused where the data has another number of pictures."""
    num: int | None = None
    """Pictures of --val-data, and generated scenes, to use. Default: all; 2 000 on scenes."""
    data_seed: int | None = None
    """Seed of generated scenes. Default: the checkpoint's."""
    pool: int | None = None
    """Candidates per retrieval pool. Default: all pictures; 500 on scenes."""
    zeroshot: str | None = None
    """Zero-shot classification: a folder of class folders (ImageNet's val), tar shards with .cls, a
    folder in CLIP_benchmark's layout, coco:FOLDER[:SPLIT] (80 labels, mAP), or scenes[:SPLIT]."""
    classnames: Path | None = None
    """Names of the classes: JSON {folder: name}; lines of folder, tab and name (a WordNet id and a
    blank will do); or one name a line in the order of the sorted folders. Default: ImageNet's names
    of WordNet ids, else the folders'."""
    templates: str | None = None
    """openai (80 prompts), simple (7), or a file with one template a line and a slot {} or {c}.
    Default: what the data brings, else openai."""
    compositional: tuple[str, ...] = ()
    """Compositional checks: JSON files (ours or SugarCrepe's) or a folder of them, or
    scenes[:SPLIT], which writes its own from the scene graph."""
    images: Path | None = None
    """Folder of the pictures that --compositional names."""
    probe: str | None = None
    """Linear probe: labelled training pictures, spelled like --zeroshot."""
    probe_test: str | None = None
    """Labelled test pictures. Default: 30 % of --probe, dealt by a hash of their ids."""
    effect: float | None = None
    """With --against: the true difference (points; ranks) for which the power is stated. Default:
    2."""
    batch_size: int = 64
    workers: int = 0
    """Reader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    precision: Precision = "fp32"
    """Features in fp32 compare to the last digit; amp_bf16 and amp are faster on a GPU."""
    bootstrap: int = 2000
    """Draws of the bootstrap over pictures."""
    out: Path | None = None
    """JSON file. Default: eval_SPLIT.json beside the checkpoint (with other options than the
    default ones a name of its own; for --pretrained here); with --against, compare_HASH.json beside
    the first."""
    overwrite: bool = False
    """Replace that file."""

    def __post_init__(self) -> None:
        for name, least in (("num", 2), ("pool", 2), ("batch_size", 1), ("bootstrap", 100)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if (self.num or 0) > 10**7:
            raise UserError(f"--num {self.num} is more than any memory holds; at most 10^7")
        check_seed("--data-seed", self.data_seed)
        if self.workers < 0:
            raise UserError(f"--workers {self.workers} must not be negative")
        if self.effect is not None and not 0 < self.effect < math.inf:
            raise UserError(f"--effect {self.effect} must be above 0")
        if self.effect is not None and self.against is None:
            raise UserError("--effect goes with --against")
        for path in (*self.ckpt, *(self.against or ())):
            if path == Path():
                raise UserError("a checkpoint's name is empty; name a file")
            check_checkpoint(path)
        for name in ("val_data", "zeroshot", "probe", "probe_test", "templates", "classnames"):
            if getattr(self, name) in ("", Path()):
                raise UserError(
                    f"--{name.replace('_', '-')} is empty; name something, or leave it out"
                )
        parts = (self.val_data or "").split("::")
        if len(parts) > 1 and any(map(is_scenes, parts)):
            raise UserError(f"--val-data {self.val_data} joins generated scenes; name one source")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"--tasks {' '.join(self.tasks)} names one twice; name each once")
        for task in ("zeroshot", "compositional", "probe"):
            named, wanted = bool(getattr(self, task)), task in self.tasks
            if named and self.tasks and not wanted:
                raise UserError(f"--{task} names data, but --tasks leaves {task} out")
        if self.probe_test is not None and self.probe is None:
            raise UserError("--probe-test goes with --probe")
        if self.probe is None and "probe" in self.tasks:
            raise UserError("--tasks probe needs --probe DATA")
        if self.pretrained is not None and (self.model is None or self.ckpt):
            raise UserError("--pretrained TAG goes with --model NAME, in the place of --ckpt")
        for name in ("classnames", "templates"):
            if getattr(self, name) is not None and not (self.zeroshot or "zeroshot" in self.tasks):
                raise UserError(f"--{name} goes with --zeroshot DATA")
        if self.images is not None and not any(not is_scenes(c) for c in self.compositional):
            raise UserError("--images goes with --compositional FILE; leave it out")
