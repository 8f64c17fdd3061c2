"""From a checkpoint and what is asked for to the results of every task."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from superclip.config import is_scenes
from superclip.data.checks import Checks, read_checks
from superclip.data.labelled import LabelledSource, open_labelled
from superclip.data.loader import tokenizer_for
from superclip.data.scene_checks import scene_checks
from superclip.data.scenes import Scenes, retrieval_ceilings
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError
from superclip.evaluation.compositional import compositional
from superclip.evaluation.config import EvalConfig, Task
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import Result
from superclip.evaluation.probe import probe, refuse_unlike
from superclip.evaluation.retrieval import find_protocol, retrieve
from superclip.evaluation.zeroshot import class_names, templates, zeroshot
from superclip.model.factory import tokenizer
from superclip.model.superclip import SuperCLIP
from superclip.model.weights import Checkpoint
from superclip.ops.precision import concrete_precision

SCENES, SCENES_POOL = 2000, 500
"""Scenes looked at, and how many of them are ranked at a time."""
ORDER: tuple[Task, ...] = typing.get_args(Task)


class Prepared(NamedTuple):
    """A task whose data, names and prompts are open and checked.

    Attributes:
        digest: sha256 of the data; two checkpoints compare only on the same.
        generated: whether the data are scenes, made as asked for.
        measure: does the work.
    """

    task: Task
    digest: str
    generated: bool
    measure: Callable[[SuperCLIP, Encoder], Result]


@dataclass
class Evaluation:
    """What a command measures, on any number of checkpoints; data are opened once."""

    config: EvalConfig
    device: torch.device
    _opened: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def prepare(self, checkpoint: Checkpoint) -> list[Prepared]:
        """The tasks in a fixed order, all of them ready before the first is measured.

        Raises:
            UserError: if data that a task needs is not named, absent or unusable, or an option has
                no effect on any task.
        """
        ready = [getattr(self, f"_{task}")(checkpoint) for task in self.tasks(checkpoint)]
        self._refuse_idle(ready)
        return ready

    def run(self, checkpoint: Checkpoint, ready: Sequence[Prepared]) -> Iterator[Result]:
        """The results of what `prepare` made ready for this checkpoint."""
        encoder = Encoder(
            checkpoint.preprocess,
            tokenizer_for(tokenizer(checkpoint.model_config)),
            self.device,
            concrete_precision(self.config.precision, self.device),
            self.config.batch_size,
            self.config.workers,
        )
        checkpoint.model.to(self.device)
        for task in ready:
            yield task.measure(checkpoint.model, encoder)
        checkpoint.model.to("cpu")

    def _refuse_idle(self, ready: Sequence[Prepared]) -> None:
        """Raises UserError for an option that changes nothing here."""
        config = self.config
        retrieval = any(p.task == "retrieval" for p in ready)
        generated = any(p.generated for p in ready)
        for flag, given, used in (
            ("--num", config.num is not None, retrieval or generated),
            ("--data-seed", config.data_seed is not None, generated),
            (
                "--split train",
                config.split == "train",
                config.val_data is None and (retrieval or generated),
            ),
            ("--pool", config.pool is not None, retrieval),
            ("--protocol", config.protocol != EvalConfig.protocol, retrieval),
        ):
            if given and not used:
                told = " and ".join(p.task for p in ready)
                raise UserError(f"{flag} changes nothing for {told} on these data; leave it out")

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

    def _trained_on(self, checkpoint: Checkpoint) -> int | None:
        """With `--split train` of the run's own data, how many pictures it saw; None for all."""
        own = self.config.split == "train" and self.config.val_data is None
        config = checkpoint.config
        return config.data.train_num_samples if own and config is not None else None

    def _retrieval(self, checkpoint: Checkpoint) -> Prepared:
        config, spec = self.config, self._pictures(checkpoint)
        if spec is None:
            raise UserError("plain weights know no data; name pictures with --val-data")
        scenes, seed = is_scenes(spec), self._data_seed(checkpoint)
        seen = self._trained_on(checkpoint)
        num = config.num or (min(SCENES, seen or SCENES) if scenes else seen)
        if seen is not None and num is not None and num > seen:
            raise UserError(f"--num {num}: the run was trained on the first {seen} pictures alone")
        held_out = config.split == "val"
        source = self._open(open_source, spec, num if scenes else None, seed, held_out)
        if num is not None and num > source.num_images:
            raise UserError(f"--num {num}: {spec} holds only {source.num_images} pictures")
        count = num or source.num_images
        if config.pool is not None and config.pool > count:
            raise UserError(f"--pool {config.pool} is larger than the {count} pictures")
        pool = config.pool or (min(SCENES_POOL, count) if scenes else None)
        find_protocol(config.protocol, count, pool)

        def measure(model: SuperCLIP, encoder: Encoder) -> Result:
            found = retrieve(model, encoder, source, config.protocol, pool, range(count))
            found.data.update(spec=spec, split=config.split)
            if scenes:
                found.notes["ceilings"] = _ceilings(source, count, pool or count)
            return found

        return Prepared("retrieval", source.digest, scenes, measure)

    def _zeroshot(self, checkpoint: Checkpoint) -> Prepared:
        config = self.config
        spec = config.zeroshot or self._scenes(checkpoint, "zeroshot")
        held_out = config.zeroshot is not None or config.split == "val"
        labelled = self._labelled(spec, checkpoint, held_out)
        names = class_names(labelled, config.classnames)
        prompts = templates(config.templates, labelled)

        def measure(model: SuperCLIP, encoder: Encoder) -> Result:
            return zeroshot(model, encoder, labelled, names, prompts)

        return Prepared("zeroshot", labelled.digest, is_scenes(spec), measure)

    def _compositional(self, checkpoint: Checkpoint) -> Prepared:
        config = self.config
        named = list(config.compositional) or [self._scenes(checkpoint, "compositional")]
        if is_scenes(named[0]):
            if len(named) > 1:
                raise UserError(f"--compositional {named[0]} stands alone; measure the rest apart")
            held_out = bool(config.compositional) or config.split == "val"
            num, seed = config.num or SCENES, self._data_seed(checkpoint)
            checks = self._open(_scene_checks, named[0], num, seed, held_out)
        else:
            if config.images is None:
                raise UserError("--compositional FILE needs --images DIR, the pictures' folder")
            checks = self._open(read_checks, tuple(map(Path, named)), config.images)

        def measure(model: SuperCLIP, encoder: Encoder) -> Result:
            return compositional(model, encoder, checks)

        return Prepared("compositional", checks.sha256, is_scenes(named[0]), measure)

    def _probe(self, checkpoint: Checkpoint) -> Prepared:
        config = self.config
        assert config.probe is not None
        train = self._labelled(config.probe, checkpoint, held_out=config.probe_test is None)
        test = config.probe_test and self._labelled(config.probe_test, checkpoint, held_out=True)
        if test:
            refuse_unlike(train, test)
        key = json.dumps([checkpoint.sha256, checkpoint.model_config], sort_keys=True)
        cache = checkpoint.path.parent / "features"

        def measure(model: SuperCLIP, encoder: Encoder) -> Result:
            return probe(model, encoder, train, test or None, key, cache)

        digest = train.digest + (test.digest if test else "")
        return Prepared("probe", digest, is_scenes(config.probe), measure)

    def _scenes(self, checkpoint: Checkpoint, task: Task) -> str:
        spec = self._pictures(checkpoint)
        if spec is None or not is_scenes(spec):
            raise UserError(f"--tasks {task} needs --{task} DATA; only scenes bring their own")
        return spec

    def _labelled(self, spec: str, checkpoint: Checkpoint, held_out: bool) -> LabelledSource:
        num = (self.config.num or SCENES) if is_scenes(spec) else None
        return self._open(open_labelled, spec, num, self._data_seed(checkpoint), held_out)

    def _data_seed(self, checkpoint: Checkpoint) -> int:
        """Of generated scenes."""
        if self.config.data_seed is not None:
            return self.config.data_seed
        return 0 if checkpoint.config is None else checkpoint.config.data.data_seed

    def _open(self, opener: Callable[..., Any], *what: Any) -> Any:
        key = (opener, *what)
        if key not in self._opened:
            self._opened[key] = opener(*what)
        return self._opened[key]


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


def _scene_checks(spec: str, num: int, seed: int, held_out: bool) -> Checks:
    scenes = open_source(spec, num, seed, held_out)
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
        found = differences(first.config, checkpoint.config)
        own = "seed", "init_from"  # a second stage begins with its seed's first
        changed = [d for d in found if d.partition(":")[0] not in own]
        if changed or checkpoint.epoch != first.epoch:
            what = changed[0] if changed else f"epoch: {first.epoch} -> {checkpoint.epoch}"
            raise UserError(
                f"{flag}: {first.path} and {checkpoint.path} are not of one recipe ({what}); "
                "compare them with --against"
            )


def refuse_unlike_data(ready: Sequence[Sequence[Prepared]]) -> None:
    """Raises UserError where checkpoints are not about to see the same data."""
    tasks = [[p.task for p in tasks] for tasks in ready]
    if any(other != tasks[0] for other in tasks):
        raise UserError("the checkpoints bring different data; name it, or the --tasks, for all")
    for first, *others in zip(*ready):
        if any(other.digest != first.digest for other in others):
            generated = "--data-seed N makes them the same scenes; " if first.generated else ""
            raise UserError(
                f"the checkpoints bring different data for {first.task}; {generated}name one set "
                f"for all with --{'val-data' if first.task == 'retrieval' else first.task}"
            )


def share_initial_weights(first: Sequence[Checkpoint], second: Sequence[Checkpoint]) -> bool:
    """Whether the arms, sorted by seed, start from the same weights model by model.

    Raises:
        UserError: if only some seeds are in both arms: neither pairs nor independent arms.
    """

    def start(checkpoint: Checkpoint) -> Any:
        config = checkpoint.config
        return None if config is None else (config.seed, checkpoint.facts.get("init_sha256"))

    arms = [[start(c) for c in arm] for arm in (first, second)]
    paired = None not in arms[0] and arms[0] == arms[1]
    shared = sorted({s[0] for s in arms[0] if s in arms[1] and s is not None})
    if shared and not paired:
        raise UserError(
            f"seed(s) {', '.join(map(str, shared))} and their initial weights are in both arms, "
            "others in one only; give the same seeds on both sides, or none that both share"
        )
    return paired
