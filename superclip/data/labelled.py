"""Pictures with classes: class folders, tar shards with `.cls`, COCO's instances, scenes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from superclip.data.batch import Record, Source
from superclip.data.coco import LAYOUTS, UNSPLIT, by_id, load_annotations
from superclip.data.geometry import BadPicture, picture_size
from superclip.data.patience import Patience
from superclip.data.pictures import PictureFiles
from superclip.data.shards import PICTURE_PARTS, expand, fingerprint, members, refuse_twins
from superclip.data.sources import SCENES_HELD_OUT, open_source
from superclip.errors import UserError

PICTURES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff"])
"""Endings of picture files in class folders."""
LITTER = frozenset(("Thumbs.db", "desktop.ini"))
"""What desktops leave in folders, beside hidden files."""
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
SHARD_COUNT, KIND = "nshards.txt", "dataset_type.txt"
"""CLIP_benchmark's files beside its shards."""


@dataclass(frozen=True, eq=False)
class LabelledSource:
    """Pictures of a source and the classes that they belong to.

    Attributes:
        name: printed name of the data set and its split.
        source: the pictures.
        labels: by the source's rows: a class, -1 for a picture that is no part of the task; or,
            where a picture may show several classes, whether each of them is there.
        classes: keys of the classes (folder names, numbers, category names).
        names, templates: what the data itself says of its classes' names and of prompts, if it
            does; the slot of a template is `{}` or `{c}`.
        stamp: of the files' times of change; "" for what is generated.
    """

    name: str
    source: Source
    labels: Int[np.ndarray, " n"] | Bool[np.ndarray, "n c"]
    classes: list[str]
    names: list[str] | None = None
    templates: list[str] | None = None
    stamp: str = ""

    @property
    def several(self) -> bool:
        """Whether a picture may show several classes."""
        return self.labels.ndim == 2

    @cached_property
    def rows(self) -> list[int]:
        """The source's rows that are part of the task."""
        whole = np.ones(len(self.labels), bool) if self.several else self.labels >= 0
        return np.flatnonzero(whole).tolist()

    @cached_property
    def sizes(self) -> Int[np.ndarray, " c"]:
        """Pictures of each class; 0 where a class is empty."""
        if self.several:
            return self.labels.sum(0)
        return np.bincount(self.labels[self.rows], minlength=len(self.classes))

    @cached_property
    def digest(self) -> str:
        """sha256 over the source, the classes and the labels."""
        facts = json.dumps([self.source.digest, self.classes, self.labels.shape])
        labels = self.labels.astype("<i8").tobytes()
        return hashlib.sha256(facts.encode() + labels).hexdigest()


def open_labelled(
    spec: str, num: int | None = None, seed: int = 0, held_out: bool = True
) -> LabelledSource:
    """Open labelled pictures.

    Args:
        spec: a folder of class folders (ImageNet's val); a folder in CLIP_benchmark's layout
            (`test/0.tar`, `test/nshards.txt`, `classnames.txt`), or the tar shards themselves as a
            pattern with braces; `coco:FOLDER[:SPLIT]`, several labels a picture; `scenes[:SPLIT]`,
            the scenes of one object.
        num, seed: of generated scenes, those with two objects among them.
        held_out: which split a name without one means.

    Raises:
        UserError: if there is no such data, it has fewer than two classes or no pictures, or
            something lies in it that does not belong there.
    """
    kind, _, rest = spec.partition(":")
    if "::" in spec:
        raise UserError(f"{spec!r} names several data sets; labelled ones are judged one by one")
    if kind == "scenes":
        found = _scenes(spec, num, seed, held_out)
    elif kind == "coco":
        found = _coco(rest, held_out)
    elif Path(spec).is_dir():
        split = Path(spec) / ("test" if held_out else "train")
        shards = next((p for p in (Path(spec), split) if (p / SHARD_COUNT).is_file()), None)
        found = _folders(Path(spec)) if shards is None else _tars(_counted_shards(shards))
    elif ".tar" in spec or re.match(r"pipe:|\w+://", spec):
        found = _tars(expand(spec))
    else:
        raise UserError(
            f"{spec!r} is no labelled data: no folder of class folders, tar pattern, coco:FOLDER "
            "or scenes"
        )
    if len(found.classes) < 2 or not found.sizes.any():
        had = f"{len(found.classes)} class(es) and {int(found.sizes.sum())} labelled pictures"
        raise UserError(f"{spec} has {had}; at least two classes and a picture are needed")
    return found


def _folders(root: Path) -> LabelledSource:
    """One class a folder, sorted by name; a folder without pictures is an empty class."""
    folders = _listed(root)
    if beside := [e.name for e in folders if not e.is_dir()]:
        what = "pictures, but no" if _is_picture(beside[0]) and len(beside) == len(folders) else ""
        raise UserError(
            f"{root} holds {what or f'{beside[0]} beside its'} class folders; name a folder that "
            "holds one folder a class and nothing else"
        )
    names, labels = [], []
    for label, folder in enumerate(folders):
        for entry in _listed(Path(folder)):
            if entry.is_dir():
                raise UserError(
                    f"{entry.path} is a folder in a class folder; name the folder that holds the "
                    f"class folders themselves (such as {folder.path}), or move it away"
                )
            if not _is_picture(entry.name):
                raise UserError(f"{entry.path} is no picture; move it out of the class folders")
            names.append(f"{folder.name}/{entry.name}")
            labels.append(label)
    stamp = _stamp([root / name for name in names])
    classes = [folder.name for folder in folders]
    source, name = PictureFiles(root, names), _last_two(root)
    return LabelledSource(name, source, np.array(labels, int), classes, stamp=stamp)


def _last_two(folder: Path) -> str:
    """`imagenette/val`: the split alone would name nothing, the whole path a machine."""
    return "/".join(folder.absolute().parts[-2:])


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted, without hidden things and litter."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in LITTER]
    return sorted(kept, key=lambda entry: entry.name)


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in PICTURES


def _stamp(paths: Sequence[Path]) -> str:
    times = [path.stat().st_mtime_ns for path in paths]
    return hashlib.sha256(json.dumps(times).encode()).hexdigest()


class _Span(NamedTuple):
    shard: int
    offset: int
    length: int


class TarPictures:
    """Pictures of tar shards, with or without captions; rows run over the shards in order.

    Raises:
        UserError: if a key occurs twice.
    """

    def __init__(self, paths: Sequence[Path], keys: list[str], spans: Sequence[_Span]):
        refuse_twins(keys, str(paths[0].parent))
        self.keys, self._paths, self._spans = keys, list(paths), list(spans)
        self.name = paths[0].parent.absolute().name
        self.num_images, self.num_captions = len(keys), 0
        self.shard_sizes = tuple(np.bincount([span.shard for span in spans]).tolist())
        self._seen = [_size_and_time(path.stat()) for path in paths]
        self._patience = Patience()
        facts = json.dumps([[fingerprint(path) for path in paths], keys, spans])
        self.digest = hashlib.sha256(facts.encode()).hexdigest()

    def read(self, row: int) -> Record:
        """One picture.

        Raises:
            BadPicture: if it has no readable header.
            OSError: if the shard can't be read.
            UserError: if the shard has changed since it was opened.
        """
        shard = self._spans[row].shard
        path = self._paths[shard]
        picture, now = self._patience(path, partial(_read_span, path, self._spans[row]))
        if now != self._seen[shard]:
            raise UserError(f"{path} has changed since it was opened; start again")
        try:
            width, height = picture_size(picture)
        except BadPicture as error:
            raise BadPicture(f"{path}: {self.keys[row]}: {error}") from error.__cause__
        return Record(row, self.keys[row], width, height, picture, (), ())

    def where(self, row: int) -> str:
        return str(self._paths[self._spans[row].shard])


def _size_and_time(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_size, facts.st_mtime_ns


def _read_span(path: Path, span: _Span) -> tuple[bytes, tuple[int, int]]:
    with path.open("rb") as file:
        file.seek(span.offset)
        return file.read(span.length), _size_and_time(os.fstat(file.fileno()))


def _counted_shards(folder: Path) -> list[Path]:
    """0.tar, 1.tar, ... of a folder, as many as its nshards.txt says."""
    path = folder / SHARD_COUNT
    try:
        count = int(path.read_text())
    except ValueError:
        raise UserError(f"{path} is no number of shards; write how many N.tar there are") from None
    paths = [folder / f"{k}.tar" for k in range(count)]
    absent = [shard.name for shard in paths if not shard.is_file()]
    if absent or not paths:
        raise UserError(
            f"{path} says {count} shards, but {', '.join(absent[:1]) or 'one'} is absent"
        )
    return paths


def _tars(paths: Sequence[Path]) -> LabelledSource:
    """Samples with a picture and `.cls` (a class) or, in a set of several labels, `.npy` (0 or 1 a
    class); names and templates from the files of CLIP_benchmark's layout, where they are there."""
    beside = [paths[0].parent, paths[0].parent.absolute().parent]
    kind = (_beside(beside, KIND) or ["classification"])[0].strip().lower()
    if kind == "retrieval":
        raise UserError(f"{paths[0].parent} is retrieval data, without classes; use --val-data")
    part, parse = ("npy", _many) if kind == "multilabel" else ("cls", _one)
    keys, spans, labels = [], [], []
    for shard, path in enumerate(paths):
        with path.open("rb") as file:
            for key, parts in members(path).items():
                picture = next((parts[e] for e in PICTURE_PARTS if e in parts), None)
                if picture is None or part not in parts:
                    lack = "picture" if picture is None else f"label ({key}.{part})"
                    raise UserError(f"{path}: sample {key!r} has no {lack}; pack it again")
                file.seek(parts[part][0])
                labels.append(_parsed(parse, file.read(parts[part][1]), f"{path}: {key}.{part}"))
                keys.append(key)
                spans.append(_Span(shard, *picture))
    if not keys:
        raise UserError(f"{paths[0]} holds no sample with a picture and a label; pack it again")
    names = _beside(beside, CLASS_NAMES)
    array = _stacked(labels, names, str(paths[0].parent))
    count = array.shape[1] if array.ndim == 2 else int(array.max()) + 1
    classes = names or [str(label) for label in range(count)]
    source, templates = TarPictures(paths, keys, spans), _beside(beside, TEMPLATES)
    name = _last_two(paths[0].parent)
    return LabelledSource(name, source, array, classes, names, templates, _stamp(paths))


def _beside(folders: Sequence[Path], name: str) -> list[str] | None:
    """The lines of a file in the first of the folders that has it."""
    path = next((f / name for f in folders if (f / name).is_file()), None)
    return None if path is None else text_lines(path)


def text_lines(path: Path, flag: str = "") -> list[str]:
    """The lines of a text file, stripped; `flag` named it.

    Raises:
        UserError: if it is absent, empty or no text.
    """
    where = f"{flag} {path}".lstrip()
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is no text file; write one entry a line") from None
    if not text:
        raise UserError(f"{where} is empty; write one entry a line")
    return [line.strip() for line in text.splitlines()]


def _one(data: bytes) -> int:
    label = int(data)
    if label < 0:
        raise ValueError(f"{label} is negative")
    return label


def _many(data: bytes) -> np.ndarray:
    label = np.load(io.BytesIO(data), allow_pickle=False)
    if label.ndim != 1 or not np.isin(label, (0, 1)).all():
        raise ValueError("not a row of zeros and ones")
    return label.astype(bool)


def _parsed(parse: Callable[[bytes], int | np.ndarray], data: bytes, where: str):
    try:
        return parse(data)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{where} is no label ({error}); pack it again") from None


def _stacked(labels: list, names: list[str] | None, where: str) -> np.ndarray:
    """Labels as one array, of as many classes as there are names."""
    widths = {len(label) for label in labels if isinstance(label, np.ndarray)}
    most = max(widths) if widths else max(labels) + 1
    if len(widths) > 1 or (names and (most != len(names) if widths else most > len(names))):
        named = f"{CLASS_NAMES} names {len(names)}" if names else f"others to {min(widths)}"
        raise UserError(f"{where}: labels refer to {most} classes, {named}; pack it again")
    return np.array(labels, bool if widths else int)


def _coco(rest: str, held_out: bool) -> LabelledSource:
    """All pictures and categories of an instances file, in its order.

    A category is there where any of its boxes is, crowds included, as is usual for COCO's 80
    labels; pictures without any box are kept, they count against every category.
    """
    root, split = Path(rest.partition(":")[0]), rest.partition(":")[2]
    named = split or ("val" if held_out else "train")
    for _, instances, pictures in LAYOUTS:
        path, folder = (root / part.format(split=named) for part in (instances, pictures))
        if path.is_file() and ("{split}" in instances or split in ("", UNSPLIT)):
            break
    else:
        tried = ", ".join(instances.format(split=named) for _, instances, _ in LAYOUTS)
        raise UserError(f"{root} has no instances of split {named!r}: none of {tried} is there")
    document, _ = load_annotations(path, "instances", ("id", "image_id", "category_id"))
    images = by_id(document["images"], path)
    place = {key: row for row, key in enumerate(images)}
    column = {category["id"]: c for c, category in enumerate(document["categories"])}
    right = np.zeros((len(images), len(column)), bool)
    for entry in document["annotations"]:
        image, category = entry["image_id"], entry["category_id"]
        if image not in place or category not in column:
            lost = f"picture {image}" if image not in place else f"category {category}"
            raise UserError(f"{path}: annotation {entry['id']}: {lost} is not listed; mend it")
        right[place[image], column[category]] = True
    files = [str(image["file_name"]) for image in images.values()]
    refuse_twins(files, str(path))
    if absent := [name for name in files if not (folder / name).is_file()]:
        count = f"{len(absent)} of {len(files)} pictures"
        raise UserError(f"{count} are not in {folder} (first: {absent[0]}); fetch them")
    names = [str(category["name"]) for category in document["categories"]]
    stamp, name = _stamp([folder / name for name in files]), f"{root.absolute().name}:{named}"
    return LabelledSource(name, PictureFiles(folder, files), right, names, names, stamp=stamp)


def _scenes(spec: str, num: int | None, seed: int, held_out: bool) -> LabelledSource:
    """Scenes of one object; prompts name it in every colour."""
    from superclip.data.scenes import CATEGORIES, Scenes, category_templates

    source = open_source(spec, num or SCENES_HELD_OUT, seed, held_out)
    assert isinstance(source, Scenes)
    names = list(CATEGORIES)
    seen = [source.scene(row).objects for row in range(source.num_images)]
    labels = [names.index(things[0].category) if len(things) == 1 else -1 for things in seen]
    name = f"scenes:{source.split}"
    return LabelledSource(name, source, np.array(labels), names, names, category_templates())
