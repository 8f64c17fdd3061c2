"""Compositional checks: a picture, a text that is true of it and one that is not.

Two forms of JSON are read. Our own is a list of objects with the keys `image` (a file below the
picture folder), `positive`, `negative`, `category` and, if wanted, `id`. SugarCrepe's (Hsieh et
al., NeurIPS 2023) is an object of objects with `filename`, `caption`, `negative_caption`; a file
is a category, called like the file (`swap_obj.json`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from superclip.data.batch import Source
from superclip.data.pictures import PictureFiles
from superclip.errors import UserError

OWN = ("image", "positive", "negative", "category")
SUGARCREPE = ("filename", "caption", "negative_caption")


class Item(NamedTuple):
    """One question.

    Attributes:
        row: the picture's row in its source.
        positive, negative: the text that is true of it, and the one that is not.
        category: what kind of mistake the negative makes.
        id: unique among the questions.
    """

    row: int
    positive: str
    negative: str
    category: str
    id: str


@dataclass(frozen=True, eq=False)
class Checks:
    """Questions and the pictures that they are about.

    Attributes:
        name: printed name of the set.
    """

    name: str
    source: Source
    items: tuple[Item, ...]

    @property
    def categories(self) -> list[str]:
        """In the order of their first questions."""
        return list(dict.fromkeys(item.category for item in self.items))

    @cached_property
    def sha256(self) -> str:
        """Over the questions and the pictures' digest."""
        keys = self.source.keys
        facts = [self.source.digest, [(keys[item.row], *item[1:]) for item in self.items]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def limited(self, limit: int) -> Checks:
        """The first `limit` questions of every category.

        Raises:
            UserError: if that is none.
        """
        if limit < 1:
            raise UserError(f"limit {limit} leaves no question; give at least 1 of each category")
        kept, seen = [], Counter()
        for item in self.items:
            seen[item.category] += 1
            if seen[item.category] <= limit:
                kept.append(item)
        return dataclasses.replace(self, items=tuple(kept))


def read_checks(paths: Sequence[Path], images: Path) -> Checks:
    """Questions from JSON files, or from all those of a folder, in either form.

    Args:
        images: the folder that holds the pictures.

    Raises:
        UserError: if a file is in neither form, an entry can't be a question (a text is missing or
            blank, both are equal, its id is taken), or a picture is absent.
    """
    if not images.is_dir():
        raise UserError(f"--images {images} is no folder; name the one that holds the pictures")
    entries: dict[str, _Entry] = {}
    for path in [file for given in paths for file in _files(given)]:
        for entry in _entries(path):
            if entry.id in entries:
                first = entries[entry.id].where
                raise UserError(
                    f"{entry.where} has the id {entry.id!r} of {first}; give every question its own"
                )
            entries[entry.id] = entry
    names: dict[str, _Entry] = {}
    for entry in entries.values():
        names.setdefault(entry.image, entry)
    absent = [entry for name, entry in names.items() if not (images / name).is_file()]
    if absent:
        raise UserError(
            f"{absent[0].where}: {absent[0].image} is not in --images {images} ({len(absent)} of "
            f"{len(names)} pictures are missing); fetch them, or take their entries out"
        )
    rows = {name: row for row, name in enumerate(names)}
    items = [
        Item(rows[e.image], e.positive, e.negative, e.category, e.id) for e in entries.values()
    ]
    name = "+".join(path.stem for path in paths)
    return Checks(name, PictureFiles(images, list(names)), tuple(items))


class _Entry(NamedTuple):
    image: str
    positive: str
    negative: str
    category: str
    id: str
    where: str


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.json"))
    if not found:
        raise UserError(f"{path} holds no .json file; name the checks' files, or their folder")
    return found


def _entries(path: Path) -> Iterator[_Entry]:
    document = _load(path)
    own = isinstance(document, list)
    keys = OWN if own else SUGARCREPE
    for key, entry in enumerate(document) if own else document.items():
        where = f"{path}: entry {key}"
        if not isinstance(entry, dict):
            raise UserError(
                f"{where} is no object; give a list of objects with {', '.join(OWN)}, or "
                f"SugarCrepe's object of objects with {', '.join(SUGARCREPE)}"
            )
        lacking = [name for name in keys if name not in entry]
        if lacking:
            raise UserError(f"{where} lacks {', '.join(lacking)}; it needs {', '.join(keys)}")
        for name in keys:
            if not isinstance(entry[name], str) or not entry[name].strip():
                raise UserError(f"{where}: {name} is {entry[name]!r:.40}; it must be a text")
            if not entry[name].isprintable() and any(
                "\ud800" <= c <= "\udfff" for c in entry[name]
            ):
                raise UserError(f"{where}: {name} is {entry[name]!r:.40}, no text in any encoding")
        known = entry.get("id") if own else None
        if not isinstance(known, int | str | None):
            raise UserError(f"{where}: id is {known!r:.40}; it must be a text or a number")
        image, positive, negative = (entry[name] for name in keys[:3])
        if " ".join(positive.split()) == " ".join(negative.split()):
            raise UserError(
                f"{where}: both texts are {positive!r}, so there is nothing to choose; mend the "
                "negative, or take the entry out"
            )
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise UserError(f"{where}: {image!r} leads out of --images; name it from there")
        category = entry["category"] if own else path.stem
        name = f"{path.stem}/{key}" if known is None else str(known)
        yield _Entry(image, positive, negative, category, name, where)


def _load(path: Path) -> list[Any] | dict[str, Any]:
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_unrepeated)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file of checks or a folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); mend it, or fetch it again") from None
    if not isinstance(document, list | dict) or not document:
        raise UserError(f"{path} holds no checks: it is neither a list nor an object with entries")
    return document


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json` keeps the last of equal keys, and would lose a question without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found
