"""What one model does on the confirm pictures: the measures that a hypothesis file may name.

Of generated scenes the confirm pictures are a split of their own, which no other command reads. Of
other data they are the fifth, by the hash of their ids, that no sweep scores (superclip.evaluate,
which retrieves among all held-out pictures, does read them). Heads and learning rates are chosen on
discovery pictures; confirm pictures only judge.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from interp.claim import FEWEST, Wanted
from interp.collect import (
    Subject,
    attention_maps,
    boxes_on_grid,
    exchangeable,
    usable_batches,
)
from interp.comparison import influence
from interp.config import HypothesisConfig, OfSweep
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.stats.splits import assign_split, strata
from interp.subject import default_folder, open_pictures, subject_of, trained_ids
from superclip.config import is_scenes
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError
from superclip.ops.world import choose_device

if TYPE_CHECKING:
    from interp.swept import Swept
    from superclip.data.batch import Record, Source
    from superclip.evaluation.encode import Encoder
    from superclip.model.weights import Checkpoint

SCENES_READ = 1000
UNTRAINED = 5
"""Untrained towers that a contrast needs at least."""


@dataclass(frozen=True)
class Grounding:
    """Attention and boxes of the confirm pictures that have an object.

    Attributes:
        values: what each picture adds to the excess of each head.
        ids: of those pictures.
    """

    values: Float[np.ndarray, "n l h"]
    ids: list[str]


@dataclass(frozen=True, eq=False)
class Confirm:
    """A checkpoint, and the confirm pictures of its held-out data.

    Attributes:
        found: the checkpoint. source: the pictures; `rows` of them are of confirm.
    """

    found: Checkpoint
    source: Source
    rows: list[int]
    wanted: Wanted
    config: HypothesisConfig

    @cached_property
    def subject(self) -> Subject:
        return subject_of(self.found)

    @cached_property
    def swept(self) -> Swept:
        """The sweep beside the checkpoint, whose discovery pictures choose.

        Raises:
            UserError: as `open_swept`.
        """
        from interp.swept import open_swept

        of = OfSweep(
            self.found.path,
            default_folder(self.found.path, self.wanted.attention),
            device=self.config.device,
            batch_size=self.config.batch_size,
        )
        return open_swept(of)

    @cached_property
    def grounding(self) -> Grounding:
        self.found.model.to(choose_device(self.config.device))
        return self.ground(HookedVisionTransformer(self.found.model.clip.visual))

    def ground(self, tower: HookedVisionTransformer) -> Grounding:
        """The excess of a tower's heads, picture by picture."""
        device, preprocess = choose_device(self.config.device), self.found.preprocess
        model, maps = self.found.model.to(device), []
        records: list[Record] = []
        batches = usable_batches(
            *(self.source, preprocess, self.rows),
            self.config.batch_size,
            Counter(),
            f"confirm, {self.found.path.parent.name}",
        )
        for pixels, some in batches:
            images = model.normalise(torch.from_numpy(pixels).to(device))
            kind: Any = self.wanted.attention
            maps.append(attention_maps(tower, images, kind)[0])
            records += [replace(record, picture=b"") for record in some]
        if len(records) < FEWEST:
            raise UserError(
                f"{self.source.name}: {len(records)} confirm pictures with objects; {FEWEST} are "
                "needed"
            )
        grid = tower.cfg.grid
        boxes = [boxes_on_grid(record, preprocess, grid)[:2] for record in records]
        coverage, valid = (np.stack(part).astype(np.float32) for part in zip(*boxes))
        stratum = strata(*exchangeable(records, preprocess, grid, coverage, valid))
        kept = stratum >= 0
        values = influence(np.concatenate(maps), coverage, valid, stratum)
        return Grounding(values[kept], [r.key for r, k in zip(records, kept) if k])

    def chosen(self, layers: str) -> Head:
        """The best head of discovery among these layers."""
        results = self.swept.results
        mean = results.metrics["excess"][results.rows("discovery")].astype(np.float64).mean(axis=0)
        within = layers_of(layers, len(mean))
        if not within.any():
            raise UserError(f"heads {layers!r}: a tower of {len(mean)} layer(s) has none")
        best = np.where(within[:, None], mean, -np.inf).argmax()
        return Head(*(int(i) for i in np.unravel_index(best, mean.shape)))

    def untrained(self) -> tuple[Float[np.ndarray, " n"], str]:
        """The excess of the untrained tower's head that discovery found best, of all that the sweep
        looked at."""
        from superclip.model.factory import build_clip

        facts = self.swept.results.manifest["untrained"]
        if len(facts) < UNTRAINED:
            raise UserError(
                f"{self.swept.folder} has {len(facts)} untrained towers, {UNTRAINED} are needed; "
                "interp.sweep --overwrite sweeps them"
            )
        best = max(facts, key=lambda f: f["discovery_excess"])
        subject, head = self.subject, Head.parse(best["head"])
        clip = build_clip(subject.model_config, best["seed"], subject.init_scale).eval()
        visual = clip.visual.to(choose_device(self.config.device))
        found = self.ground(HookedVisionTransformer(visual))
        told = f"{head} of seed {best['seed']}, best of {len(facts)} untrained towers"
        return found.values[:, head.layer, head.index], told

    @cached_property
    def encoder(self) -> Encoder:
        from superclip.data.loader import tokenizer_for
        from superclip.evaluation.encode import Encoder
        from superclip.model.factory import tokenizer

        device = choose_device(self.config.device)
        self.found.model.to(device)
        tokenize = tokenizer_for(tokenizer(self.found.model_config))
        return Encoder(self.found.preprocess, tokenize, device)


def layers_of(name: str, depth: int) -> Bool[np.ndarray, " l"]:
    """Which layers a name stands for.

    >>> layers_of("first half", 5).tolist()
    [True, True, False, False, False]
    """
    layer = np.arange(depth)
    return {
        "all": layer >= 0,
        "first half": layer < depth // 2,
        "second half": layer >= depth // 2,
        "last": layer == depth - 1,
        "all but the last": layer < depth - 1,
    }[name]


def open_confirm(found: Checkpoint, wanted: Wanted, config: HypothesisConfig) -> Confirm:
    """The confirm pictures of a checkpoint's held-out data.

    Raises:
        UserError: if they are too few, or some of them were trained on.
    """
    assert found.config is not None
    run = found.config.data
    held_out = run.val_data or held_out_spec(run.train_data)
    if is_scenes(held_out):
        source = open_source("scenes:confirm", wanted.pictures or SCENES_READ, run.data_seed, True)
        return Confirm(found, source, list(range(source.num_images)), wanted, config)
    source, rows = open_pictures(None, None, None, None, run)
    trained, keys = trained_ids(run, False), source.keys
    mine = [row for row in rows if assign_split(keys[row]) == "confirm"]
    if wanted.pictures is not None and wanted.pictures > len(mine):
        raise UserError(f"{source.name} has {len(mine)} confirm pictures, not {wanted.pictures}")
    mine = mine[: wanted.pictures]
    if both := [keys[row] for row in mine if keys[row] in trained]:
        raise UserError(f"{found.path} was trained on {len(both)} confirm pictures, as {both[0]}")
    if len(mine) < FEWEST:
        raise UserError(f"{source.name}: {len(mine)} confirm pictures; {FEWEST} are needed")
    return Confirm(found, source, mine, wanted, config)


def pictures_sha256(asked: Confirm) -> str:
    """Of the confirm pictures' ids and their data."""
    ids = [asked.source.keys[row] for row in asked.rows]
    return hashlib.sha256("\n".join([asked.source.digest, *ids]).encode()).hexdigest()


def grounding_sha256(asked: Confirm) -> str | None:
    """Of the pictures that a measure of grounding kept; None if none was taken."""
    if "grounding" not in vars(asked):
        return None
    return hashlib.sha256("\n".join(asked.grounding.ids).encode()).hexdigest()
