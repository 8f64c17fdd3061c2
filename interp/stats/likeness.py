"""How alike two towers are on the same images: which heads match, how far their maps lie apart, and
how far their streams say the same.

Where a statistic is no mean, functions give values of images that have it as their mean and, to
first order, its spread, so that `simultaneous_band` serves all heads or layers at once.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr

from interp.stats.draws import Purpose, generator
from interp.stats.splits import groups

Maps = Float[np.ndarray, "n h p"]
PerHead = Float[np.ndarray, "n h"]
Gram = Float[np.ndarray, "n n"]


def map_correlations(first: Maps, second: Maps) -> Float[np.ndarray, "h h"]:
    """Pearson correlation, over images and patches, of every head's maps with those of every head
    of the other tower; 0 where maps are flat."""
    flat = (_centred(m).swapaxes(0, 1).reshape(m.shape[1], -1) for m in (first, second))
    x, y = (m / _or_infinite(np.linalg.norm(m, axis=1, keepdims=True)) for m in flat)
    return x @ y.T


def correlation_values(first: Maps, second: Maps) -> PerHead:
    """Values of the correlation of each head's maps with those of the head at its place."""
    x, y = _centred(first), _centred(second)
    xy, xx, yy = ((a * b).sum(axis=-1) for a, b in ((x, y), (x, x), (y, y)))
    size = _or_infinite(np.sqrt(xx.mean(axis=0) * yy.mean(axis=0)))
    r, spread = xy.mean(axis=0) / size, xx / _or_infinite(xx.mean(axis=0))
    return xy / size + r * (1 - (spread + yy / _or_infinite(yy.mean(axis=0))) / 2)


def assignment(likeness: Float[np.ndarray, "h h"]) -> Int[np.ndarray, " h"]:
    """For every head of the first tower its own of the second: no other pairing has a larger sum of
    likeness (Kuhn 1955)."""
    return linear_sum_assignment(likeness, maximize=True)[1]


def jensen_shannon(first: Maps, second: Maps) -> PerHead:
    """Divergence of two maps in bits: 0 if they are equal, 1 if they share no patch (Lin 1991)."""
    p, q = (m / m.sum(axis=-1, keepdims=True, dtype=np.float64) for m in (first, second))
    middle = (p + q) / 2
    nats = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / 2
    return np.maximum(nats / np.log(2), 0)


def neighbours(stratum: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For every image another one of its stratum, each of them once."""
    other = np.arange(len(stratum))
    for rows in groups(stratum):
        other[rows] = np.roll(rows, 1)
    return other


def u_centred(features: Float[np.ndarray, "n d"]) -> Gram:
    """Gram matrix whose diagonal is 0 and whose rows sum to 0 (Szekely and Rizzo 2014, def. 2); 0
    everywhere for features without spread.

    The sum of the product of two, over n (n - 3), is HSIC_1, the unbiased estimate of dependence
    (Song et al. 2012, eq. 5).
    """
    n, x = len(features), features.astype(np.float64)
    assert n > 4, f"{n} images are too few for an unbiased estimate"
    own = x - x.mean(axis=0)
    if np.linalg.norm(own) <= 1e-6 * np.linalg.norm(x):  # the rounding of single precision
        return np.zeros((n, n))
    gram = own @ own.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1)
    gram += rows.sum() / ((n - 1) * (n - 2)) - (rows[:, None] + rows) / (n - 2)
    np.fill_diagonal(gram, 0)
    return gram


def cka_values(first: Gram, second: Gram) -> Float[np.ndarray, " n"]:
    """Values of the debiased linear CKA of two `u_centred` matrices.

    CKA (Kornblith et al. 2019) with HSIC_1 is 1 for streams equal up to rotation and scale, 0 in
    expectation for unrelated ones, where the plain estimate is far above 0 if images are few
    against the width. The spread is that of the delete-one jackknife: a bootstrap would pair copies
    of images, which look alike anyhow. Without image m, HSIC_1 is known at once, because rows that
    sum to 0 leave nothing of the other terms but row m of the product.
    """
    n = len(first)
    rows = [(a * b).sum(axis=1) for a, b in ((first, second), (first, first), (second, second))]
    xy, xx, yy = (row.sum() - 2 * (n - 2) / (n - 3) * np.append(row, 0) for row in rows)
    *without, whole = xy / _or_infinite(np.sqrt(np.maximum(xx * yy, 0)))
    return whole + (n - 1) * (np.mean(without) - np.array(without))


def cka_shuffled(first: Gram, second: Gram, draws: int, seed: int) -> Float[np.ndarray, " draws"]:
    """CKA where images are paired at random; draw by draw alike for all matrices."""
    size = float(np.linalg.norm(first) * np.linalg.norm(second)) or np.inf
    rng = generator(seed, Purpose.PAIRING)
    orders = [rng.permutation(len(first)) for _ in range(draws)]
    return np.array([np.vdot(first, second[order][:, order]) / size for order in orders])


def _centred(maps: Maps) -> Maps:
    """By the mean over images and patches; exactly 0 for maps that are flat but for rounding."""
    own = maps.astype(np.float64)
    own -= own.mean(axis=(0, 2), keepdims=True)
    return np.where(np.abs(own).max(axis=(0, 2), keepdims=True) > 1e-9, own, 0)


def _or_infinite(size: np.ndarray) -> np.ndarray:
    """What to divide by, so that nothing over nothing is 0."""
    return np.where(size > 0, size, np.inf)
