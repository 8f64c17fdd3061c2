"""Generated scenes: small coloured pictograms among matched clutter, with captions and boxes.

A scene is an 80 x 80 picture of 5 x 5 cells of 16 px, one cell a ViT patch. One or two *objects*
(pictograms of 12 categories) are annotated and captioned; three to five pieces of *clutter*
(letters, figures and random drawings) are neither. Every scene is a pure function of
(seed, split, index), so training streams fresh scenes and nothing is stored.

Clutter must not be found, or ruled out, by contrast. Every piece is therefore a matched control of
one category: a shape of that category's exact width and height whose ink share, ink energy and
edge energy are near the pictogram's, and nearer still in the mean over its controls. Position,
size, colour, opacity and jitter are drawn by the very code that draws those of the objects.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.random import Generator, Philox
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from superclip.data.batch import Boxes, Record, Tagged
from superclip.errors import UserError

T = TypeVar("T")

GENERATOR_VERSION = 1  # raise it with any change to what a scene contains: digests follow
CELL, GRID = 16, 5
SIZE = CELL * GRID
SHARD = 4096


class Background(NamedTuple):
    """A kind of ground: its mean colour (RGB, 0-255) and how a caption mentions it."""

    rgb: tuple[int, int, int]
    phrase: str


CATEGORIES = {
    "sun": "☀",
    "umbrella": "☂",
    "star": "★",
    "telephone": "☎",
    "cup": "☕",
    "skull": "☠",
    "horse": "♞",
    "heart": "♥",
    "anchor": "⚓",
    "flag": "⚑",
    "airplane": "✈",
    "envelope": "✉",
}
COLOURS = {
    "red": (220, 40, 40),
    "green": (35, 145, 55),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 40),
    "purple": (145, 50, 185),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
BACKGROUNDS = {
    "sky": Background((130, 190, 235), "in the sky"),
    "grass": Background((90, 160, 70), "on grass"),
    "sand": Background((235, 215, 160), "on sand"),
    "stone": Background((125, 120, 125), "on stone"),
    "snow": Background((215, 215, 225), "in the snow"),
    "night": Background((25, 28, 55), "at night"),
}
RELATIONS = ("left of", "right of", "above", "below")
PREFIXES = ("", "", "a picture of", "a drawing of")

_CLUTTER_GLYPHS = "AKRWXZQG8536&%#@?§Ωψж"
_STROKES = (-2, -1, 0, 2, 4, 7, 11)  # px by which 64 px clutter glyphs are thinned or fattened
_CONTROLS = 32  # clutter shapes matched to each category: half glyphs, half drawings
_TEXTURES, _TEXTURE_SIZE = 24, SIZE + 2 * CELL
_CONFETTI = 90  # a texture: about 1.8 a cell
_DRAWS = 96  # uniform numbers a scene may use; the fullest needs 81
_NAMES = tuple(CATEGORIES)
# A colour is used where it stands out from the ground by more than 130 in L1.
VISIBLE = {
    ground: tuple(
        name for name, rgb in COLOURS.items() if np.abs(np.subtract(rgb, back.rgb)).sum() > 130
    )
    for ground, back in BACKGROUNDS.items()
}


@dataclass(frozen=True)
class SceneObject:
    """One pictogram, or one piece of clutter (`category` "clutter").

    Attributes:
        cell: (row, column) of the 5 x 5 grid; the glyph lies wholly inside that cell.
        xywh: tight box in pixels, longest side 16.
    """

    category: str
    colour: str
    cell: tuple[int, int]
    xywh: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its scene graph. `dataclasses.replace` on the graph gives another caption.

    Attributes:
        image: uint8 `[80, 80, 3]`, RGB.
        background: a key of `BACKGROUNDS`.
        objects: the annotated objects, of distinct categories.
        relation: true relation of object 0 to object 1 (one of `RELATIONS`); None with one object.
        named: indices of the objects that the caption names.
        prefix: how the caption begins, may be empty.
        mentions_background: whether the caption says where the objects are.
        clutter: what is drawn like an object and never captioned or boxed.
    """

    image: np.ndarray
    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None
    named: tuple[int, ...]
    prefix: str
    mentions_background: bool
    clutter: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        phrases = [_phrase(self.objects[k].colour, self.objects[k].category) for k in self.named]
        where = BACKGROUNDS[self.background].phrase if self.mentions_background else ""
        return " ".join(filter(None, (self.prefix, f" {self.relation} ".join(phrases), where)))


class Scenes:
    """Scenes of one split as a `Source`: one caption a picture, caption row equal to image row.

    Splits of a seed share textures and glyphs and draw from disjoint random streams.

    Args:
        split: any name; "train", "val" and "test" by custom.
        num: number of scenes.
        seed: fixes textures, glyph bank and every scene.

    Raises:
        UserError: `num` below 1.
    """

    name = "scenes"

    def __init__(self, split: str = "train", num: int = 115_200, seed: int = 0) -> None:
        if num < 1:
            raise UserError(f"scenes: num {num} is not a number of pictures; give at least 1")
        self.split, self.seed = split, seed
        self.num_images = self.num_captions = num
        self.shard_sizes = (SHARD,) * (num // SHARD) + ((num % SHARD,) if num % SHARD else ())
        identity = f"scenes {GENERATOR_VERSION} {json.dumps([split, seed])}"
        self.digest = hashlib.sha256(f"{identity} {num}".encode()).hexdigest()
        self._key = _key(identity)

    def __len__(self) -> int:
        return self.num_images

    @property
    def keys(self) -> list[str]:
        return [self._name(row) for row in range(self.num_images)]

    def _name(self, row: int) -> str:
        return f"{self.split}-{self.seed}-{row:06d}"

    def read(self, row: int) -> Record:
        """Scene `row` as a record whose picture is the uint8 `[80, 80, 3]` array."""
        scene = self.scene(row)
        return Record(
            row=row,
            key=self._name(row),
            width=SIZE,
            height=SIZE,
            picture=scene.image,
            captions=(scene.caption,),
            tags=(caption_tags(scene.caption),),
            caption_rows=(row,),
            boxes=_boxes(scene.objects),
            clutter=_boxes(scene.clutter),
        )

    def where(self, row: int) -> str:
        return "the generator"

    def scene(self, index: int, colour: str | None = None, category: str | None = None) -> Scene:
        """Scene `index`, with its graph; a pure function of (seed, split, index).

        Args:
            colour, category: given to object 0 in place of what is drawn for it; all else stays.
        """
        if not 0 <= index < self.num_images:
            raise IndexError(f"scene {index} of {self.num_images}")
        bank, draw = _bank(self.seed), _Draws(self._key, index)
        count, clutter_count = draw.choose((1, 1, 2)), draw.choose((3, 4, 5))
        background = draw.choose(tuple(BACKGROUNDS))
        canvas = _ground(bank.textures[background], draw)

        first = draw.integer(len(_NAMES))
        second = (first + 1 + draw.integer(len(_NAMES) - 1)) % len(_NAMES)
        cells = draw.sample(GRID * GRID, count + clutter_count)
        shown = (_NAMES.index(category) if category else first, second)[:count]
        objects = tuple(
            _paint(canvas, draw, background, cell, _NAMES[c], bank.objects[c], wanted)
            for c, cell, wanted in zip(shown, cells, (colour, None))
        )
        clutter = tuple(
            _paint(
                canvas, draw, background, cell, "clutter", draw.choose(draw.choose(bank.controls))
            )
            for cell in cells[count:]
        )
        omits = draw.uniform() < 0.15
        named = (draw.integer(2),) if count == 2 and omits else tuple(range(count))
        return Scene(
            image=np.minimum(canvas, 255, out=canvas).astype(np.uint8),
            background=background,
            objects=objects,
            relation=draw.choose(_relations(*objects)) if count == 2 else None,
            named=named,
            prefix=draw.choose(PREFIXES),
            mentions_background=draw.uniform() < 0.6,
            clutter=clutter,
        )


def category_prompts() -> list[list[str]]:
    """Per category one prompt a colour, to be averaged: zero-shot accuracy on one-object scenes."""
    return [[_phrase(colour, category) for colour in COLOURS] for category in CATEGORIES]


def category_templates() -> list[str]:
    """The same prompts with the slot `{}` for the category: what is said of one is said of all."""
    first = next(iter(CATEGORIES))
    return [prompt.removesuffix(first) + "{}" for prompt in category_prompts()[0]]


def caption_vocabulary() -> frozenset[str]:
    """Every word that a caption can contain."""
    grounds = [ground.phrase for ground in BACKGROUNDS.values()]
    texts = [*PREFIXES, *RELATIONS, *grounds, *(p for row in category_prompts() for p in row)]
    return frozenset(" ".join(texts).split())


def caption_tags(caption: str) -> Tagged:
    """The words of a caption with their Penn Treebank tags, by the grammar that made it.

    >>> caption_tags("red cup above blue star on sand")[:3]
    (('red', 'JJ'), ('cup', 'NN'), ('above', 'IN'))
    """
    return tuple((word, _TAGS.get(word, "IN")) for word in caption.split())


_TAGS = (
    dict.fromkeys((*CATEGORIES, *BACKGROUNDS, "picture", "drawing"), "NN")
    | dict.fromkeys((*COLOURS, "left", "right"), "JJ")
    | dict.fromkeys(("a", "an", "the"), "DT")
)


def retrieval_ceilings(
    captions: Sequence[str], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[int, float]]:
    """What image-to-text R@k can reach in a pool of N pictures with one caption each.

    A model that knows all that a picture shows, but can't tell apart the g captions with equal
    content, ranks the right one uniformly among the first g: it is within k with probability
    min(k, g) / g. The prefix ("a drawing of") is no content, because no picture shows it.

    Returns:
        Shares in [0, 1] by k. "chance": content is not looked at (g = N). "category_blind":
        content without category words; above it a model must know categories.
        "caption_collision": all content; nothing is above it in expectation.
    """

    def ceiling(contents: Sequence[str]) -> dict[int, float]:
        sizes = Counter(contents).values()
        return {k: sum(min(k, g) for g in sizes) / len(contents) for k in ks}

    prefixes = [prefix for prefix in PREFIXES if prefix]
    shown = []
    for text in captions:
        named = next((p for p in prefixes if text.startswith(p)), "")
        shown.append(text.removeprefix(named).strip())
    blind = [" ".join(w for w in text.split() if w not in CATEGORIES) for text in shown]
    return {
        "chance": ceiling([""] * len(captions)),
        "category_blind": ceiling(blind),
        "caption_collision": ceiling(shown),
    }


def write_coco(source: Scenes, out: Path, num: int) -> None:
    """Write the first `num` scenes as a COCO data set: all of it, or nothing.

    `out` gets `images/NNNNNN.png`, `captions.json`, `instances.json`, and `clutter.json` with the
    clutter's boxes in the form of instances. Image ids are rows; annotation ids start at 1.

    Raises:
        UserError: `out` is not an empty or a new folder, or `num` is not in 1..len(source).
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; name a new one")
    if not 1 <= num <= len(source):
        raise UserError(f"--num {num}: the {source.split} split has 1 to {len(source)} scenes")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        partial = Path(scratch) / "coco"
        (partial / "images").mkdir(parents=True)
        images, captions, instances, clutter = [], [], [], []
        for row, scene in enumerate(map(source.scene, range(num))):
            file_name = f"{row:06d}.png"
            Image.fromarray(scene.image).save(partial / "images" / file_name)
            size = {"width": SIZE, "height": SIZE}
            images.append({"id": row, "file_name": file_name, "license": 1, **size})
            captions.append({"image_id": row, "caption": scene.caption})
            instances += _instances(row, scene.objects, _NAMES)
            clutter += _instances(row, scene.clutter, ("clutter",))
        files = {
            "captions": (captions, ()),
            "instances": (instances, _NAMES),
            "clutter": (clutter, ("clutter",)),
        }
        for stem, (annotations, names) in files.items():
            document = {
                "info": {"description": f"scenes {source.digest}", "version": GENERATOR_VERSION},
                "licenses": [{"id": 1, "name": "MIT", "url": "https://opensource.org/license/mit"}],
                "images": images,
                "annotations": [{"id": k, **row} for k, row in enumerate(annotations, start=1)],
            }
            if names:  # pycocotools takes a file with categories for one of instances
                document["categories"] = [
                    {"id": k, "name": name, "supercategory": "pictogram"}
                    for k, name in enumerate(names, start=1)
                ]
            (partial / f"{stem}.json").write_text(json.dumps(document))
        partial.replace(out)


def _instances(row: int, things: Sequence[SceneObject], names: Sequence[str]) -> list[dict]:
    return [
        {
            "image_id": row,
            "category_id": names.index(thing.category) + 1,
            "bbox": [float(v) for v in thing.xywh],
            "area": float(thing.xywh[2] * thing.xywh[3]),
            "segmentation": [],
            "iscrowd": 0,
        }
        for thing in things
    ]


def _phrase(colour: str, category: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {category}"


def _boxes(things: Sequence[SceneObject]) -> Boxes:
    xywh = np.array([t.xywh for t in things], np.float32)
    return Boxes(xywh, tuple(t.category for t in things), np.zeros(len(things), bool))


def _relations(a: SceneObject, b: SceneObject) -> list[str]:
    """Every relation of `a` to `b` that holds; cells are disjoint, so there is at least one."""
    (ya, xa), (yb, xb) = a.cell, b.cell
    return [word for word, true in zip(RELATIONS, (xa < xb, xa > xb, ya < yb, ya > yb)) if true]


class _Draws:
    """Choices of one scene, from uniforms drawn at once (single draws cost ten times more)."""

    def __init__(self, key: int, index: int) -> None:
        philox = Philox(key=key, counter=index << 64)  # a range of 2**64 blocks for every scene
        self.uniform = iter(Generator(philox).random(_DRAWS).tolist()).__next__

    def integer(self, n: int) -> int:
        return int(self.uniform() * n)

    def choose(self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]

    def sample(self, n: int, count: int) -> list[int]:
        """`count` distinct integers below n, in random order."""
        pool = list(range(n))
        return [pool.pop(self.integer(len(pool))) for _ in range(count)]


def _ground(textures: np.ndarray, draw: _Draws) -> np.ndarray:
    """Random crop, flip and gain of a random texture: float32 `[80, 80, 3]`."""
    texture = textures[draw.integer(len(textures))]
    y, x = draw.integer(_TEXTURE_SIZE - SIZE + 1), draw.integer(_TEXTURE_SIZE - SIZE + 1)
    crop = texture[y : y + SIZE, x : x + SIZE]
    if draw.uniform() < 0.5:
        crop = crop[:, ::-1]
    return crop * np.float32(0.88 + 0.24 * draw.uniform())


def _paint(
    canvas: np.ndarray,
    draw: _Draws,
    background: str,
    cell: int,
    category: str,
    ink: np.ndarray,
    colour: str | None = None,
) -> SceneObject:
    """Blend ink `[h, w, 1]` into a cell, in a random visible colour, opacity and place in it; in
    `colour` where it is given."""
    row, column = divmod(cell, GRID)
    height, width, _ = ink.shape
    y = row * CELL + draw.integer(CELL - height + 1)
    x = column * CELL + draw.integer(CELL - width + 1)
    drawn = draw.choose(VISIBLE[background])
    colour = colour or drawn
    rgb = [min(255.0, max(0.0, v + 28 * draw.uniform() - 14)) for v in COLOURS[colour]]
    patch = canvas[y : y + height, x : x + width]
    patch += ink * np.float32(0.85 + 0.15 * draw.uniform()) * (np.array(rgb, np.float32) - patch)
    return SceneObject(category, colour, (row, column), (x, y, width, height))


class _Bank(NamedTuple):
    """What all splits of a seed share.

    Attributes:
        textures: uint8 `[24, 112, 112, 3]` by background.
        objects: ink `[h, w, 1]` in [0, 1] of each category.
        controls: ink of the clutter matched to each category, of the same height and width.
    """

    textures: dict[str, np.ndarray]
    objects: list[np.ndarray]
    controls: list[list[np.ndarray]]


def _key(text: str) -> int:
    """A 128-bit Philox key."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


@lru_cache(maxsize=2)  # built on first use in each process, so that `Scenes` itself stays tiny
def _bank(seed: int) -> _Bank:
    rng = Generator(Philox(key=_key(f"scenes {GENERATOR_VERSION} bank {seed}")))
    # The cup alone is too thin at 16 px to be told from noise.
    glyphs = [_glyph(char, int(name == "cup")) for name, char in CATEGORIES.items()]
    letters = [_glyph(char, stroke) for char in _CLUTTER_GLYPHS for stroke in _STROKES]
    drawings = [_drawing(rng) for _ in range(800)]
    objects, controls = [], []
    for glyph in glyphs:
        scale = CELL / max(glyph.size)
        size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
        objects.append(_ink(glyph, size))
        controls.append(
            [
                control
                for shapes in (letters, drawings)
                for control in _matched(objects[-1], [_ink(shape, size) for shape in shapes])
            ]
        )
    textures = {name: _textures(rng, name) for name in BACKGROUNDS}
    return _Bank(textures, objects, controls)


def _matched(ink: np.ndarray, candidates: list[np.ndarray]) -> list[np.ndarray]:
    """Candidates near `ink`, one by one and in the mean, in what low-level saliency can see."""

    def statistics(alpha: np.ndarray) -> np.ndarray:
        padded = np.pad(alpha[..., 0], 1)
        edges = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
        return np.array([alpha.sum(), np.square(alpha).sum(), edges / 2])

    gaps = np.stack([statistics(c) for c in candidates]) - statistics(ink)
    chosen: list[int] = []
    for _ in range(_CONTROLS // 2):
        # Near by itself first of all, then drawing the mean of those chosen to the pictogram.
        cost = 4 * np.square(gaps).sum(1) + np.square(gaps + gaps[chosen].sum(0)).sum(1)
        cost[chosen] = np.inf
        chosen.append(int(cost.argmin()))
    return [candidates[k] for k in chosen]


def _ink(shape: Image.Image, size: tuple[int, int]) -> np.ndarray:
    pixels = np.asarray(shape.resize(size, Image.Resampling.BOX), np.float32)
    return pixels[..., None] / 255


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu Sans; finding the package does not import it.
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UserError("scenes draw with the font of matplotlib; run: pip install matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), 64)


def _cropped(image: Image.Image) -> Image.Image:
    return image.crop(image.getbbox())


def _glyph(char: str, stroke: int) -> Image.Image:
    """A character of about 64 px, fattened (or thinned) by `stroke` px all round, cropped."""
    image = Image.new("L", (128, 128))
    ImageDraw.Draw(image).text((24, 16), char, 255, _font(), stroke_width=max(0, stroke))
    return _cropped(image if stroke >= 0 else image.filter(ImageFilter.MinFilter(1 - 2 * stroke)))


def _drawing(rng: Generator) -> Image.Image:
    """A random filled polygon, polyline, pair of arcs, or frame with bars."""
    image = Image.new("L", (64, 64))
    pen = ImageDraw.Draw(image)
    kind, corners, width = rng.integers(4), int(rng.integers(3, 8)), int(rng.integers(2, 14))
    points = rng.uniform(4, 60, (corners, 2))
    if kind == 0:
        pen.polygon(points[_around(points)].ravel().tolist(), 255)
    elif kind == 1:
        pen.line(points.ravel().tolist(), 255, width, joint="curve")
    elif kind == 2:
        for _ in range(2):
            left, top = rng.uniform(0, 30, 2)
            start, sweep = rng.uniform(0, 360), rng.uniform(90, 300)
            pen.arc((left, top, left + 33, top + 33), start, start + sweep, 255, width)
    else:
        pen.polygon(points[_around(points)].ravel().tolist(), 0, 255, width)
        for ends in rng.uniform(4, 60, (corners - 2, 4)):
            pen.line(ends.tolist(), 255, width // 2)
    return _cropped(image)


def _around(points: np.ndarray) -> np.ndarray:
    """The order of points `[n, 2]` by angle around their mean: a polygon that does not cross."""
    x, y = (points - points.mean(0)).T
    return np.argsort(np.arctan2(y, x))


def _textures(rng: Generator, background: str) -> np.ndarray:
    """Smooth noise at four scales, a grating and confetti over the background's colour."""
    n, size = _TEXTURES, _TEXTURE_SIZE
    visible = np.array([COLOURS[name] for name in VISIBLE[background]])
    field = np.zeros((n, 3, size, size))
    field += np.array(BACKGROUNDS[background].rgb)[:, None, None]
    for cells in (4, 8, 16, 32):
        # Bilinear interpolation of a grid of cells x cells values, as two matrix products.
        hats = 1 - np.abs(np.linspace(0, cells - 1, size)[:, None] - np.arange(cells))
        hats = np.maximum(hats, 0)
        grey, tint = rng.normal(size=(n, 1, cells, cells)), rng.normal(size=(n, 3, cells, cells))
        field += hats @ (11 * grey + 4 * tint) @ hats.T
    angle, period = rng.uniform(0, np.pi, n), rng.uniform(5, 20, n)
    waves = np.stack([np.cos(angle), np.sin(angle)], 1) * (2 * np.pi / period)[:, None]
    y, x = np.mgrid[:size, :size]
    phase = waves[:, :1, None] * y + waves[:, 1:, None] * x
    field += (rng.uniform(0, 8, (n, 1, 1)) * np.sin(phase))[:, None]
    textures = np.clip(field, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.stack([_confetti(rng, texture, visible) for texture in textures])


def _confetti(rng: Generator, texture: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Strokes of 2 to 8 px in the colours of the objects, drawn double and reduced."""
    n, size = _CONFETTI, _TEXTURE_SIZE
    image = Image.fromarray(texture).resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    start, angle = rng.uniform(0, 2 * size, (n, 2)), rng.uniform(0, np.pi, n)
    reach = rng.uniform(4, 16, (n, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
    jitter = rng.uniform(-14, 14, (n, 3))
    rgb = np.clip(colours[rng.integers(len(colours), size=n)] + jitter, 0, 255).astype(int)
    for ends, colour in zip(np.hstack([start, start + reach]).tolist(), rgb.tolist()):
        pen.line(ends, tuple(colour), 4)
    return np.asarray(image.reduce(2))
