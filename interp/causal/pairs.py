"""Pairs of pictures that differ in one object, for `interp.causal.patching`.

From boxes, the object is filled with its surroundings or replaced by another picture's. From the
generator of scenes, one attribute of one object is drawn otherwise and nothing else changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.random import Generator, Philox
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import spsolve
from sklearn.feature_extraction.image import grid_to_graph

from interp.grounding.coverage import MIN_KEPT
from superclip.data.batch import Record
from superclip.data.geometry import BadPicture, Geometry, picture_size, plan, render
from superclip.data.loader import Preprocess
from superclip.data.scenes import CATEGORIES, SIZE, VISIBLE, Scenes
from superclip.errors import UserError, nearest

LARGEST = 0.5
"""An object that covers more of the picture leaves too little around it to fill it from."""

NEEDED = ("clean", "corrupted", "text_clean")
ALLOWED = (*NEEDED, "text_corrupted")

Picture = UInt8[np.ndarray, "3 height width"]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom, whole pixels of the tower's input."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures, and what is true of either; no text where something is merely gone."""

    clean: Picture
    corrupted: Picture
    texts_clean: tuple[str, ...]
    texts_corrupted: tuple[str, ...] = ()

    def patches(self, patch_size: tuple[int, int]) -> Bool[np.ndarray, " patch"]:
        """The object's patches: those in which any pixel differs."""
        height, width = patch_size
        differs = (self.clean != self.corrupted).any(axis=0)
        rows, columns = differs.shape[0] // height, differs.shape[1] // width
        whole = differs[: rows * height, : columns * width]  # the tower leaves the rest out
        return whole.reshape(rows, height, columns, width).any(axis=(1, 3)).ravel()


def target(record: Record, geometry: Geometry) -> tuple[Box, str] | None:
    """Box and name of the largest object that is alone of its category, so that the category goes
    with it; None if there is none, the crop took most of it, or it fills over half the picture."""
    boxes, names = record.boxes, record.boxes.categories
    xyxy, kept = geometry.map_boxes(boxes.xywh)
    area, (left, top, right, bottom) = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1), geometry.valid
    alone = np.array([names.count(name) == 1 for name in names], bool)
    small = area <= LARGEST * (right - left) * (bottom - top)
    fit = np.flatnonzero(alone & small & ~boxes.crowd & (kept >= MIN_KEPT))
    if len(fit) == 0:
        return None
    k = fit[area[fit].argmax()]
    x0, y0, x1, y1 = (*np.floor(xyxy[k, :2] + 1e-3), *np.ceil(xyxy[k, 2:] - 1e-3))
    return (int(x0), int(y0), int(x1), int(y1)), names[k]


def filled(picture: Picture, box: Box, within: Box) -> Picture:
    """The box filled with its surroundings: every pixel becomes the mean of its neighbours (that
    is Laplace's equation), so the pixels around the box flow in and their detail fades; of those
    inside `within`."""
    x0, y0, x1, y1 = box
    top, left = max(y0 - 1, within[1]), max(x0 - 1, within[0])
    part = picture[:, top : min(y1 + 1, within[3]), left : min(x1 + 1, within[2])]
    unknown = np.zeros(part.shape[1:], bool)
    unknown[y0 - top : y1 - top, x0 - left : x1 - left] = True
    rows, known = unknown.ravel(), part[:, ~unknown].T.astype(float)
    _, height, width = part.shape
    equations = csr_array(laplacian(grid_to_graph(height, width)), dtype=float)[rows]
    colours = np.asarray(spsolve(equations[:, rows].tocsc(), -equations[:, ~rows] @ known))
    return _pasted(picture, box, colours.round().T.reshape(3, y1 - y0, x1 - x0))


def swapped(picture: Picture, box: Box, donor: Picture, donor_box: Box) -> Picture:
    """What the donor shows in its box, resized (bicubic) into the picture's box."""
    part = Image.fromarray(donor.transpose(1, 2, 0)).crop(donor_box)
    part = part.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    return _pasted(picture, box, np.asarray(part).transpose(2, 0, 1))


def box_pairs(
    records: Sequence[Record], pictures: Sequence[Picture], preprocess: Preprocess, swap: bool
) -> list[Pair]:
    """A pair of every picture with a `target`, whose text names its category alone, as captions
    tell of more. Filled, nothing takes its place; swapped for the object nearest in width and
    height whose category the picture lacks, that one is named."""
    geometries = [preprocess.geometry(record) for record in records]
    found = [target(record, g) for record, g in zip(records, geometries, strict=True)]
    objects = [(k, *own) for k, own in enumerate(found) if own is not None]
    sizes = np.log([(x1 - x0, y1 - y0) for _, (x0, y0, x1, y1), _ in objects])
    pairs, uses = [], np.zeros(len(objects))
    for (k, box, name), size in zip(objects, sizes, strict=True):
        if not swap:
            corrupted = filled(pictures[k], box, geometries[k].valid)
            pairs.append(Pair(pictures[k], corrupted, (_named(name),)))
            continue
        lacking = [other not in records[k].boxes.categories for _, _, other in objects]
        far = np.where(lacking, np.abs(sizes - size).sum(axis=1), np.inf)
        donor = np.lexsort((uses, far))[0]  # of equally near ones, that which was used least
        if np.isfinite(far[donor]):
            uses[donor] += 1
            row, donor_box, other = objects[donor]
            corrupted = swapped(pictures[k], box, pictures[row], donor_box)
            pairs.append(Pair(pictures[k], corrupted, (_named(name),), (_named(other),)))
    return pairs


def scene_pair(scenes: Scenes, row: int, what: str, preprocess: Preprocess) -> Pair:
    """A scene, and the same with another "colour" or "category" of its first object, one that none
    of its objects has, by a counted draw. The texts name all objects in full."""
    scene = scenes.scene(row)
    held = {getattr(thing, what) for thing in scene.objects}
    options = VISIBLE[scene.background] if what == "colour" else tuple(CATEGORIES)
    options = [option for option in options if option not in held]
    rng = Generator(Philox(key=[scenes.seed, 0x9A12], counter=[0, 0, 0, row]))
    other = scenes.scene(row, **{what: options[int(rng.random() * len(options))]})
    outside = np.ones(scene.image.shape[:2], bool)
    for x, y, width, height in (scene.objects[0].xywh, other.objects[0].xywh):
        outside[y : y + height, x : x + width] = False
    assert np.array_equal(scene.image[outside], other.image[outside]), "more than it has changed"
    geometry, named = plan(SIZE, SIZE, preprocess.size, preprocess.mode), range(len(scene.objects))
    texts = (
        replace(s, prefix="", mentions_background=False, named=tuple(named)).caption
        for s in (scene, other)
    )
    clean, corrupted = (render(s.image, geometry) for s in (scene, other))
    return Pair(clean, corrupted, *((text,) for text in texts))


def given_pairs(path: Path, preprocess: Preprocess) -> list[Pair]:
    """Pairs of a JSON list of {clean, corrupted, text_clean, text_corrupted}; pictures are named
    relative to it, and `text_corrupted` may be missing or null.

    Raises:
        UserError: The file is no such list, an entry stands twice, or a picture can't be decoded;
            names the entry.
    """

    def read(name: str) -> Picture:
        picture = (path.parent / name).read_bytes()
        return render(picture, plan(*picture_size(picture), preprocess.size, preprocess.mode))

    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--pairs {path} can't be read ({error}); name a JSON list") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--pairs {path} is no list of pairs, or an empty one; see --help")
    pairs, seen = [], set[tuple[str, ...]]()
    for k, entry in enumerate(entries):
        where = f"--pairs {path}, entry {k}"
        given = entry if isinstance(entry, dict) else {}
        given = {key: value for key, value in given.items() if value is not None}
        if lacking := [name for name in NEEDED if name not in given]:
            raise UserError(f"{where} lacks {lacking[0]}; see --help")
        if odd := [str(name) for name in given if name not in ALLOWED]:
            raise UserError(f"{where}: {odd[0]!r} is unknown; {nearest(odd[0], ALLOWED)}")
        if not all(isinstance(value, str) and value for value in given.values()):
            raise UserError(f"{where}: every value must be a text that is not empty")
        if tuple(given.values()) in seen:
            raise UserError(f"{where} stands twice; n counts each pair once, so leave it out")
        seen.add(tuple(given.values()))
        texts = [(given[key],) for key in ("text_clean", "text_corrupted") if key in given]
        try:
            pairs.append(Pair(read(given["clean"]), read(given["corrupted"]), *texts))
        except (OSError, BadPicture) as error:
            cause = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{where}: a picture can't be read ({cause})") from None
    return pairs


def _pasted(picture: Picture, box: Box, part: np.ndarray) -> Picture:
    result = picture.copy()
    result[:, box[1] : box[3], box[0] : box[2]] = part
    return result


def _named(category: str) -> str:
    return f"a picture of {'an' if category[0] in 'aeiou' else 'a'} {category}"
