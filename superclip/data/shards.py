"""WebDataset tar shards, read at random through an index.

A shard is a plain tar with a picture and its facts per sample: `KEY.jpg` and `KEY.json` as
`write_shards` writes them, or `KEY.txt` (and `KEY.json`) as img2dataset and open_clip's users do.
Beside `NAME.tar` lies `NAME.idx`: where every sample's bytes are, built on first use where it is
missing or belongs to other bytes.

What happens when a shard goes bad under a reader:

- A read that fails (a flaky file system, a file deleted or out of reach) is tried again with
  growing waits, the file opened anew each time; after that the picture is unreadable, which
  training counts by cause and replaces. A file deleted or replaced while it is open is read on.
- A file whose size or time of change is not what it was when its index was opened (rewritten, cut,
  replaced) stops the run with a `UserError`: every read is checked, because bytes that happen to
  decode would be another picture than the index says.
- A sample whose facts or picture are broken, in a file that has not changed, is unreadable.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from superclip.data.batch import Boxes, Record, Tagged
from superclip.data.coco import HELD_OUT
from superclip.data.geometry import BadPicture, picture_size
from superclip.data.patience import WAITS, Patience
from superclip.errors import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
PICTURE_PARTS = ("jpg", "jpeg", "png", "webp")
ENDS = 1 << 16
"""Bytes at either end of a tar that its fingerprint covers."""
MAX_OPEN = 64
"""File descriptors that one reader keeps open."""

_BLOCK = 512
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar lie.

    Attributes:
        fingerprint: of the tar this index belongs to.
        keys: str `[n]`.
        picture, facts, text: int64 `[n, 2]` offset and length in the tar of the picture, `KEY.json`
            and `KEY.txt`; length 0 where there is none.
        captions: int64 `[n]`, captions of every sample.
        uncaptioned: samples left out because they have no caption, 0-d.
    """

    fingerprint: np.ndarray
    keys: np.ndarray
    picture: np.ndarray
    facts: np.ndarray
    text: np.ndarray
    captions: np.ndarray
    uncaptioned: np.ndarray

    def save(self, path: Path) -> None:
        """Write atomically: another process sees the whole index or none."""
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            partial = Path(scratch) / "index.npz"
            np.savez(partial, **vars(self))
            partial.replace(path)

    @staticmethod
    def load(path: Path) -> ShardIndex:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return ShardIndex(**{f.name: held[f.name] for f in fields(ShardIndex)})


class BrokenFacts(BadPicture):
    """A sample whose KEY.json or KEY.txt is not what it should be."""


@dataclass(frozen=True)
class _Facts:
    """What a sample says about its picture; img2dataset's size is not trusted, so None."""

    captions: tuple[str, ...]
    size: tuple[int, int] | None = None
    boxes: Boxes = field(default_factory=Boxes.none)
    clutter: Boxes = field(default_factory=Boxes.none)
    tags: tuple[Tagged, ...] | None = None


class Shards:
    """Tar shards as one `Source`; rows run over the shards in the order given.

    Args:
        pattern: paths with braces (`train-{000000..000003}.tar`), globs, or a comma list of them.
        waits: seconds between the tries of a read that fails.

    Attributes:
        attrition: samples left out, by cause.

    Raises:
        UserError: if a shard is missing, empty, compressed or cut, a sample has no picture or
            broken facts, or a key occurs twice.
    """

    def __init__(self, pattern: str, waits: tuple[float, ...] = WAITS):
        self._open: dict[int, int] = {}
        self._patience = Patience(waits)
        self._paths = expand(pattern)
        self._seen = [_size_and_time(path.stat()) for path in self._paths]
        self._indices = [self._patience(path, partial(open_index, path)) for path in self._paths]
        self.name = ",".join(Path(part).name for part in _comma_list(pattern))
        self.shard_sizes = tuple(len(index.keys) for index in self._indices)
        self._starts = np.cumsum([0, *self.shard_sizes])
        captions = np.concatenate([index.captions for index in self._indices])
        self._first_caption = np.concatenate([[0], np.cumsum(captions)])
        self.num_images, self.num_captions = len(captions), int(captions.sum())
        self.attrition = {}
        if uncaptioned := sum(int(index.uncaptioned) for index in self._indices):
            self.attrition["samples without caption"] = uncaptioned
        refuse_twins(self.keys, pattern)
        content = hashlib.sha256()
        for index in self._indices:
            for column in vars(index).values():
                content.update(column.tobytes())
        self.digest = content.hexdigest()

    @property
    def files(self) -> dict[str, str]:
        """Folder and name of every shard -> fingerprint."""
        return {
            f"{path.absolute().parent.name}/{path.name}": str(index.fingerprint)
            for path, index in zip(self._paths, self._indices)
        }

    @property
    def keys(self) -> list[str]:
        return np.concatenate([index.keys for index in self._indices]).tolist()

    def read(self, row: int) -> Record:
        """One sample: one positioned read for its facts, one for its picture.

        Raises:
            BadPicture: if the facts are broken, or lack a size that the picture's header can't
                tell.
            OSError: if the file can't be read.
            UserError: if the file has changed since its index was opened.
        """
        if not 0 <= row < self.num_images:
            raise IndexError(f"row {row} of {self.num_images}")
        shard, local = self._place(row)
        index, first = self._indices[shard], int(self._first_caption[row])
        document, text, picture = (
            self._bytes(shard, *column[local].tolist())
            for column in (index.facts, index.text, index.picture)
        )
        key, where = str(index.keys[local]), f"{self._paths[shard]}: {index.keys[local]}"
        record = make_record(row, key, picture, document, text, first, where)
        if len(record.captions) != index.captions[local]:
            raise BrokenFacts(f"{where}: not as many captions as its index says")
        return record

    def where(self, row: int) -> str:
        return str(self._paths[self._place(row)[0]])

    def _place(self, row: int) -> tuple[int, int]:
        """Shard of a row, and its place in there."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        path = self._paths[shard]

        def read() -> bytes:
            try:
                descriptor = self._descriptor(shard)
                data, now = os.pread(descriptor, length, offset), os.fstat(descriptor)
            except OSError:
                if shard in self._open:
                    os.close(self._open.pop(shard))
                raise
            if _size_and_time(now) != self._seen[shard]:
                raise UserError(f"{path} has changed since the run began to read it; start again")
            if len(data) != length:
                raise OSError(f"{path}: {len(data)} of {length} bytes came")
            return data

        return self._patience(path, read) if length else b""

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os may be gone by then
        for descriptor in self._open.values():
            close(descriptor)


def make_record(
    row: int, key: str, picture: bytes, document: bytes, text: bytes, first_caption: int, where: str
) -> Record:
    """A record from the parts of a sample; the parts that are not there are empty.

    Raises:
        BadPicture: if the facts are broken, or lack a size that the picture's header can't tell.
    """
    facts = _parse(document, text, where)
    try:
        width, height = facts.size or picture_size(picture)
    except BadPicture as error:
        raise BadPicture(f"{where}: {error}") from error.__cause__
    return Record(
        row=row,
        key=key,
        width=width,
        height=height,
        picture=picture,
        captions=facts.captions,
        caption_rows=tuple(range(first_caption, first_caption + len(facts.captions))),
        boxes=facts.boxes,
        clutter=facts.clutter,
        tags=facts.tags,
    )


def _size_and_time(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_size, facts.st_mtime_ns


def is_stream(spec: str) -> bool:
    """Whether data, or a part of it, can only be read from the front."""
    return any(re.match(r"pipe:|\w+://", part) for part in spec.split("::"))


def expand(pattern: str) -> list[Path]:
    """The shards that a pattern names, all of them present.

    Raises:
        UserError: naming the first missing shard, the part that matches nothing, or a stream.
    """
    from braceexpand import braceexpand

    paths: list[Path] = []
    for part in _comma_list(pattern):
        if is_stream(part):
            raise UserError(
                f"{part!r} is a stream, which can only be trained on; here shards are read at "
                "random: download them first and name the local tar files"
            )
        try:
            names = list(braceexpand(os.path.expanduser(part)))
        except ValueError:
            raise UserError(
                f"{part!r} has unbalanced braces; write 'NAME-{{000..003}}.tar'"
            ) from None
        found = [
            match
            for name in names
            for match in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])
        ]
        if not found:
            raise UserError(f"{part!r} matches no file; mend it, or pack shards first")
        paths += map(Path, found)
    if not paths:
        raise UserError(f"{pattern!r} names no shard; write 'NAME-{{000000..000003}}.tar'")
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing "
            f"(first: {missing[0]}); name data that you have, or pack them"
        )
    return paths


def held_out_pattern(pattern: str) -> str:
    """The held-out shards that were packed together with training shards.

    Raises:
        UserError: if no manifest lies beside them, or it lists no held-out split.
    """
    paths = expand(pattern)
    path = paths[0].parent / MANIFEST
    ask = "name held-out data with --val-data"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the held-out shards are unknown; {ask}")
    splits = {shard["name"]: shard["split"] for shard in read_manifest(path)["shards"]}
    mine = {splits.get(p.name) for p in paths}
    others = [split for split in HELD_OUT if split in splits.values() and split not in mine]
    if not others:
        raise UserError(f"{path} lists no held-out split beside {pattern!r}; {ask}")
    return str(path.parent / f"{others[0]}-*.tar")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a packed set.

    Raises:
        UserError: if it is damaged or of another schema.
    """
    try:
        manifest = json.loads(path.read_bytes())
        schema, _ = manifest["schema"], manifest["shards"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a manifest of shards ({error!r}); pack them again"
        ) from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads {SCHEMA}; pack them again")
    return manifest


def open_index(path: Path) -> ShardIndex:
    """The index of a shard: the one beside it if it belongs to these bytes, else built (and kept).

    Raises:
        UserError: if the tar is empty, compressed or cut, or a sample in it is broken.
    """
    beside, mark = path.with_suffix(".idx"), fingerprint(path)
    try:
        index = ShardIndex.load(beside)
        if str(index.fingerprint) == mark:
            return index
        log.warning("%s belongs to other bytes than %s: built again", beside, path.name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): built again", beside, error)
    index = scan(path)
    try:
        index.save(beside)
    except OSError as error:
        log.warning("%s cannot be written (%s): kept in memory", beside, error.strerror)
    return index


def fingerprint(path: Path) -> str:
    """sha256 over a file's length and its two ends: cheap, and another one for any other tar."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return hashlib.sha256(b"%d:" % size + head + file.read()).hexdigest()


def scan(path: Path) -> ShardIndex:
    """Build the index of a tar from its headers and its samples' facts.

    Raises:
        UserError: if the tar is empty, compressed or cut, or a sample in it is broken.
    """
    samples, rows = members(path), []
    with path.open("rb") as file:

        def part(span: tuple[int, int]) -> bytes:
            file.seek(span[0])
            return file.read(span[1])

        for key, parts in samples.items():
            picture = next((parts[e] for e in PICTURE_PARTS if e in parts), None)
            if picture is None:
                held = ", ".join(parts)
                raise UserError(
                    f"{path}: sample {key!r} has no picture, only {held}; pack it again"
                )
            document, text = parts.get("json", (0, 0)), parts.get("txt", (0, 0))
            facts = _parse(part(document), part(text), f"{path}: {key}")
            if facts.captions:
                rows.append((key, picture, document, text, len(facts.captions)))
    if not rows:
        lack = "sample with a caption (KEY.json or KEY.txt)" if samples else "sample"
        raise UserError(f"{path} holds no {lack}; leave it out or pack it again")
    keys, *columns = zip(*rows)
    return ShardIndex(
        np.array(fingerprint(path)),
        np.array(keys),
        *(np.array(column, np.int64) for column in columns),
        uncaptioned=np.array(len(samples) - len(rows)),
    )


def members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, length), in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    way_out = "fetch or pack it again (a compressed tar must be unpacked first)"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not (member.isfile() and stem and extension):
                    continue
                parts = samples.setdefault(folder + slash + stem, {})
                if extension.lower() in parts:
                    raise UserError(f"{path}: {member.name!r} occurs twice; keys must be unique")
                parts[extension.lower()] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{path} is empty, cut, or no plain tar ({error}); {way_out}") from None
    with path.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a cut or broken header for the end
            raise UserError(f"{path} is cut or broken after {end} bytes; {way_out}")
    return samples


def _parse(document: bytes, text: bytes, where: str) -> _Facts:
    """Facts of a sample from its `KEY.json` and `KEY.txt`, empty where there is none."""
    try:
        held = json.loads(document) if document else {}
        plain = text.decode()
        if not isinstance(held, dict):
            raise ValueError("KEY.json is no object")
        if "captions" in held:
            if held.get("schema") != SCHEMA:
                raise ValueError(f"schema {held.get('schema')!r}, this version reads {SCHEMA}")
            size = int(held["width"]), int(held["height"])
            if not all(0 < side < 2**20 for side in size):
                raise ValueError(f"a picture of {size[0]} x {size[1]} pixels")
            if not all(isinstance(c, str) and c.strip() for c in held["captions"]):
                raise ValueError("a caption that is no text")
            boxes, clutter = (_read_boxes(held.get(name)) for name in ("boxes", "clutter"))
            captions = tuple(held["captions"])
            return _Facts(captions, size, boxes, clutter, _read_tags(held.get("tags"), captions))
        caption = plain or str(held.get("caption") or "")
        return _Facts((caption,) if caption.strip() else ())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BrokenFacts(f"{where}: broken facts ({error}); pack this shard again") from None


def _read_tags(held: Any, captions: tuple[str, ...]) -> tuple[Tagged, ...] | None:
    if held is None:
        return None
    tags = tuple(tuple((str(word), str(tag)) for word, tag in caption) for caption in held)
    if len(tags) != len(captions):
        raise ValueError("tags of another number of captions")
    return tags


def _read_boxes(held: dict[str, Any] | None) -> Boxes:
    if not held:
        return Boxes.none()
    xywh = np.array(held["xywh"], np.float32).reshape(-1, 4)
    boxes = Boxes(xywh, tuple(held["categories"]), np.array(held["iscrowd"], bool))
    if not (np.isfinite(xywh).all() and (xywh[:, 2:] > 0).all()):
        raise ValueError("a box that is not finite, or empty")
    if not len(xywh) == len(boxes.categories) == len(boxes.crowd):
        raise ValueError("boxes, categories and iscrowd differ in number")
    return boxes


def refuse_twins(keys: Sequence[str], where: str) -> None:
    """Raises:
    UserError: if a key occurs twice.
    """
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twin = next(key for key in keys if key in seen or seen.add(key))
        raise UserError(
            f"{where}: picture {twin!r} occurs twice; name every shard and picture once"
        )


def _comma_list(pattern: str) -> list[str]:
    """The parts of a comma list; commas inside braces belong to the braces."""
    return [part for part in re.split(r",(?![^{]*\})", pattern) if part]
