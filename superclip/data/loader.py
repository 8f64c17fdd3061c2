"""Rows -> batches: a map-style data set under a torch DataLoader whose batch sampler is `order`."""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from superclip.data.batch import Batch, Record, Source
from superclip.data.colour import Colours
from superclip.data.geometry import BadPicture, Geometry, plan, random_crop, render
from superclip.data.order import Order, Purpose, draw
from superclip.data.patience import Watch, begin_reader, start_readers
from superclip.data.text_reduction import TextReduction
from superclip.errors import UserError

Tokenize = Callable[[str], np.ndarray]
DrawKey = tuple[int, int, int]
"""Epoch, row and copy: what every draw of a training pair is counted by."""
SUBSTITUTES = 16
"""Pictures tried in the place of an unreadable one before the run stops."""


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


@dataclass(frozen=True)
class PairMaker:
    """What training makes of a record.

    Attributes:
        preprocess: size and mode.
        tokenize: of the model.
        crop_scale: area range of the random crop; (1, 1) draws none.
        shorten: makes the tokens of a training caption, in the place of `tokenize`.
        colours: changes the picture's colours.
    """

    preprocess: Preprocess
    tokenize: Tokenize
    crop_scale: tuple[float, float]
    shorten: TextReduction | None = None
    colours: Colours | None = None

    def __call__(
        self, record: Record, rng: Callable[[Purpose], np.random.Generator]
    ) -> dict[str, Any]:
        """One caption and one augmented picture, as `rng` draws them.

        Raises:
            BadPicture: if the picture can't be decoded.
        """
        which = int(rng(Purpose.CAPTION).integers(len(record.captions)))
        if self.shorten is None:
            tokens = self.tokenize(record.captions[which])
        else:
            tokens = self.shorten(record, which, rng(Purpose.TEXT))
        if self.crop_scale == (1.0, 1.0):
            geometry = self.preprocess.geometry(record)
        else:
            crop = random_crop(rng(Purpose.CROP), self.crop_scale)
            geometry = plan(record.width, record.height, self.preprocess.size, "crop", crop)
        image = render(record.picture, geometry, fast=True)
        return {
            "image": image if self.colours is None else self.colours(image, rng(Purpose.COLOUR)),
            "tokens": tokens,
            "image_id": record.row,
            "caption_id": record.caption_rows[which],
        }


class TrainRows(Dataset[dict[str, Any]]):
    """`[(epoch, row, copy)]` -> one augmented training pair; a picture that can't be read is
    replaced and counted.

    Args:
        source: the pictures.
        make: a pair of a record.
        seed: of the run.
        num: only the first so many pictures may take the place of another (default: all).
    """

    watch: Watch | None = None

    def __init__(self, source: Source, make: PairMaker, seed: int, num: int | None = None):
        self.source, self.make, self.seed = source, make, seed
        self.num = num or source.num_images

    def __getitem__(self, index: DrawKey) -> dict[str, Any]:
        epoch, row, copy = index
        causes: list[str] = []
        chosen, last = row, None
        for attempt in range(SUBSTITUTES + 1):
            try:
                return self._pair(epoch, chosen, copy) | {"causes": causes}
            except (BadPicture, OSError) as error:
                causes.append(cause_of(error))
                last = error
            place = row * (SUBSTITUTES + 1) + attempt
            rng = draw(self.seed, epoch, place, Purpose.SUBSTITUTE, copy)
            chosen = int(rng.integers(self.num))
        raise UserError(
            f"picture {self.source.keys[row]} and {SUBSTITUTES} substitutes can't be read: {last}"
        )

    def _pair(self, epoch: int, row: int, copy: int) -> dict[str, Any]:
        if self.watch:
            self.watch.note(row)
        pair = self.make(
            self.source.read(row), lambda purpose: draw(self.seed, epoch, row, purpose, copy)
        )
        if self.watch:
            self.watch.note(-1)
        return pair

    def watched(self, readers: int, timeout: float) -> tuple[TrainRows, Watch]:
        """These rows, noting what they read, and the watch over them."""
        rows = copying.copy(self)
        source = self.source
        rows.watch = Watch(
            readers, timeout, lambda row: f"{source.keys[row]} of {source.where(row)}"
        )
        return rows, rows.watch


def cause_of(error: Exception) -> str:
    """The name under which an unreadable picture is counted."""
    return type(error.__cause__ or error).__name__


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
    """This rank's slice of every global batch of the run from step `start` to step `total`.

    The rows of a step depend on the global batch alone; rank and worker only slice them. The first
    step costs the same wherever it lies.

    Args:
        start, total: optimizer steps of the whole run, over all its epochs.
        rows: pairs of this rank in a step.
    """

    def __init__(self, order: Order, start: int, total: int, rows: int, rank: int, ranks: int):
        self.order, self.start, self.total = order, start, total
        self.rows, self.rank, self.ranks = rows, rank, ranks

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[DrawKey]]:
        whole = self.rows * self.ranks
        mine = slice(self.rank * self.rows, (self.rank + 1) * self.rows)
        for step in range(self.start, self.total):
            epoch, local = divmod(step, self.order.steps_per_epoch(whole))
            rows, copies = self.order.rows(epoch, local, whole)
            yield [(epoch, r, c) for r, c in zip(rows[mine].tolist(), copies[mine].tolist())]


def train_batches(
    rows: TrainRows, sampler: StepSampler, workers: int, pin: bool, timeout: float
) -> Iterator[tuple[Batch, Counter[str]]]:
    """The rest of the run for this rank: one set of readers, which read ahead across epochs.

    Raises:
        UserError: naming reader and file, if no batch comes within `timeout` seconds, or a reader
            dies.
    """
    rows, watch = rows.watched(workers, timeout)
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        worker_init_fn=begin_reader if workers else None,
    )
    return watch.over(start_readers(loader))


class EvalRows(Dataset[tuple[np.ndarray, Record]]):
    """Row -> (uint8 `[3, s, s]`, record); nothing is replaced, an unreadable picture raises."""

    def __init__(self, source: Source, preprocess: Preprocess, rows: Sequence[int] | None = None):
        self.source, self.preprocess = source, preprocess
        self.rows = range(source.num_images) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[np.ndarray, Record]:
        """The same; one unreadable picture raises `BadPicture` or `OSError`."""
        record = self.source.read(self.rows[index])
        return render(record.picture, self.preprocess.geometry(record)), record

    def __getitem__(self, index: int) -> tuple[np.ndarray, Record]:
        try:
            return self.read(index)
        except (BadPicture, OSError) as error:
            key = self.source.keys[self.rows[index]]
            raise UserError(f"{self.source.name}: picture {key} can't be read: {error}") from None


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
