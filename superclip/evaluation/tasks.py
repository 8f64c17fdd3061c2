"""From a checkpoint and what is asked for to the results of every task."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superclip.config import EvalConfig, Task, is_scenes
from superclip.data.checks import Checks, read_checks
from superclip.data.labelled import LabelledSource, open_labelled
from superclip.data.loader import tokenizer_for
from superclip.data.scene_checks import scene_checks
from superclip.data.scenes import Scenes, retrieval_ceilings
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError
from superclip.evaluation.compositional import compositional
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import Result
from superclip.evaluation.probe import probe
from superclip.evaluation.retrieval import retrieve
from superclip.evaluation.zeroshot import class_names, templates, zeroshot
from superclip.model.factory import tokenizer
from superclip.model.weights import Checkpoint
from superclip.ops.precision import concrete_precision

SCENES, SCENES_POOL = 2000, 500
"""Scenes looked at, and how many of them are ranked at a time."""
ORDER: tuple[Task, ...] = typing.get_args(Task)


@dataclass
class Evaluation:
    """What a command measures, on any number of checkpoints; data are opened once."""

    config: EvalConfig
    device: torch.device
    _opened: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def run(self, checkpoint: Checkpoint) -> Iterator[Result]:
        """The tasks' results, in a fixed order.

        Raises:
            UserError: if data that a task needs is not named, absent or unusable.
        """
        encoder = Encoder(
            checkpoint.preprocess,
            tokenizer_for(tokenizer(checkpoint.model_config)),
            self.device,
            concrete_precision(self.config.precision, self.device),
            self.config.batch_size,
            self.config.workers,
        )
        checkpoint.model.to(self.device)
        for task in self.tasks(checkpoint):
            yield getattr(self, f"_{task}")(checkpoint, encoder)
        checkpoint.model.to("cpu")

    def tasks(self, checkpoint: Checkpoint) -> list[Task]:
        """Those asked for; else retrieval, and what data is named for (on scenes: or generated)."""
        config, pictures = self.config, self._pictures(checkpoint)
        if config.tasks:
            return [task for task in ORDER if task in config.tasks]
        scenes = pictures is not None and is_scenes(pictures)
        asked: dict[Task, object] = {
            "retrieval": pictures is not None,
            "zeroshot": scenes or config.zeroshot,
            "compositional": scenes or config.compositional,
            "probe": config.probe,
        }
        found: list[Task] = [task for task in ORDER if asked[task]]
        if not found:
            raise UserError(
                "plain weights know no data; name some with --val-data, --zeroshot, "
                "--compositional or --probe"
            )
        return found

    def _pictures(self, checkpoint: Checkpoint) -> str | None:
        """The spec of the pictures with captions; None where nothing is known of any."""
        if self.config.val_data is not None:
            return self.config.val_data
        if checkpoint.config is None:
            return None
        data = checkpoint.config.data
        if self.config.split == "train":
            return data.train_data
        return data.val_data or held_out_spec(data.train_data)

    def _retrieval(self, checkpoint: Checkpoint, encoder: Encoder) -> Result:
        config, spec = self.config, self._pictures(checkpoint)
        if spec is None:
            raise UserError("plain weights know no data; name pictures with --val-data")
        scenes, seed = is_scenes(spec), _data_seed(checkpoint)
        num = config.num or (SCENES if scenes else None)
        held_out = config.split == "val"
        source = self._open(open_source, spec, num if scenes else None, seed, held_out)
        if num is not None and num > source.num_images:
            raise UserError(f"--num {num}: {spec} holds only {source.num_images} pictures")
        count = num or source.num_images
        if config.pool is not None and config.pool > count:
            raise UserError(f"--pool {config.pool} is larger than the {count} pictures")
        pool = config.pool or (min(SCENES_POOL, count) if scenes else None)
        found = retrieve(checkpoint.model, encoder, source, config.protocol, pool, range(count))
        found.data.update(spec=spec, split=config.split)
        if scenes:
            found.notes["ceilings"] = _ceilings(source, count, pool or count)
        return found

    def _zeroshot(self, checkpoint: Checkpoint, encoder: Encoder) -> Result:
        config = self.config
        spec = config.zeroshot or self._scenes(checkpoint, "zeroshot")
        labelled = self._labelled(spec, checkpoint, held_out=True)
        names = class_names(labelled, config.classnames)
        prompts = templates(config.templates, labelled)
        return zeroshot(checkpoint.model, encoder, labelled, names, prompts)

    def _compositional(self, checkpoint: Checkpoint, encoder: Encoder) -> Result:
        named = self.config.compositional or (self._scenes(checkpoint, "compositional"),)
        if is_scenes(named[0]):
            num, seed = self.config.num or SCENES, _data_seed(checkpoint)
            checks = self._open(_scene_checks, named[0], num, seed)
        else:
            if self.config.images is None:
                raise UserError("--compositional FILE needs --images DIR, the pictures' folder")
            paths = tuple(map(Path, named))
            checks = self._open(read_checks, paths, self.config.images)
        return compositional(checkpoint.model, encoder, checks)

    def _probe(self, checkpoint: Checkpoint, encoder: Encoder) -> Result:
        config = self.config
        assert config.probe is not None
        test = config.probe_test
        return probe(
            checkpoint.model,
            encoder,
            self._labelled(config.probe, checkpoint, held_out=test is None),
            None if test is None else self._labelled(test, checkpoint, held_out=True),
            json.dumps([checkpoint.sha256, checkpoint.model_config], sort_keys=True),
            checkpoint.path.parent / "features",
        )

    def _scenes(self, checkpoint: Checkpoint, task: Task) -> str:
        spec = self._pictures(checkpoint)
        if spec is None or not is_scenes(spec):
            raise UserError(f"--tasks {task} needs --{task} DATA; only scenes bring their own")
        return spec

    def _labelled(self, spec: str, checkpoint: Checkpoint, held_out: bool) -> LabelledSource:
        num = (self.config.num or SCENES) if is_scenes(spec) else None
        return self._open(open_labelled, spec, num, _data_seed(checkpoint), held_out)

    def _open(self, opener: Callable[..., Any], *what: Any) -> Any:
        key = (opener, *what)
        if key not in self._opened:
            self._opened[key] = opener(*what)
        return self._opened[key]


def _data_seed(checkpoint: Checkpoint) -> int:
    return 0 if checkpoint.config is None else checkpoint.config.data.data_seed


def _ceilings(scenes: Any, count: int, pool: int) -> dict[str, dict[str, float]]:
    """Mean over the pools of what a perfect model, and a perfect model blind to categories, can
    reach."""
    captions = [scenes.scene(row).caption for row in range(count)]
    starts = range(0, count - pool + 1, pool)
    found = [retrieval_ceilings(captions[start : start + pool]) for start in starts]
    return {
        name: {f"R@{k}": float(np.mean([f[name][k] for f in found])) for k in (1, 5, 10)}
        for name in ("category_blind", "caption_collision")
    }


def _scene_checks(spec: str, num: int, seed: int) -> Checks:
    scenes = open_source(spec, num, seed, held_out=True)
    assert isinstance(scenes, Scenes)
    return scene_checks(scenes)


def seeds_of_one_recipe(checkpoints: Sequence[Checkpoint], flag: str) -> None:
    """Several checkpoints are one arm only if they differ in nothing but their seed.

    Raises:
        UserError: naming two that are of one run, or the first option in which they differ.
    """
    from superclip.config import differences

    first = checkpoints[0]
    seen: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints if len(checkpoints) > 1 else ():
        if checkpoint.config is None or first.config is None:
            raise UserError(f"{flag}: plain weights carry no seed; give one file of them")
        other = seen.setdefault(checkpoint.config.seed, checkpoint)
        if other is not checkpoint:
            raise UserError(
                f"{flag}: {other.path} and {checkpoint.path} have the same seed; give one "
                "checkpoint a seed (seeds are the outer level of the comparison)"
            )
        changed = [d for d in differences(first.config, checkpoint.config) if d[:5] != "seed:"]
        if changed or checkpoint.epoch != first.epoch:
            what = changed[0] if changed else f"epoch: {first.epoch} -> {checkpoint.epoch}"
            raise UserError(
                f"{flag}: {first.path} and {checkpoint.path} are not of one recipe ({what}); "
                "compare them with --against"
            )


def share_initial_weights(first: Sequence[Checkpoint], second: Sequence[Checkpoint]) -> bool:
    """Whether the arms, sorted by seed, start from the same weights model by model."""

    def start(checkpoint: Checkpoint) -> Any:
        config = checkpoint.config
        return None if config is None else (config.seed, checkpoint.facts.get("init_sha256"))

    starts = [start(c) for c in first]
    return None not in starts and starts == [start(c) for c in second]
