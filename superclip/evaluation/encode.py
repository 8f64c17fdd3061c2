"""Pictures and texts as unit vectors, the same bits on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superclip.config import Precision
from superclip.data.batch import Record, Source
from superclip.data.geometry import BadPicture
from superclip.data.loader import EvalRows, Preprocess, Tokenize
from superclip.data.patience import begin_reader, start_readers
from superclip.errors import UserError
from superclip.model.superclip import SuperCLIP
from superclip.ops.precision import autocast
from superclip.ops.world import World
from superclip.progress import progress

T = TypeVar("T")
TEXTS = 256
"""Texts of a forward pass."""


class Interrupted(Exception):
    """A rank was asked to stop; raised on all of them, at the same place."""


Item = tuple[np.ndarray, Record] | tuple[str, str]
"""Pixels and record, or the key of an unreadable picture and the cause."""


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of a source, in its order.

    Attributes:
        features: unit vectors.
        patches: mean of the tower's final patch tokens, where it was asked for.
        records: what is known of each, without its pixels.
        missing: key -> cause of the pictures that can't be read.
    """

    features: Float[Tensor, "n d"]
    patches: Float[Tensor, "n w"] | None
    records: list[Record]
    missing: dict[str, str]


@dataclass(frozen=True)
class Encoder:
    """How pictures and texts are read and encoded.

    Batches are formed before they are dealt to the ranks, so a picture always meets the same
    neighbours, and its features are the same bits on any number of ranks.

    Attributes:
        batch_size: pictures of a forward pass. workers: reader processes of each rank.
        interrupted: asked between forward passes; once true on a rank, all ranks raise
            `Interrupted`.
    """

    preprocess: Preprocess
    tokenize: Tokenize
    device: torch.device
    precision: Precision = "fp32"
    batch_size: int = 64
    workers: int = 0
    world: World = dataclasses.field(default_factory=World)
    interrupted: Callable[[], bool] = bool

    @torch.no_grad()
    def texts(self, model: SuperCLIP, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """Unit vectors of texts; equal texts get equal bits, so that they tie exactly.

        Raises:
            UserError: if a vector is not finite.
        """
        unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        chunks = list(_chunks(list(unique), TEXTS))
        parts = []
        for chunk in self._until_interrupted(self._mine(chunks)):
            tokens = torch.from_numpy(np.stack([self.tokenize(t) for t in chunk])).to(self.device)
            with autocast(self.precision, self.device):
                parts.append(model.encode_text(tokens).float())
        vectors = torch.cat(self._everybodys(parts, len(chunks)))
        return _finite(vectors[[unique[text] for text in texts]])

    def pictures(
        self,
        model: SuperCLIP,
        source: Source,
        rows: Sequence[int] | None = None,
        patches: bool = False,
    ) -> Pictures:
        """Encode pictures; those that can't be read are left out and listed.

        Raises:
            UserError: if none can be read, a vector is not finite, or the data as a whole is
                damaged.
        """
        chunks = list(_chunks(range(source.num_images) if rows is None else rows, self.batch_size))
        batches = self._until_interrupted(self._read(source, chunks))
        mine = [(self._encode(model, b[0], patches), b[1], b[2]) for b in batches]
        every = self._everybodys([part for part, _, _ in mine], len(chunks))
        told = self._in_order([(found, lost) for _, found, lost in mine], len(chunks))
        records = [record for found, _ in told for record in found]
        missing = {key: cause for _, lost in told for key, cause in lost.items()}
        if not records:
            key, cause = next(iter(missing.items()))
            raise UserError(f"{source.name}: no picture can be read (first: {key}: {cause})")
        both = torch.cat(every)
        width = both.shape[1] - (model.patch_width if patches else 0)
        features, patch_means = both[:, :width], both[:, width:]
        return Pictures(_finite(features), patch_means if patches else None, records, missing)

    def _read(
        self, source: Source, chunks: list[Sequence[int]]
    ) -> Iterator[tuple[list[np.ndarray], list[Record], dict[str, str]]]:
        loader: DataLoader[Any] = DataLoader(
            _Readable(EvalRows(source, self.preprocess)),
            batch_sampler=self._mine(chunks),
            num_workers=self.workers,
            worker_init_fn=begin_reader if self.workers else None,
            collate_fn=_sorted_out,
        )
        batches = start_readers(loader)
        if not self.world.is_main:
            return iter(batches)
        return iter(progress(batches, "pictures", len(loader), unit="batch"))

    @torch.no_grad()
    def _encode(self, model: SuperCLIP, pixels: list[np.ndarray], patches: bool) -> Tensor:
        if not pixels:
            width = model.feature_width + (model.patch_width if patches else 0)
            return torch.zeros(0, width, device=self.device)
        images = torch.from_numpy(np.stack(pixels)).to(self.device)
        with autocast(self.precision, self.device):
            if patches:
                features, means = model.encode_patches(images)
                return torch.cat([features.float(), means.float()], 1)
            return model.encode_image(images).float()

    def _mine(self, chunks: list[Any]) -> list[Any]:
        return chunks[self.world.rank :: self.world.size]

    def _everybodys(self, parts: list[Tensor], count: int) -> list[Tensor]:
        if self.world.size == 1:
            return self._in_order(parts, count)
        arrays = self._in_order([part.cpu().numpy() for part in parts], count)
        return [torch.from_numpy(array).to(self.device) for array in arrays]

    def _until_interrupted(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            if self.interrupted():
                return
            yield item

    def _in_order(self, mine: list[T], count: int) -> list[T]:
        """What all the ranks made of their chunks, chunk by chunk.

        Raises:
            Interrupted: if a rank has not done all of its own.
        """
        size = self.world.size
        every = self.world.gather_objects(mine)
        if sum(map(len, every)) < count:
            raise Interrupted
        return [every[k % size][k // size] for k in range(count)]


class _Readable(Dataset[Item]):
    def __init__(self, rows: EvalRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        try:
            pixels, record = self.rows.read(index)
            return pixels, dataclasses.replace(record, picture=b"")
        except (BadPicture, OSError) as error:
            return self.rows.source.keys[self.rows.rows[index]], str(error)


def _sorted_out(items: list[Item]) -> tuple[list[np.ndarray], list[Record], dict[str, str]]:
    good = [item for item in items if isinstance(item[1], Record)]
    bad = {str(key): str(cause) for key, cause in items if isinstance(cause, str)}
    return [np.asarray(g[0]) for g in good], [r for _, r in good if isinstance(r, Record)], bad


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _finite(features: Tensor) -> Tensor:
    if not bool(features.isfinite().all()):
        raise UserError(
            "the model's features are not finite: it has diverged (train at a lower --lr), or "
            "--precision is too low for it"
        )
    return features
