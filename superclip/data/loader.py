"""Rows -> batches: a map-style data set under a torch DataLoader whose batch sampler is `order`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from superclip.data.batch import Batch, Record, Source
from superclip.data.geometry import BadPicture, Geometry, plan, random_crop, render
from superclip.data.order import Order, Purpose, draw
from superclip.errors import UserError

Tokenize = Callable[[str], np.ndarray]
TRIES = 3


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the tower's input; saved in the checkpoint.

    Attributes:
        size: pixels a side.
        mode: crop, squash or pad.
        mean, std: of the channels in [0, 1].
    """

    size: int
    mode: Literal["crop", "squash", "pad"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a `weights_only` checkpoint."""
        return vars(self) | {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`."""
        mean, std = (tuple(values[name]) for name in ("mean", "std"))
        return Preprocess(values["size"], values["mode"], mean, std)

    def geometry(self, record: Record) -> Geometry:
        """Where the record's pixels go in evaluation and in sweeps."""
        return plan(record.width, record.height, self.size, self.mode)


def tokenizer_for(tokenizer: Any) -> Tokenize:
    """Text -> int64 `[l]`, remembering recent captions."""

    @lru_cache(maxsize=1 << 16)
    def tokenize(text: str) -> np.ndarray:
        return tokenizer([text])[0].numpy()

    return tokenize


class TrainRows(Dataset[dict[str, Any]]):
    """`[(epoch, row)]` -> one augmented training pair; a picture that can't be read is replaced and
    counted.

    Args:
        source: the pictures.
        preprocess: size and mode.
        tokenize: of the model.
        seed: of the run.
        crop_scale: area range of the random crop; (1, 1) draws none.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        tokenize: Tokenize,
        seed: int,
        crop_scale: tuple[float, float],
    ):
        self.source, self.preprocess, self.tokenize = source, preprocess, tokenize
        self.seed, self.crop_scale = seed, crop_scale

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, row = index
        causes: list[str] = []
        chosen, last = row, None
        for attempt in range(TRIES + 1):
            try:
                return self._pair(epoch, chosen) | {"causes": causes}
            except (BadPicture, OSError) as error:
                causes.append(type(error.__cause__ or error).__name__)
                last = error
            rng = draw(self.seed, epoch, row * (TRIES + 1) + attempt, Purpose.SUBSTITUTE)
            chosen = int(rng.integers(self.source.num_images))
        raise UserError(
            f"picture {self.source.keys[row]} and {TRIES} substitutes can't be read: {last}"
        )

    def _pair(self, epoch: int, row: int) -> dict[str, Any]:
        record = self.source.read(row)
        which = int(draw(self.seed, epoch, row, Purpose.CAPTION).integers(len(record.captions)))
        if self.crop_scale == (1.0, 1.0):
            geometry = self.preprocess.geometry(record)
        else:
            crop = random_crop(draw(self.seed, epoch, row, Purpose.CROP), self.crop_scale)
            geometry = plan(record.width, record.height, self.preprocess.size, "crop", crop)
        return {
            "image": render(record.picture, geometry, fast=True),
            "tokens": self.tokenize(record.captions[which]),
            "image_id": record.row,
            "caption_id": record.caption_rows[which],
        }


def collate(pairs: Sequence[dict[str, Any]]) -> tuple[Batch, Counter[str]]:
    """Stack pairs; the counter says why pictures were replaced."""
    batch = Batch(
        images=torch.from_numpy(np.stack([p["image"] for p in pairs])),
        tokens=torch.from_numpy(np.stack([p["tokens"] for p in pairs])),
        image_ids=torch.tensor([p["image_id"] for p in pairs]),
        caption_ids=torch.tensor([p["caption_id"] for p in pairs]),
    )
    return batch, Counter(cause for p in pairs for cause in p["causes"])


class StepSampler:
    """This rank's slice of every global batch from `start` on, as (epoch, row) pairs.

    The rows of a step depend on the global batch alone; rank and worker only slice them.
    """

    def __init__(self, order: Order, epoch: int, start: int, rows: int, rank: int, ranks: int):
        self.order, self.epoch, self.start = order, epoch, start
        self.rows, self.rank, self.ranks = rows, rank, ranks

    def __len__(self) -> int:
        return self.order.steps_per_epoch(self.rows * self.ranks) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.start + len(self)):
            rows = self.order.rows(self.epoch, step, self.rows * self.ranks)
            yield [
                (self.epoch, int(r))
                for r in rows[self.rank * self.rows : (self.rank + 1) * self.rows]
            ]


def train_batches(
    rows: TrainRows, sampler: StepSampler, workers: int, pin: bool
) -> Iterator[tuple[Batch, Counter[str]]]:
    """The rest of one epoch for this rank."""
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


class EvalRows(Dataset[tuple[np.ndarray, Record]]):
    """Row -> (uint8 `[3, s, s]`, record without its pixels); nothing is replaced, an unreadable
    picture raises."""

    def __init__(self, source: Source, preprocess: Preprocess, rows: Sequence[int] | None = None):
        self.source, self.preprocess = source, preprocess
        self.rows = range(source.num_images) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Record]:
        record = self.source.read(self.rows[index])
        try:
            return render(record.picture, self.preprocess.geometry(record)), record
        except BadPicture as error:
            raise UserError(
                f"{self.source.name}: picture {record.key} can't be read: {error}"
            ) from None


def limited(shard_sizes: tuple[int, ...], num: int | None, name: str) -> tuple[int, ...]:
    """The shard sizes of the first `num` pictures.

    Raises:
        UserError: if there are not that many.
    """
    if num is None:
        return shard_sizes
    if num > sum(shard_sizes):
        raise UserError(f"--train-num-samples {num}: {name} holds only {sum(shard_sizes)} pictures")
    edges = np.minimum(np.concatenate([[0], np.cumsum(shard_sizes)]), num)
    return tuple(int(n) for n in np.diff(edges) if n)
