"""Which images choose, which judge, and which are alike enough to be exchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Split = Literal["discovery", "validation", "confirm"]

SALT = "superclip-interp-1"

ONE_STRATUM_BELOW = 40
"""With fewer images than this, quartiles would be too thin: all of them are one stratum."""


def assign_split(key: str, salt: str = SALT) -> Split:
    """Discovery 50 %, validation 30 %, confirm 20 %, by sha256 of the image's public id.

    An image keeps its split whatever else is in the data set and in whatever order.

    >>> assign_split("000000000139")
    'discovery'
    """
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < 0.5:
        return "discovery"
    return "validation" if share < 0.8 else "confirm"


def strata(
    area: Float[np.ndarray, " n"],
    portrait: Bool[np.ndarray, " n"],
    min_size: int = 10,
    padding: Sequence[object] | None = None,
) -> Int[np.ndarray, " n"]:
    """Labels 0, 1, ... of images that a pairing permutation may exchange.

    Quartiles of the coverage after the crop by orientation, and the smallest stratum joins its
    smaller neighbour until each has `min_size` images. Neighbours are adjacent quartiles of one
    orientation; an orientation that stays too small joins the other one. A factor that is constant
    makes no strata, and fewer than 40 images are one stratum.

    Args:
        area: share of the picture inside objects.
        portrait: higher than wide before the crop.
        min_size: fewest images of a stratum.
        padding: with a padding transform, the padding of each image; images of different padding
            are never exchanged.

    Returns:
        int64 labels; -1 for an image whose padding is shared by fewer than `min_size` images. Such
        an image takes part in no test, and the caller reports the count.
    """
    if padding is None:
        return _strata(area, portrait, min_size)
    labels = np.full(len(area), -1)
    kinds = list(dict.fromkeys(padding))
    group = np.array([kinds.index(kind) for kind in padding])
    for kind in range(len(kinds)):
        rows = np.flatnonzero(group == kind)
        if len(rows) >= min_size:
            labels[rows] = labels.max() + 1 + _strata(area[rows], portrait[rows], min_size)
    return labels


def strata_by_split(
    split: Sequence[str] | np.ndarray,
    area: Float[np.ndarray, " n"],
    portrait: Bool[np.ndarray, " n"],
    min_size: int = 10,
    padding: Sequence[object] | None = None,
) -> Int[np.ndarray, " n"]:
    """`strata` made within discovery and within validation apart, labels unique over both.

    Priors and permutations thus never cross a split, and each stratum has `min_size` images in its
    own split. Images of `confirm` get -1: a sweep never scores them.
    """
    labels = np.full(len(area), -1)
    for name in ("discovery", "validation"):
        rows = np.flatnonzero(np.asarray(split) == name)
        if len(rows) == 0:
            continue
        own = None if padding is None else [padding[row] for row in rows.tolist()]
        found = strata(area[rows], portrait[rows], min_size, own)
        labels[rows] = np.where(found >= 0, found + labels.max() + 1, -1)
    return labels


def groups(stratum: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " s"]]:
    """Rows of each stratum in the order of its label; rows labelled below 0 are in none."""
    return [np.flatnonzero(stratum == label) for label in np.unique(stratum[stratum >= 0])]


def _strata(area: np.ndarray, portrait: np.ndarray, min_size: int) -> np.ndarray:
    if len(area) < ONE_STRATUM_BELOW:
        return np.zeros(len(area), np.int64)
    quartile = np.searchsorted(np.quantile(area, [0.25, 0.5, 0.75]), area)
    # The large quartiles of both orientations stand next to each other: 0 1 2 3 | 3 2 1 0.
    cell = np.where(portrait, quartile, 7 - quartile)
    chain = [(k < 4, np.flatnonzero(cell == k)) for k in range(8) if (cell == k).any()]
    while len(chain) > 1 and min(len(rows) for _, rows in chain) < min_size:
        k = min(range(len(chain)), key=lambda k: len(chain[k][1]))
        side, rows = chain.pop(k)
        beside = [n for n in (k - 1, k) if 0 <= n < len(chain)]
        best = min(beside, key=lambda n: (chain[n][0] != side, len(chain[n][1])))
        other, more = chain[best]
        larger = side if len(rows) > len(more) else other
        chain[best] = (larger, np.concatenate([rows, more]))
    labels = np.empty(len(area), np.int64)
    for label, (_, rows) in enumerate(chain):
        labels[rows] = label
    return labels
