"""What the readers hand on: one `Record` a picture, one `Batch` a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch


Tagged = tuple[tuple[str, str], ...]
"""Words of a text, each with its part of speech."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture in its own pixels.

    Attributes:
        xywh: float32 `[n, 4]`, left, top, width, height, in pixels of the stored picture.
        categories: `n` category names.
        crowd: bool `[n]`, COCO's `iscrowd`: a region to ignore, never a target.
    """

    xywh: np.ndarray
    categories: tuple[str, ...]
    crowd: np.ndarray

    @staticmethod
    def none() -> Boxes:
        return Boxes(np.zeros((0, 4), np.float32), (), np.zeros(0, bool))


@dataclass(frozen=True)
class Record:
    """One picture with everything known about it.

    Attributes:
        row: contiguous row of the picture in its source's manifest.
        key: public id (COCO image id, img2dataset key, scene name); splits hash this.
        width, height: pixels, after any EXIF transpose.
        picture: the encoded file as it is, or uint8 `[height, width, 3]`.
        captions: every caption of the picture.
        caption_rows: contiguous rows of those captions in the manifest.
        boxes: the annotated objects.
        clutter: boxes of unannotated distractors (generated scenes only).
        tags: of every caption its words with their Penn Treebank tags, where the data bring them.
    """

    row: int
    key: str
    width: int
    height: int
    picture: bytes | np.ndarray
    captions: tuple[str, ...]
    caption_rows: tuple[int, ...]
    boxes: Boxes = field(default_factory=Boxes.none)
    clutter: Boxes = field(default_factory=Boxes.none)
    tags: tuple[Tagged, ...] | None = None


@runtime_checkable
class Source(Protocol):
    """A finite, randomly readable set of pictures with captions.

    Attributes:
        name: printed name of the data set.
        digest: sha256 over everything that decides its content.
        num_images, num_captions: sizes of the manifest.
        shard_sizes: pictures per shard, in manifest order (for the block shuffle of `order`).
        keys: the public id of every row.

    `read` raises `BadPicture` or `OSError` for one unreadable picture, `UserError` where the whole
    data can't be trusted any more. `where` names the file of a row.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def num_images(self) -> int: ...
    @property
    def num_captions(self) -> int: ...
    @property
    def shard_sizes(self) -> tuple[int, ...]: ...
    @property
    def keys(self) -> list[str]: ...

    def read(self, row: int) -> Record: ...
    def where(self, row: int) -> str: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        images: uint8 `[b, 3, s, s]`; normalisation is the model's first operation.
        tokens: int64 `[b, l]` text ids.
        image_ids, caption_ids: int64 `[b]`, contiguous manifest rows of picture and caption.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    image_ids: torch.Tensor
    caption_ids: torch.Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        move = {name: t.to(device, non_blocking=True) for name, t in vars(self).items()}
        return Batch(**move)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to a GPU run beside the computation."""
        return Batch(**{name: t.pin_memory() for name, t in vars(self).items()})

    def split(self, parts: int) -> list[Batch]:
        """`parts` equal micro-batches in order; `parts` must divide the rows."""
        assert len(self) % parts == 0, f"{parts} micro-batches do not divide {len(self)} rows"
        chunks = {name: t.chunk(parts) for name, t in vars(self).items()}
        return [Batch(**{name: c[k] for name, c in chunks.items()}) for k in range(parts)]
