"""From a data name to a `Source`: one table, used by training, evaluation and sweeps alike."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from superclip.data.batch import Record, Source
from superclip.errors import UserError, nearest

SCENE_SPLITS = ("train", "val", "test", "tune", "confirm")
SCENES_TRAIN, SCENES_HELD_OUT = 115_200, 2_000


def _scenes(rest: str, num: int | None, seed: int, held_out: bool) -> Source:
    from superclip.data.scenes import Scenes

    split = rest or ("val" if held_out else "train")
    if split not in SCENE_SPLITS:
        raise UserError(f"scenes has no split {split!r}; {nearest(split, SCENE_SPLITS)}")
    return Scenes(split, num or (SCENES_HELD_OUT if split != "train" else SCENES_TRAIN), seed)


def _coco(rest: str, num: int | None, seed: int, held_out: bool) -> Source:
    from superclip.data.coco import CocoFolder

    root, _, split = rest.partition(":")
    return CocoFolder(Path(root), split or ("val" if held_out else "train"), limit=num)


KINDS: dict[str, Callable[[str, int | None, int, bool], Source]] = {
    "scenes": _scenes,
    "coco": _coco,
}


class Mixture:
    """Several sources as one; rows and caption rows run over them in the order given.

    Where a key occurs twice, every key gets its source's place in front (`1:000000003`): data sets
    that img2dataset wrote all count from 000000000.

    Raises:
        UserError: if two sources are the same data.
    """

    def __init__(self, parts: Sequence[Source]):
        self.parts = tuple(parts)
        digests = [part.digest for part in parts]
        for (i, a), (j, b) in itertools.combinations(enumerate(parts), 2):
            if a.digest == b.digest:
                raise UserError(
                    f"sources {i + 1} and {j + 1} ({a.name}, {b.name}) are the same data; name it "
                    "once, and use --train-data-weights to have it more often"
                )
        self.name = "::".join(part.name for part in parts)
        self.digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        self._starts = np.cumsum([0, *(part.num_images for part in parts)])
        self._first_captions = np.cumsum([0, *(part.num_captions for part in parts)])
        self.num_images, self.num_captions = int(self._starts[-1]), int(self._first_captions[-1])
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        self._clash = len({key for part in parts for key in part.keys}) < self.num_images

    @property
    def keys(self) -> list[str]:
        return [self._key(k, key) for k, part in enumerate(self.parts) for key in part.keys]

    def read(self, row: int) -> Record:
        k, local = self._place(row)
        record, first = self.parts[k].read(local), int(self._first_captions[k])
        return dataclasses.replace(
            record,
            row=row,
            key=self._key(k, record.key),
            caption_rows=tuple(first + c for c in record.caption_rows),
        )

    def where(self, row: int) -> str:
        k, local = self._place(row)
        return self.parts[k].where(local)

    def _place(self, row: int) -> tuple[int, int]:
        """Source of a row, and its row in there."""
        if not 0 <= row < self.num_images:
            raise IndexError(f"row {row} of {self.num_images}")
        k = int(np.searchsorted(self._starts, row, side="right")) - 1
        return k, row - int(self._starts[k])

    def _key(self, k: int, key: str) -> str:
        return f"{k + 1}:{key}" if self._clash else key


def contents(source: Source) -> dict[str, str]:
    """File (or data set) -> digest, in order: what a resumed run must find again."""
    if isinstance(source, Mixture):
        parts = enumerate(map(contents, source.parts), 1)
        return {f"{k}:{name}": digest for k, part in parts for name, digest in part.items()}
    return getattr(source, "files", None) or {source.name: source.digest}


def shard_weights(source: Source, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """One weight a shard, as `Order` takes them, from one a source."""
    if weights is None:
        return None
    parts = source.parts if isinstance(source, Mixture) else (source,)
    return tuple(w for w, part in zip(weights, parts, strict=True) for _ in part.shard_sizes)


def open_source(spec: str, num: int | None = None, seed: int = 0, held_out: bool = False) -> Source:
    """Open `scenes[:SPLIT]`, `coco:FOLDER[:SPLIT]`, tar shards, or several of them (`A::B`).

    Args:
        num: how many pictures of scenes or a COCO folder; shards are opened whole.
        seed: of generated scenes.
        held_out: which split a name without one means.

    Raises:
        UserError: if there is no such data, or it is damaged.
    """
    if "::" in spec:
        if num is not None:
            raise UserError(
                f"{num} pictures of {spec}: not said of which source; leave the number out "
                "(in training, --train-data-weights takes less of one)"
            )
        return Mixture([open_source(part, None, seed, held_out) for part in spec.split("::")])
    kind, _, rest = spec.partition(":")
    if kind in KINDS:
        return KINDS[kind](rest, num, seed, held_out)
    if Path(spec).is_dir():
        raise UserError(
            f"{spec!r} is a folder; write coco:{spec} for COCO's layout, or a tar pattern for "
            "shards"
        )
    from superclip.data.shards import Shards

    return Shards(spec)


def _names(spec: str) -> set[str]:
    """What a name stands for, however it is spelled: a split of its kind, or files."""
    kind, _, rest = spec.partition(":")
    if kind == "coco":
        root, _, split = rest.partition(":")
        return {f"coco:{Path(root).resolve()}:{(split or 'train').removesuffix('2017')}"}
    if kind in KINDS:
        return {f"{kind}:{rest or 'train'}"}
    from superclip.data.shards import expand, is_stream

    return {spec} if is_stream(spec) else {str(path.resolve()) for path in expand(spec)}


def held_out_spec(train_data: str) -> str:
    """The held-out data that belongs to training data; of several, to the first that has any which
    none of them is.

    Raises:
        UserError: if none is known.
    """
    if "::" in train_data:
        parts = train_data.split("::")
        trained = set().union(*map(_names, parts))
        for part in parts:
            with contextlib.suppress(UserError):
                if not _names(found := held_out_spec(part)) & trained:
                    return found
        raise UserError(f"no source of {train_data!r} has held-out data; name some with --val-data")
    kind, _, rest = train_data.partition(":")
    if kind == "scenes":
        if rest == "val":
            raise UserError("scenes:val is trained on here; name held-out data with --val-data")
        return "scenes:val"
    if kind == "coco":
        from superclip.data.coco import held_out_split

        root, _, split = rest.partition(":")
        return f"coco:{root}:{held_out_split(Path(root), split or 'train')}"
    from superclip.data.shards import held_out_pattern, is_stream

    if is_stream(train_data):
        raise UserError(f"nobody knows what belongs to {train_data!r}; name data with --val-data")
    return held_out_pattern(train_data)
