"""Bootstrap intervals over images; the strata are kept, the draws are shared by all heads.

A stratum of s images is resampled by s - 1 of them (Rao and Wu 1988), which makes the bootstrap
variance of a mean exact instead of a share 1/s too small; with strata of ten that matters. Values
that were centred twice within the stratum have lost two degrees of freedom: s - 2 are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16

from interp.stats.draws import DRAWS, Purpose, generator
from interp.stats.multiplicity import NO_SPREAD
from interp.stats.pairing import PairScores
from interp.stats.splits import groups
from superclip.evaluation.statistics import cleaned

LEVEL = 0.95

_BLOCK = 2**22  # float64 weights of a block of resamples: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the number of images behind it."""

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Band:
    """Simultaneous 95 % band: with that confidence all true means lie within at once.

    Attributes:
        estimate, low, high: with the shape of the head axes.
        critical: the half width in standard errors.
        n: images.
    """

    estimate: Float[np.ndarray, " ..."]
    low: Float[np.ndarray, " ..."]
    high: Float[np.ndarray, " ..."]
    critical: float
    n: int


def influence_values(
    pairs: PairScores, stratum: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n ..."]:
    """What each image adds to a head's mean excess, boxes and maps centred within the stratum.

    s / (s - 1) (K_ii - row mean - column mean + grand mean): the same mean as the excess G to
    rounding, and the variance that a mean of G really has, because G alone leaves in the part of an
    image's score that comes from how easy its boxes are to hit. NaN outside every stratum.
    """
    result = np.full((len(stratum), int(np.prod(pairs.shape))), np.nan)
    for rows in groups(stratum):
        for heads, scores in pairs.blocks(rows):
            own = np.einsum("iih->ih", scores) + scores.mean(axis=(0, 1))
            doubly = own - scores.mean(axis=1) - scores.mean(axis=0)
            result[rows, heads] = len(rows) / (len(rows) - 1) * doubly
    return result.reshape(len(stratum), *pairs.shape)


def head_blocks(
    pairs: PairScores, stratum: Int[np.ndarray, " n"]
) -> list[Float[np.ndarray, "_ _"]]:
    """Scores of a single head (`pairs` of one head), one matrix a stratum.

    Two heads or two towers on the same images compare by the difference of their matrices.
    """
    assert np.prod(pairs.shape) == 1, f"one head at a time, not {pairs.shape}"
    return [scores[:, :, 0] for rows in groups(stratum) for _, scores in pairs.blocks(rows)]


def excess_interval(
    blocks: Sequence[Float[np.ndarray, "_ _"]], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Percentile interval of one head's mean excess G, or of a difference of two.

    Whole images are drawn, map and boxes together, and the prior is taken anew from each draw.
    An image drawn twice meets its own boxes under another number, which shrinks the drawn excess
    by (s - 2) / (s - 1) in expectation; it is scaled back, so the draws centre on the estimate.

    Args:
        blocks: `head_blocks` of the head, or the differences of two heads' blocks.
    """
    n = sum(len(block) for block in blocks)
    estimate, drawn = 0.0, np.zeros(draws)
    for stream, scores in enumerate(blocks):
        size = len(scores)
        assert size > 2, f"a stratum of {size} images has no prior to draw anew"
        own = np.diag(scores)
        estimate += size * size / (size - 1) * (own.mean() - scores.mean())
        for lines, weights in _resamples(size, draws, seed, stream):
            paired = weights @ own / size
            crossed = ((weights @ scores) * weights).sum(axis=1) / size**2
            drawn[lines] += size * size / (size - 2) * (paired - crossed)
    return _percentiles(estimate / n, drawn / n, n)


def simultaneous_band(
    values: Float[np.ndarray, "n ..."],
    stratum: Int[np.ndarray, " n"],
    lost: int = 1,
    draws: int = DRAWS,
    seed: int = 0,
) -> Band:
    """Sup-t band of all heads' means, so that heads may be picked after a look at it.

    The half width is the 95 % quantile over resamples of the largest |deviation| / standard error,
    studentised anew in every resample (Montiel Olea and Plagborg-Moller 2019, bootstrap-t form).
    A head without spread has width 0.

    Args:
        values: per-image values; rows of no stratum are not looked at.
        lost: degrees of freedom lost in a stratum, 1 for plain values, 2 for `influence_values`.
    """
    shape, flat = values.shape[1:], values.reshape(len(values), -1)
    rows = np.concatenate(groups(stratum))
    estimate = flat[rows].mean(axis=0)
    means, errors = _resampled(flat, stratum, draws, seed, lost)
    spread = flat[rows].std(axis=0) >= NO_SPREAD
    t = np.abs(means - estimate) / np.where(spread, np.maximum(errors, NO_SPREAD), np.inf)
    critical = float(np.quantile(t.max(axis=1), LEVEL))
    half = np.where(spread, critical * _standard_error(flat, stratum, lost), 0)
    arrays = (cleaned(x).reshape(shape) for x in (estimate, estimate - half, estimate + half))
    return Band(*arrays, critical=critical, n=len(rows))


def rank_stability(
    values: Float[np.ndarray, "n ..."],
    stratum: Int[np.ndarray, " n"],
    top: int = 5,
    lost: int = 1,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " ..."], Float[np.ndarray, " ..."]]:
    """Share of the resamples in which each head is the first, and among the first `top`.

    `values` and `lost` as in `simultaneous_band`; ties go to the lower head.
    """
    means, _ = _resampled(values.reshape(len(values), -1), stratum, draws, seed, lost)
    ranks = np.argsort(np.argsort(-means, axis=1, kind="stable"), axis=1)
    return tuple((ranks < k).mean(axis=0).reshape(values.shape[1:]) for k in (1, top))


def mean_interval(
    values: Float[np.ndarray, " n"],
    stratum: Int[np.ndarray, " n"] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of per-image values, paired differences and shares included.

    Images whose value is NaN (an undefined metric) are left out; `n` counts the others.
    """
    return interval_of(lambda means: means[..., 0], values[:, None], stratum, draws, seed)


def ratio_interval(
    numerator: Float[np.ndarray, " n"],
    denominator: Float[np.ndarray, " n"],
    stratum: Int[np.ndarray, " n"] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean / mean.

    Enrichment is mass over area; selectivity is object mass over object and clutter mass.
    """
    values = np.stack([numerator, denominator], axis=1)
    return interval_of(lambda means: means[..., 0] / means[..., 1], values, stratum, draws, seed)


def interval_of(
    function: Callable[[Float[np.ndarray, "... k"]], Float[np.ndarray, " ..."]],
    values: Float[np.ndarray, "n k"],
    stratum: Int[np.ndarray, " n"] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a function of the means of `k` per-image values.

    The difference of two ratios on the same images, for one, is
    `interval_of(lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3], values)`.
    Images with a NaN among their values and images of no stratum are left out.
    """
    labels = np.zeros(len(values), np.int64) if stratum is None else stratum
    used = np.isfinite(values).all(axis=1) & (labels >= 0)
    values, labels = values[used], labels[used]
    drawn = function(_resampled(values, labels, draws, seed)[0])
    return _percentiles(float(function(values.mean(axis=0))), drawn, len(values))


def first_held(holds: Bool[np.ndarray, "*rows place"]) -> Int[np.ndarray, " *rows"]:
    """First place from which on all hold; the number of places where the last does not.

    >>> first_held(np.array([[True, False, True, True], [True, True, True, False]])).tolist()
    [2, 4]
    """
    trailing = np.logical_and.accumulate(holds[..., ::-1], axis=-1).sum(axis=-1)
    return np.asarray(holds.shape[-1] - trailing)


def _resampled(
    values: np.ndarray, stratum: np.ndarray, draws: int, seed: int, lost: int = 1
) -> tuple[Float[np.ndarray, "draws h"], Float[np.ndarray, "draws h"]]:
    """Means of resamples and the standard errors that each resample gives for its own mean."""
    members = groups(stratum)
    n = sum(len(rows) for rows in members)
    means, variances = np.zeros((2, draws, values.shape[1]))
    for stream, rows in enumerate(members):
        size = len(rows)
        own = values[rows] - values[rows].mean(axis=0)  # around 0: squares keep their digits
        for lines, weights in _resamples(size, draws, seed, stream, lost):
            mean = weights @ own / size
            variance = np.maximum(weights @ own**2 / size - mean**2, 0)
            means[lines] += (mean + values[rows].mean(axis=0)) * size / n
            variances[lines] += variance * (size / n) ** 2 / max(size - lost - 1, 1)
    return means, np.sqrt(variances)


def _standard_error(values: np.ndarray, stratum: np.ndarray, lost: int) -> Float[np.ndarray, " h"]:
    members = groups(stratum)
    n = sum(len(rows) for rows in members)
    parts = [values[r].var(axis=0) * (len(r) / n) ** 2 / (len(r) - lost) for r in members]
    return np.sqrt(np.sum(parts, axis=0))


def _resamples(
    size: int, draws: int, seed: int, stream: int, lost: int = 1
) -> Iterator[tuple[slice, Float[np.ndarray, "b s"]]]:
    """Weights of a stratum's images in each draw, some draws at a time; every row sums to s."""
    taken = size - lost
    assert taken > 0, f"a stratum of {size} images has no spread to resample"
    times, step = _times(size, taken, draws, seed, stream), max(1, _BLOCK // size)
    for start in range(0, draws, step):
        lines = slice(start, min(start + step, draws))
        yield lines, times[lines] * (size / taken)


@lru_cache(16)  # one page asks a hundred times for the same draws
def _times(
    size: int, taken: int, draws: int, seed: int, stream: int
) -> UInt16[np.ndarray, "draws s"]:
    """How often each image is drawn."""
    rng, step = generator(seed, Purpose.BOOTSTRAP, stream), max(1, _BLOCK // size)
    times = np.empty((draws, size), np.uint16)
    for start in range(0, draws, step):
        part = times[start : start + step]
        drawn = rng.integers(0, size, (len(part), taken)) + size * np.arange(len(part))[:, None]
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    times.setflags(write=False)
    return times


def _percentiles(estimate: float, drawn: np.ndarray, n: int) -> Interval:
    edges = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = cleaned(edges)
    return Interval(float(estimate), float(low), float(high), n)
