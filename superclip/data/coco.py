"""A folder in COCO's layout as a `Source`: captions and instances joined by image id.

Read with plain `json` and checked entry by entry, because a mistake here must name the file and the
annotation; pycocotools prints and fails deep inside instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from superclip.data.batch import Boxes, Record
from superclip.data.geometry import BadPicture
from superclip.data.patience import Patience
from superclip.errors import UserError, nearest

OnBad = Literal["error", "drop"]

LAYOUTS = (
    (
        "annotations/captions_{split}2017.json",
        "annotations/instances_{split}2017.json",
        "{split}2017",
    ),
    ("annotations/captions_{split}.json", "annotations/instances_{split}.json", "{split}"),
    ("captions.json", "instances.json", "images"),
)
"""Captions, instances, pictures: COCO 2017's own layout, that without the year, an unsplit set."""

UNSPLIT = "all"
"""The one split of a folder that has none."""

HELD_OUT = ("val", "validation", "dev", "test")
"""Names of held-out splits, best first."""

ROUNDING = 1.0
"""Pixels by which a box may leave its picture and be clipped; published boxes are rounded."""

KNOWN_EMPTY = (200365, 550395)
"""Pictures of COCO train2017 with one published box of height 0 each (cocoapi issue 355)."""

_IMAGE = ("id", "file_name", "width", "height")
_CAPTION = ("id", "image_id", "caption")
_INSTANCE = ("id", "image_id", "category_id", "bbox")
_WAY_OUT = "mend the file, or leave such entries out (pack: --on-bad drop)"


def hash_split(key: str, salt: str, shares: Mapping[str, float]) -> str:
    """The split of one picture: a pure function of its public id.

    The first 8 bytes of sha256("salt:key"), as a fraction of 2^64, fall into one of the shares laid
    end to end in the order given; adding pictures never moves another one.

    >>> hash_split("285", "a", {"discovery": 0.5, "validation": 0.5})
    'validation'

    Raises:
        UserError: if the shares are not positive or do not sum to 1.
    """
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
        raise UserError(f"shares of splits must be positive and sum to 1, not {dict(shares)}")
    number = int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "big")
    place, upto = number / 2**64, 0.0
    for name, share in shares.items():
        upto += share
        if place < upto:
            return name
    return list(shares)[-1]  # the sum fell short of 1 by rounding


def find_splits(root: Path) -> list[str]:
    """The splits of a folder, by its captions files; `["all"]` for an unsplit set.

    Raises:
        UserError: if the folder has none of the known layouts.
    """
    for captions, _, _ in LAYOUTS:
        head, _, tail = captions.partition("{split}")
        found = sorted(p.relative_to(root).as_posix() for p in root.glob(f"{head}*{tail}"))
        if found and tail:
            return [name[len(head) : -len(tail)] for name in found]
        if (root / captions).is_file():
            return [UNSPLIT]
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name a COCO folder, as coco:FOLDER[:SPLIT]")
    tried = ", ".join(captions for captions, _, _ in LAYOUTS)
    raise UserError(
        f"{root} is no COCO folder: none of {tried} is there; write coco:FOLDER or "
        "coco:FOLDER:SPLIT"
    )


def held_out_split(root: Path, split: str) -> str:
    """The split to judge on when training on `split`.

    Raises:
        UserError: if the folder has no other one that is known to be held out.
    """
    own = split, split.removesuffix("2017")  # two names of one file
    others = [name for name in HELD_OUT if name not in own and name in find_splits(root)]
    if not others:
        raise UserError(f"{root} has no held-out split beside {split!r}; name one with --val-data")
    return others[0]


class CocoFolder:
    """One split of a folder in COCO's layout; rows follow the captions file.

    Args:
        root: the folder.
        split: one of `find_splits(root)`.
        limit: keep the first pictures only.
        on_bad: what to do about a caption or a box without picture, a picture file that is missing,
            and a box that is NaN, negative, empty, of an unknown category or outside its picture:
            raise, naming the first, or drop and count.

    Attributes:
        attrition: how many entries were left out or mended, by cause.
        caption_ids: the published annotation id of every caption row.

    Raises:
        UserError: if the folder or a file is not COCO's, or nothing is left.
    """

    def __init__(
        self, root: Path | str, split: str, limit: int | None = None, on_bad: OnBad = "error"
    ):
        self.root, self.on_bad = Path(root), on_bad
        self._patience = Patience()
        self.name = f"{self.root.name}:{split}"
        self.attrition: Counter[str] = Counter()
        captions_file, instances_file, self._pictures = _files(self.root, split)
        captions, captions_hash = load_annotations(captions_file, "captions", _CAPTION)
        instances, instances_hash = load_annotations(instances_file, "instances", _INSTANCE)

        images = by_id(captions["images"], captions_file)
        known = images | by_id(instances["images"], instances_file)
        texts = self._captions(captions["annotations"], images, captions_file)
        boxes = self._boxes(instances, known, instances_file)
        rows = self._present([image for image in images.values() if image["id"] in texts])
        self.attrition["pictures without caption"] += len(images) - len(texts)
        if limit is not None and limit > len(rows):
            raise UserError(f"{self.name} holds {len(rows)} pictures, not the {limit} asked for")
        self._images = rows[:limit]
        if not self._images:
            raise UserError(f"{captions_file}: no picture with a caption; is this the right split?")
        self.attrition = Counter({cause: n for cause, n in self.attrition.items() if n})

        self._texts = [tuple(a["caption"] for a in texts[image["id"]]) for image in self._images]
        self._boxes_of = [boxes.get(image["id"], Boxes.none()) for image in self._images]
        self._first_caption = np.cumsum([0, *map(len, self._texts)])
        self.caption_ids = [a["id"] for image in self._images for a in texts[image["id"]]]
        self.num_images, self.num_captions = len(self._images), len(self.caption_ids)
        self.shard_sizes = (self.num_images,)
        facts = json.dumps([captions_hash, instances_hash, on_bad, self.keys])
        self.digest = hashlib.sha256(facts.encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        return [str(image["id"]) for image in self._images]

    def read(self, row: int) -> Record:
        """One picture with its annotations.

        Raises:
            BadPicture: if its file cannot be read.
        """
        image, first = self._images[row], int(self._first_caption[row])
        path = self._path(row)
        try:
            picture = self._patience(path, path.read_bytes)
        except OSError as error:
            raise BadPicture(f"{path}: {error.strerror}") from error
        texts = self._texts[row]
        return Record(
            row=row,
            key=str(image["id"]),
            width=image["width"],
            height=image["height"],
            picture=picture,
            captions=texts,
            caption_rows=tuple(range(first, first + len(texts))),
            boxes=self._boxes_of[row],
        )

    def where(self, row: int) -> str:
        return str(self._path(row))

    def _path(self, row: int) -> Path:
        return self._pictures / self._images[row]["file_name"]

    def _captions(
        self, annotations: Sequence[dict[str, Any]], images: Mapping[Any, Any], path: Path
    ) -> dict[Any, list[dict[str, Any]]]:
        """Captions by image id; blank ones are counted and left out."""
        found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for entry in annotations:
            if entry["image_id"] not in images:
                self._bad(path, entry, "captions without picture", "its picture is not listed")
            elif not isinstance(entry["caption"], str):
                self._bad(path, entry, "captions that are no text", "its caption is no text")
            elif not entry["caption"].strip():
                self.attrition["blank captions"] += 1
            else:
                found[entry["image_id"]].append(entry)
        return found

    def _boxes(
        self, instances: Mapping[str, Any], images: Mapping[Any, Any], path: Path
    ) -> dict[Any, Boxes]:
        """Sound boxes by image id, in the order of the file."""
        names = {c["id"]: str(c["name"]) for c in instances["categories"]}
        grouped: dict[Any, list[tuple[list[float], str, bool]]] = defaultdict(list)
        for entry in instances["annotations"]:
            image = images.get(entry["image_id"], {})
            fault = _fault(entry["bbox"], image) if image else "of no listed picture"
            if entry["category_id"] not in names:
                fault = "of an unknown category"
            if fault is None:
                xywh, mended = _clip(entry["bbox"], image)
                self.attrition["boxes clipped to their picture"] += mended
                crowd = bool(entry.get("iscrowd", 0))
                grouped[entry["image_id"]].append((xywh, names[entry["category_id"]], crowd))
            elif fault == "of zero area" and entry["image_id"] in KNOWN_EMPTY:
                self.attrition["empty boxes known in COCO 2017"] += 1
            else:
                self._bad(path, entry, f"boxes {fault}", f"box {entry['bbox']} is {fault}")
        return {
            key: Boxes(np.array(xywh, np.float32), categories, np.array(crowd))
            for key, group in grouped.items()
            for xywh, categories, crowd in [zip(*group)]
        }

    def _present(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The images whose file is there."""
        listed = set(os.listdir(self._pictures)) if self._pictures.is_dir() else set()
        there = [
            image
            for image in images
            if image["file_name"] in listed or (self._pictures / image["file_name"]).is_file()
        ]
        if missing := len(images) - len(there):
            kept = {image["id"] for image in there}
            first = next(image["file_name"] for image in images if image["id"] not in kept)
            if self.on_bad == "error":
                raise UserError(
                    f"{missing} of {len(images)} captioned pictures are not in {self._pictures} "
                    f"(first: {first}); fetch them, or leave them out (pack: --on-bad drop)"
                )
            self.attrition["pictures whose file is missing"] += missing
        return there

    def _bad(self, path: Path, entry: Mapping[str, Any], cause: str, what: str) -> None:
        if self.on_bad == "error":
            where = f"annotation {entry['id']} of picture {entry['image_id']}"
            raise UserError(f"{path}: {where}: {what}; {_WAY_OUT}")
        self.attrition[cause] += 1


def _files(root: Path, split: str) -> tuple[Path, Path, Path]:
    """Captions file, instances file and picture folder of a split."""
    splits = find_splits(root)
    for layout in LAYOUTS:
        captions, instances, pictures = (root / part.format(split=split) for part in layout)
        if captions.is_file() and (split == UNSPLIT or "{split}" in layout[0]):
            if not instances.is_file():
                raise UserError(f"{root}: {instances.relative_to(root)} is missing")
            return captions, instances, pictures
    raise UserError(f"{root} has no split {split!r}; {nearest(split, splits)}")


def load_annotations(path: Path, kind: str, fields: Iterable[str]) -> tuple[dict[str, Any], str]:
    """A checked COCO file without its outlines, and the sha256 of its bytes."""
    try:
        text = path.read_bytes()
        document = json.loads(text, object_hook=_without_outline)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    needed = {"images": _IMAGE, "annotations": tuple(fields)}
    if kind == "instances":
        needed["categories"] = ("id", "name")
    held = document if isinstance(document, dict) else {}
    missing = [name for name in needed if not isinstance(held.get(name), list)]
    if missing:
        raise UserError(f"{path} is not a COCO {kind} file: lacks the lists {', '.join(missing)}")
    for name, names in needed.items():
        for place, entry in enumerate(held[name]):
            lacking = [f for f in names if f not in entry] if isinstance(entry, dict) else names
            if lacking:
                _not_coco(path, kind, name, place, f"lacks {', '.join(lacking)}")
            for field in {"id", "image_id", "category_id", "file_name", "name"} & set(entry):
                if not isinstance(entry[field], int | str):
                    what = f"has {entry[field]!r:.40} for {field}, not a number or a text"
                    _not_coco(path, kind, name, place, what)
    ids = [category["id"] for category in held["categories"]] if "categories" in needed else []
    if len(set(ids)) < len(ids):
        place = next(k for k, key in enumerate(ids) if key in ids[:k])
        _not_coco(path, kind, "categories", place, f"repeats the id {ids[place]}")
    return held, hashlib.sha256(text).hexdigest()


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are nine tenths of COCO's instances and unused here: freed while parsing."""
    entry.pop("segmentation", None)
    return entry


def _not_coco(path: Path, kind: str, name: str, place: int, what: str) -> NoReturn:
    raise UserError(f"{path} is not a COCO {kind} file: entry {place} of {name!r} {what}")


def by_id(images: Sequence[dict[str, Any]], path: Path) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for place, image in enumerate(images):
        sides = image["width"], image["height"]
        if not all(isinstance(side, int) and side > 0 for side in sides):
            _not_coco(path, "annotation", "images", place, f"has size {sides}")
        if image["id"] in found:
            _not_coco(path, "annotation", "images", place, f"repeats the id {image['id']}")
        found[image["id"]] = image
    return found


def _fault(bbox: Any, image: Mapping[str, Any]) -> str | None:
    """What is wrong with a box, or None."""
    if not (isinstance(bbox, list) and len(bbox) == 4):
        return "not four numbers"
    if not all(isinstance(v, int | float) and abs(v) < 2**31 for v in bbox):
        return "not finite"
    x, y, w, h = bbox
    if w < 0 or h < 0:
        return "of negative size"
    if max(-x, -y, x + w - image["width"], y + h - image["height"]) > ROUNDING:
        return "outside its picture"
    (_, _, w, h), _ = _clip(bbox, image)
    return "of zero area" if w <= 0 or h <= 0 else None


def _clip(bbox: Sequence[float], image: Mapping[str, Any]) -> tuple[list[float], bool]:
    """The box inside its picture, and whether more than float noise was cut off."""
    x, y, w, h = map(float, bbox)
    x1, y1 = min(x + w, image["width"]), min(y + h, image["height"])
    x0, y0 = max(x, 0.0), max(y, 0.0)
    over = max(x0 - x, y0 - y, x + w - x1, y + h - y1)
    return ([x0, y0, x1 - x0, y1 - y0], True) if over > 0.01 else ([x, y, w, h], False)
