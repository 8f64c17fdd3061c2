"""Boxes to patches: exact area shares of a patch grid, objects apart from what is ignored.

Convention for regions to ignore. With `obj_p` the share of patch p inside kept objects and `w_p`
the share that is not ignored (an object's area never counts as ignored), a picture stores
`valid = w` and `coverage = obj / w` (0 where w = 0). Then for a map `a`

    sum_p a_p w_p m_p / sum_p a_p w_p

is the mass inside objects over the mass that is not ignored, and both arrays can be handed to
another picture's map together (`interp.grounding.metrics`).

Ignored are crowd boxes, boxes of which the crop left less than `MIN_KEPT`, and padding. Boxes are
`(left, top, right, bottom)` in pixels of the transformed picture, a `size x size` square.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

MIN_KEPT = 0.25
"""An object of which the crop left less than this share is ignored, not a target."""

POINTING_TOLERANCE = 15 / 224
"""Tolerance of the pointing game as a share of the picture's side (Zhang et al. 2018: 15 px)."""


def patch_coverage(
    xyxy: Float[np.ndarray, "n 4"],
    crowd: Bool[np.ndarray, " n"],
    kept: Float[np.ndarray, " n"],
    size: int,
    grid: tuple[int, int],
    valid_area: Sequence[float | int] | None = None,
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Share of every patch inside the union of the objects, and share that is not ignored.

    Args:
        xyxy: boxes in output pixels; parts outside the picture are cut off.
        crowd: regions to ignore.
        kept: share of each box's area that survived the crop.
        size: side of the picture in pixels.
        grid: patches `(rows, columns)`.
        valid_area: the rectangle that shows the photograph; the rest is padding. None: all of it.

    Returns:
        `coverage` and `valid`, float64, row by row, as the module's text defines them.
    """
    objects, ignored = _canvas(xyxy, crowd, kept, size, valid_area)
    areas = _PatchAreas(np.concatenate([objects, ignored]), size, grid)
    inside = areas.union(objects)
    valid = 1 - areas.share(areas.union(ignored) & ~inside)
    return _over(areas.share(inside), valid), valid


def category_coverage(
    xyxy: Float[np.ndarray, "n 4"],
    crowd: Bool[np.ndarray, " n"],
    kept: Float[np.ndarray, " n"],
    categories: Sequence[str],
    size: int,
    grid: tuple[int, int],
    valid_area: Sequence[float | int] | None = None,
) -> dict[str, Float[np.ndarray, " p"]]:
    """Coverage by the objects of each category, to be used with the picture's own `valid`.

    Objects of other categories are background, not ignored. A category whose boxes are all crowd or
    cropped away has no entry.
    """
    _, valid = patch_coverage(xyxy, crowd, kept, size, grid, valid_area)
    target = ~crowd & (kept >= MIN_KEPT)
    names = np.asarray(categories, dtype=object)
    result = {}
    for name in sorted(set(names[target])):
        own = names == name
        boxes, _ = _canvas(xyxy[own], crowd[own], kept[own], size, valid_area)
        areas = _PatchAreas(boxes, size, grid)
        result[name] = _over(areas.share(areas.union(boxes)), valid)
    return result


def pointing_hits(
    xyxy: Float[np.ndarray, "n 4"],
    crowd: Bool[np.ndarray, " n"],
    kept: Float[np.ndarray, " n"],
    size: int,
    grid: tuple[int, int],
    tolerance: float | None = None,
) -> Bool[np.ndarray, " p"]:
    """Patches that count as a hit of the pointing game: centre within `tolerance` of an object.

    `tolerance` is in pixels, Euclidean, to the box as a filled rectangle; None takes 15 px at 224
    (Zhang et al. 2018), which is about half a patch of a B/32.
    """
    tolerance = POINTING_TOLERANCE * size if tolerance is None else tolerance
    left, top, right, bottom = xyxy[~crowd & (kept >= MIN_KEPT)].T[:, :, None]
    x, y = _centres(size, grid)
    across = np.maximum(np.maximum(left - x, x - right), 0)
    down = np.maximum(np.maximum(top - y, y - bottom), 0)
    return (np.hypot(across, down) <= tolerance).any(axis=0)


def centre_rule(
    xyxy: Float[np.ndarray, "n 4"], size: int, grid: tuple[int, int]
) -> Bool[np.ndarray, " p"]:
    """Patches whose centre lies in any box, crowd included: the small study's mask (legacy only).

    It makes every object invisible that holds no patch centre, nearly half of COCO's at 7 x 7.
    """
    left, top, right, bottom = xyxy.T[:, :, None]
    x, y = _centres(size, grid)
    return ((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any(axis=0)


class _PatchAreas:
    """Areas of unions of rectangles in every patch, on the grid of all their edges."""

    def __init__(self, boxes: np.ndarray, size: int, grid: tuple[int, int]):
        self.rows, self.columns = (np.linspace(0, size, count + 1) for count in grid)
        self.x = np.unique(np.concatenate([self.columns, boxes[:, 0], boxes[:, 2]]))
        self.y = np.unique(np.concatenate([self.rows, boxes[:, 1], boxes[:, 3]]))
        self.cells = np.diff(self.y)[:, None] * np.diff(self.x)
        self.patch = size * size / (grid[0] * grid[1])

    def union(self, boxes: np.ndarray) -> np.ndarray:
        """Which cells of the edge grid the union holds; every box edge is an edge of the grid."""
        inside = np.zeros(self.cells.shape, bool)
        columns = np.searchsorted(self.x, boxes[:, [0, 2]])
        rows = np.searchsorted(self.y, boxes[:, [1, 3]])
        for (left, right), (top, bottom) in zip(columns, rows):
            inside[top:bottom, left:right] = True
        return inside

    def share(self, inside: np.ndarray) -> np.ndarray:
        area = np.add.reduceat(inside * self.cells, np.searchsorted(self.y, self.rows[:-1]), axis=0)
        area = np.add.reduceat(area, np.searchsorted(self.x, self.columns[:-1]), axis=1)
        return np.clip(area.ravel() / self.patch, 0, 1)


def _canvas(
    xyxy: np.ndarray,
    crowd: np.ndarray,
    kept: np.ndarray,
    size: int,
    valid_area: Sequence[float | int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Objects and ignored rectangles, cut to the photograph and to the picture."""
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
    assert np.isfinite(boxes).all(), "a box that is not finite reached the patch grid"
    photo = np.asarray((0, 0, size, size) if valid_area is None else valid_area, np.float64)
    photo = np.clip(photo, 0, size)
    boxes = np.clip(boxes, photo[[0, 1, 0, 1]], photo[[2, 3, 2, 3]])
    left, top, right, bottom = photo
    padding = np.array(
        [
            (0, 0, size, top),
            (0, bottom, size, size),
            (0, top, left, bottom),
            (right, top, size, bottom),
        ],
        np.float64,
    )
    target = ~crowd & (kept >= MIN_KEPT)
    return boxes[target], np.concatenate([boxes[~target], padding])


def _over(objects: np.ndarray, valid: np.ndarray) -> np.ndarray:
    ratio = np.divide(objects, valid, out=np.zeros_like(objects), where=valid > 0)
    return np.minimum(ratio, 1)


def _centres(size: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    y, x = ((np.arange(count) + 0.5) * size / count for count in grid)
    return np.tile(x, grid[0]), np.repeat(y, grid[1])
