"""Where every pixel goes, decided before any pixel is read.

`plan` fixes, from the header's facts alone, which rectangle of the stored picture lands on which
rectangle of the square input. `render`, `Geometry.map_boxes` and `Geometry.valid` all follow that
one decision, so boxes, padding and the picture under an overlay cannot disagree.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from superclip.errors import UserError

Mode = Literal["crop", "squash", "pad"]

PAD_COLOUR = (123, 117, 104)
"""CLIP's pixel mean, rounded: padding is near zero after normalisation."""

CROP_TRIES = 10
"""As torchvision's RandomResizedCrop: tries before falling back to a central crop."""

_EXIF_ORIENTATION = 0x0112
_BICUBIC = Image.Resampling.BICUBIC
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture of each EXIF orientation upright."""
_TURNED = range(5, 9)  # orientations that swap width and height
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadPicture(UserError):
    """A picture that cannot be decoded or is not what its record says; tells why, not which."""


@dataclass(frozen=True)
class CropDraw:
    """One counted draw of a random resized crop, before the picture's size is known.

    Attributes:
        areas: share of the picture's area, one a try.
        ratios: width over height of the crop in pixels, one a try.
        ratio: the bounds of `ratios`, which the fallback keeps.
        across, down: place of the crop, in [0, 1).
        flip: mirror left and right.
    """

    areas: tuple[float, ...]
    ratios: tuple[float, ...]
    ratio: tuple[float, float]
    across: float
    down: float
    flip: bool


def random_crop(
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.0,
) -> CropDraw:
    """Draw a crop as torchvision's `RandomResizedCrop` does, always as many numbers from `rng`."""
    areas = rng.uniform(*scale, CROP_TRIES)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), CROP_TRIES))
    across, down, coin = rng.random(3).tolist()
    flip = coin < flip_probability
    return CropDraw(tuple(areas.tolist()), tuple(ratios.tolist()), ratio, across, down, flip)


@dataclass(frozen=True)
class Geometry:
    """A rectangle of the stored picture and the rectangle of the square input that it fills.

    Attributes:
        width, height: of the stored picture after any EXIF transpose, pixels.
        size: side S of the square input, pixels.
        source: x0, y0, x1, y1 in the stored picture, fractional.
        target: x0, y0, x1, y1 in the input, whole pixels; what lies outside is padding.
        flip: whether the rectangle is mirrored left to right.
    """

    width: int
    height: int
    size: int
    source: tuple[float, float, float, float]
    target: tuple[int, int, int, int]
    flip: bool = False

    @property
    def valid(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the area of the input that shows picture, not padding."""
        return self.target

    def map_boxes(
        self, xywh: Float32[np.ndarray, "n 4"]
    ) -> tuple[Float32[np.ndarray, "n 4"], Float32[np.ndarray, " n"]]:
        """Carry boxes of the stored picture into the input.

        Returns:
            x0, y0, x1, y1 in input pixels, clipped to `valid`, and the share of each box's area
            that is left (0 for a box that is cut away, which then has no area).
        """
        source, target = np.array(self.source), np.array(self.target, float)
        scale = (target[2:] - target[:2]) / (source[2:] - source[:2])
        corners = np.asarray(xywh, float).reshape(-1, 2, 2).copy()
        corners[:, 1] += corners[:, 0]
        mapped = (corners - source[:2]) * scale + target[:2]
        if self.flip:
            mapped[:, :, 0] = target[0] + target[2] - mapped[:, ::-1, 0]
        clipped = mapped.clip(target[:2], target[2:])
        whole, left = (np.prod(c[:, 1] - c[:, 0], axis=1) for c in (mapped, clipped))
        kept = np.divide(left, whole, out=np.zeros_like(left), where=whole > 0)
        return clipped.reshape(-1, 4).astype(np.float32), kept.astype(np.float32)


def plan(width: int, height: int, size: int, mode: Mode, draw: CropDraw | None = None) -> Geometry:
    """Decide the geometry of one picture from its width and height.

    Args:
        width, height: of the stored picture after any EXIF transpose, pixels.
        size: side of the square input.
        mode: "crop" (shortest side to `size`, centre crop, with torchvision's rounding), "squash"
            (both sides to `size`), "pad" (longest side to `size`, centred).
        draw: a random resized crop for training, stretched to the square; replaces `mode`.
    """
    assert min(width, height, size) > 0, f"no geometry for {width}x{height} -> {size}"
    full = (0, 0, size, size)
    if draw is not None:
        source = _random_rectangle(width, height, size, draw)
        return Geometry(width, height, size, source, full, draw.flip)
    if mode == "squash":
        return Geometry(width, height, size, (0.0, 0.0, float(width), float(height)), full)
    if mode == "pad":
        ratio = max(width, height) / size  # divided by twice, as open_clip rounds
        w, h = (max(1, round(side / ratio)) for side in (width, height))
        x, y = (size - w) // 2, (size - h) // 2
        whole = (0.0, 0.0, float(width), float(height))
        return Geometry(width, height, size, whole, (x, y, x + w, y + h))
    short = min(width, height)
    w, h = int(size * width / short), int(size * height / short)
    x, y = round((w - size) / 2), round((h - size) / 2)
    window = x * width / w, y * height / h, (x + size) * width / w, (y + size) * height / h
    return Geometry(width, height, size, window, full)


def _random_rectangle(
    width: int, height: int, size: int, draw: CropDraw
) -> tuple[float, float, float, float]:
    """The first try that fits, else the largest central crop within the ratio bounds; on the grid
    to which a JPEG decoder may reduce the picture, which moves its sides by less than one pixel of
    the input."""
    for area, ratio in zip(draw.areas, draw.ratios):
        w = round(math.sqrt(width * height * area * ratio))
        h = round(math.sqrt(width * height * area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(draw.across * (width - w + 1)), int(draw.down * (height - h + 1))
            break
    else:
        low, high = draw.ratio
        w = min(width, max(1, round(height * high)))
        h = min(height, max(1, round(width / low)))
        x, y = (width - w) // 2, (height - h) // 2
    grid = _reduction(w / size, h / size)
    x0, y0, x1, y1 = (float(side - side % grid) for side in (x, y, x + w, y + h))
    return x0, y0, x1, y1


def _cause(error: Exception) -> str:
    """Pillow names a picture that it can't tell by an address in memory."""
    unknown = isinstance(error, UnidentifiedImageError)
    return "it is no picture of a known format" if unknown else str(error)


def picture_size(picture: bytes | np.ndarray) -> tuple[int, int]:
    """Width and height after any EXIF transpose, from the header alone.

    Raises:
        BadPicture: if the header cannot be read.
    """
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    try:
        image = Image.open(io.BytesIO(picture))
        turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except _DECODER_ERRORS as error:
        raise BadPicture(f"unreadable header ({_cause(error)})") from error
    width, height = image.size
    return (height, width) if turned else (width, height)


def render(
    picture: bytes | UInt8[np.ndarray, "h w 3"], geometry: Geometry, fast: bool = False
) -> UInt8[np.ndarray, "3 s s"]:
    """Decode a picture and resample it (bicubic with antialiasing) as `geometry` says.

    Args:
        picture: the encoded file, or uint8 pixels.
        fast: for training: let the JPEG decoder reduce the picture (1/2, 1/4, 1/8) as long as it
            stays at least as large as needed, and resample no more than the rectangle.

    Raises:
        BadPicture: if the bytes cannot be decoded or have another size than was planned for.
    """
    try:
        image, reduction = _decode(picture, geometry, fast)
        part = np.moveaxis(_resample(image, geometry, reduction, exact=not fast), 2, 0)
    except BadPicture:
        raise
    except _DECODER_ERRORS as error:
        raise BadPicture(f"cannot be decoded ({_cause(error)})") from error
    if geometry.flip:
        part = part[:, :, ::-1]
    if part.shape[1:] == (geometry.size, geometry.size):
        return np.ascontiguousarray(part)
    canvas = np.empty((3, geometry.size, geometry.size), np.uint8)
    canvas[:] = np.array(PAD_COLOUR)[:, None, None]
    x0, y0, x1, y1 = geometry.target
    canvas[:, y0:y1, x0:x1] = part
    return canvas


def _decode(picture: bytes | np.ndarray, geometry: Geometry, fast: bool) -> tuple[Image.Image, int]:
    """The RGB picture and the factor by which the decoder has reduced it."""
    if isinstance(picture, np.ndarray):
        image, orientation = Image.fromarray(picture), 1
    else:
        image = Image.open(io.BytesIO(picture))
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    size, reduction, turned = image.size, 1, orientation != 1
    if fast and not turned:  # a turned picture is decoded whole: its reduced rows start elsewhere
        (x0, y0, x1, y1), (left, top, right, bottom) = geometry.source, geometry.target
        wanted = _reduction((x1 - x0) / (right - left), (y1 - y0) / (bottom - top))
        if image.draft("RGB", (size[0] // wanted, size[1] // wanted)) is not None:
            reduction = wanted
    if turned:
        if (turn := _TURNS.get(orientation)) is not None:
            image = image.transpose(turn)  # not exif_transpose: that also rewrites the other tags
        size = image.size
    if size != (geometry.width, geometry.height):
        expected = f"{geometry.width}x{geometry.height}"
        raise BadPicture(f"is {size[0]}x{size[1]} pixels, its record says {expected}")
    if image.mode.startswith("I;16"):  # PIL clips 16-bit grey at 255, which would turn it white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB"), reduction


def _resample(
    image: Image.Image, geometry: Geometry, reduction: int, exact: bool
) -> UInt8[np.ndarray, "h w 3"]:
    """The source rectangle at the size of the target rectangle.

    `exact` resizes the whole picture and cuts, where the cut falls on whole pixels: bit for bit
    what open_clip does. Otherwise only the rectangle is resampled, which differs by rounding and at
    the rectangle's border.
    """
    sx0, sy0, sx1, sy1 = (side / reduction for side in geometry.source)
    tx0, ty0, tx1, ty1 = geometry.target
    w, h = tx1 - tx0, ty1 - ty0
    scale_x, scale_y = w / (sx1 - sx0), h / (sy1 - sy0)
    grid = np.array([image.width * scale_x, image.height * scale_y, sx0 * scale_x, sy0 * scale_y])
    if exact and np.abs(grid - grid.round()).max() < 1e-6:
        whole_w, whole_h, left, top = grid.round().astype(int).tolist()
        whole = image.resize((whole_w, whole_h), _BICUBIC)
        return np.asarray(whole.crop((left, top, left + w, top + h)))
    box = sx0, sy0, min(sx1, image.width), min(sy1, image.height)
    if exact or any(side % 1 for side in box):
        return np.asarray(image.resize((w, h), _BICUBIC, box=box))
    left, top, right, bottom = map(int, box)
    return _interpolate(np.array(image.crop((left, top, right, bottom))), w, h)


def _interpolate(pixels: UInt8[np.ndarray, "h1 w1 3"], w: int, h: int) -> np.ndarray:
    """Bicubic with antialiasing as PIL's, in a quarter of its time: torch has vectorised it for
    uint8 (AVX2). The two differ by rounding and by clipping between their passes, on photographs by
    under 0.1 of 255 levels in the mean."""
    import torch

    if pixels.shape[:2] == (h, w):
        return pixels
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    smaller = torch.nn.functional.interpolate(picture, (h, w), mode="bicubic", antialias=True)
    return smaller[0].permute(1, 2, 0).numpy()


def _reduction(*spare: float) -> int:
    """What the JPEG decoder may divide the sides by, when they are so many times larger than
    needed."""
    return next((factor for factor in (8, 4, 2) if min(spare) >= factor), 1)
