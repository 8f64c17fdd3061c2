"""Grounding metrics: how much of a head's attention lies on the objects, per image and head.

`maps` `[n, ..., p]` are attention over patches, renormalised over patches as stored (float16);
`coverage` and `valid` `[n, p]` are those of `interp.grounding.coverage`. All arithmetic is float64.
Every score divides by the mass that is not ignored, so a map need not sum to one: zeroing its sink
patches gives the sink-free variant of each metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from interp.heads import Head

MAX_AREA = 0.9
"""Above this share of the picture the objects leave no room for a normalised mass."""

_BLOCK = 2**21  # float64 values of a block of pair scores: 16 MB


@dataclass(frozen=True)
class PairScores:
    """Score of every image's map against every image's boxes, made block by block when asked.

    score(i, j) = sum_p a_ip w_jp m_jp / sum_p a_ip w_jp: boxes and ignored regions of image j move
    together, the map of image i is left alone. A map without any mass on what image j does not
    ignore scores 0.

    Attributes:
        maps: `[n, ..., p]`.
        coverage, valid: `[n, p]`.
    """

    maps: Float[np.ndarray, "n ... p"]
    coverage: Float[np.ndarray, "n p"]
    valid: Float[np.ndarray, "n p"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the head axes."""
        return self.maps.shape[1:-1]

    def select(self, heads: Sequence[Head]) -> PairScores:
        """The scores of these heads of `[n, layer, head, p]` maps, as one axis in this order."""
        layers, indices = [h.layer for h in heads], [h.index for h in heads]
        return PairScores(self.maps[:, layers, indices], self.coverage, self.valid)

    def blocks(
        self, rows: Int[np.ndarray, " s"]
    ) -> Iterator[tuple[slice, Float[np.ndarray, "s s h"]]]:
        """Scores among the images `rows`, `[i, j, head]`, a few heads (flat slice) at a time."""
        flat = self.maps.reshape(len(self.maps), -1, self.maps.shape[-1])[rows]
        allowed = self.valid[rows].astype(np.float64)
        objects = allowed * self.coverage[rows]
        step = max(1, _BLOCK // len(rows) ** 2)
        for start in range(0, flat.shape[1], step):
            heads = slice(start, min(start + step, flat.shape[1]))
            attention = flat[:, heads].astype(np.float64).swapaxes(1, 2)  # i p h
            yield heads, _ratio(objects @ attention, allowed @ attention)


def in_box_mass(
    maps: Float[np.ndarray, "n ... p"],
    coverage: Float[np.ndarray, "n p"],
    valid: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, "n ..."]:
    """M: share of the not-ignored attention inside objects. Chance is the head's own prior."""
    allowed_area = valid.astype(np.float64)  # before the product: a blind head's excess is 0
    weights = np.stack([allowed_area * coverage, allowed_area], axis=2)
    flat = maps.reshape(len(maps), -1, maps.shape[-1]).astype(np.float64)
    inside, allowed = np.moveaxis(flat @ weights, 2, 0)
    return _ratio(inside, allowed).reshape(maps.shape[:-1])


def area(
    coverage: Float[np.ndarray, "n p"], valid: Float[np.ndarray, "n p"]
) -> Float[np.ndarray, " n"]:
    """A: share of the not-ignored picture inside objects, which is the mass of a uniform map."""
    return in_box_mass(np.ones_like(valid), coverage, valid)


def own_prior_mass(pairs: PairScores, stratum: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n ..."]:
    """Mass that the head's maps of the *other* images of the stratum put in this image's boxes.

    The leave-one-out position prior; NaN for images outside every stratum (label below 0).
    """
    return _off_diagonal_mean(pairs, stratum, axis=0)


def shuffled_mass(pairs: PairScores, stratum: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n ..."]:
    """Mean mass of an image's maps in the boxes of the other images of its stratum."""
    return _off_diagonal_mean(pairs, stratum, axis=1)


def excess(pairs: PairScores, stratum: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n ..."]:
    """G: in-box mass above the head's own leave-one-out prior within the stratum (primary).

    0 in expectation for a head that is blind within strata; NaN outside every stratum.
    """
    mass = in_box_mass(pairs.maps, pairs.coverage, pairs.valid)
    return mass - own_prior_mass(pairs, stratum)


def normalised_mass(
    maps: Float[np.ndarray, "n ... p"],
    coverage: Float[np.ndarray, "n p"],
    valid: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, "n ..."]:
    """(M - A) / (1 - A): 0 for uniform attention, 1 for all of it inside; NaN where A > 0.9."""
    share = area(coverage, valid).reshape(-1, *[1] * (maps.ndim - 2))
    usable = share <= MAX_AREA
    gain = (in_box_mass(maps, coverage, valid) - share) / np.where(usable, 1 - share, 1)
    return np.where(usable, gain, np.nan)


def patch_auroc(
    maps: Float[np.ndarray, "n ... p"],
    coverage: Float[np.ndarray, "n p"],
    valid: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, "n ..."]:
    """P(a inside > a outside) + ties / 2, patches weighted by w m inside and w (1 - m) outside.

    0.5 whatever the area for a map that ranks patches at random; a position prior still moves it.
    NaN where the picture has no object area or nothing else.
    """
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    inside = valid * coverage.astype(np.float64)
    outside = np.maximum(valid - inside, 0)
    result = np.stack([_auroc(a, u, v) for a, u, v in zip(flat, inside, outside)])
    return result.reshape(maps.shape[:-1])


def pointing(
    maps: Float[np.ndarray, "n ... p"],
    hits: Bool[np.ndarray, "n p"],
    valid: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, "n ..."]:
    """Whether the strongest patch is a hit (`coverage.pointing_hits`); ties give their mean.

    Patches that are ignored altogether can't be the strongest. For Zhang et al. 2018 pass one row
    per (image, category) and hand the result to `category_mean`.
    """
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    allowed = np.where(valid[:, None, :] > 0, flat, -1)
    best = (allowed == allowed.max(axis=2, keepdims=True)).astype(np.float64)
    hit = (best @ hits[:, :, None].astype(np.float64))[:, :, 0]
    return (hit / best.sum(axis=2)).reshape(maps.shape[:-1])


def category_mean(
    values: Float[np.ndarray, "n ..."], categories: Sequence[str]
) -> Float[np.ndarray, " ..."]:
    """Mean over categories of the mean within each category."""
    names, index = np.unique(np.asarray(categories), return_inverse=True)
    return np.stack([values[index == k].mean(axis=0) for k in range(len(names))]).mean(axis=0)


def legacy_mass(
    maps: Float[np.ndarray, "n ... p"], centres: Bool[np.ndarray, "n p"]
) -> Float[np.ndarray, "n ..."]:
    """Mass on patches whose centre lies in any box (`coverage.centre_rule`): the small study's."""
    return in_box_mass(maps, centres.astype(np.float64), np.ones(centres.shape))


def _ratio(inside: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    return np.divide(inside, allowed, out=np.zeros_like(inside), where=allowed > 0)


def _off_diagonal_mean(pairs: PairScores, stratum: np.ndarray, axis: int) -> np.ndarray:
    result = np.full((len(stratum), int(np.prod(pairs.shape))), np.nan)
    for label in np.unique(stratum[stratum >= 0]):
        rows = np.flatnonzero(stratum == label)
        assert len(rows) > 1, f"stratum {label} holds one image and has no prior without it"
        for heads, scores in pairs.blocks(rows):
            own = np.einsum("iih->ih", scores)
            result[rows, heads] = (scores.sum(axis=axis) - own) / (len(rows) - 1)
    return result.reshape(len(stratum), *pairs.shape)


def _auroc(maps: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """AUROC of `[h, p]` maps by one sort: every inside patch counts the outside weight below it."""
    pairs = inside.sum() * outside.sum()
    if pairs == 0:
        return np.full(len(maps), np.nan)
    maps = maps.astype(np.promote_types(maps.dtype, np.float32))  # sorts faster than float16
    order = np.argsort(maps, axis=1)
    ranked = np.take_along_axis(maps, order, axis=1)
    below = np.cumsum(np.pad(outside[order], ((0, 0), (1, 0))), axis=1)
    last = ranked.shape[1] - 1
    place = np.arange(last + 1)
    changes = ranked[:, 1:] != ranked[:, :-1]
    first = np.where(np.pad(changes, ((0, 0), (1, 0)), constant_values=True), place, 0)
    final = np.where(np.pad(changes, ((0, 0), (0, 1)), constant_values=True), place, last)
    first = np.maximum.accumulate(first, axis=1)
    final = np.minimum.accumulate(final[:, ::-1], axis=1)[:, ::-1]
    strictly, through = (np.take_along_axis(below, k, axis=1) for k in (first, final + 1))
    return (inside[order] * (strictly + through)).sum(axis=1) / (2 * pairs)
