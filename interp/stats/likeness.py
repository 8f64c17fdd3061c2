"""How alike two towers are on the same images: which heads match, how far their maps lie apart, and
how far their streams say the same."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr

from interp.stats.draws import Purpose, generator
from interp.stats.splits import groups

TINY = 1e-12
"""Of the largest possible, a spread below this share is none."""


def map_correlations(
    first: Float[np.ndarray, "n l h p"], second: Float[np.ndarray, "n l k p"]
) -> Float[np.ndarray, "l h k"]:
    """Pearson correlation, over images and patches, of every head's maps with those of every head
    of the same layer of another tower; 0 where maps are flat."""
    found = []
    for layer in range(first.shape[1]):
        unit = []
        for maps in (first[:, layer], second[:, layer]):
            flat = maps.astype(np.float64).swapaxes(0, 1).reshape(maps.shape[1], -1)
            size = np.linalg.norm(flat, axis=1)
            flat -= flat.mean(axis=1, keepdims=True)
            spread = np.linalg.norm(flat, axis=1)
            unit.append(flat / np.where(spread > TINY * size, spread, np.inf)[:, None])
        found.append(unit[0] @ unit[1].T)
    return np.stack(found)


def assignment(likeness: Float[np.ndarray, "l h h"]) -> Int[np.ndarray, "l h"]:
    """For every head of the first tower its own of the second: no other pairing within the layer
    has a larger sum of likeness (Kuhn 1955)."""
    return np.stack([linear_sum_assignment(-layer)[1] for layer in likeness])


def jensen_shannon(
    first: Float[np.ndarray, "*axes p"], second: Float[np.ndarray, "*axes p"]
) -> Float[np.ndarray, " *axes"]:
    """Divergence of two maps in bits: 0 if they are equal, 1 if they share no patch (Lin 1991)."""
    p, q = (m / m.sum(axis=-1, keepdims=True) for m in (np.float64(first), np.float64(second)))
    middle = (p + q) / 2
    nats = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / 2
    return np.maximum(nats / np.log(2), 0)


def neighbours(stratum: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For every image another one of its stratum, each of them once."""
    other = np.arange(len(stratum))
    for rows in groups(stratum):
        other[rows] = np.roll(rows, 1)
    return other


def u_centred(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    """Gram matrix whose diagonal is 0 and whose rows sum to 0 (Szekely and Rizzo 2014, def. 2);
    0 everywhere for features without spread.

    The mean product of two of them off the diagonal is HSIC_1, the unbiased estimate of dependence
    (Song et al. 2012, eq. 5), up to (n - 1) / (n - 3).
    """
    n, x = len(features), features.astype(np.float64)
    assert n > 4, f"{n} images are too few for an unbiased estimate"
    own = x - x.mean(axis=0)
    if np.linalg.norm(own) <= 1e-6 * np.linalg.norm(x):  # the rounding of single precision
        return np.zeros((n, n))
    gram = own @ own.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=1)
    gram -= (rows[:, None] + rows) / (n - 2)
    gram += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram


def cka_values(
    first: Float[np.ndarray, "n n"], second: Float[np.ndarray, "n n"]
) -> Float[np.ndarray, " n"]:
    """Values of images whose mean is the debiased linear CKA of two `u_centred` matrices, and whose
    spread is that of the delete-one jackknife.

    CKA (Kornblith et al. 2019) with HSIC_1 is 1 for streams equal up to rotation and scale, 0 in
    expectation for unrelated ones; the plain estimate is far above 0 where images are few against
    the width. Drawing images with repetition would pair copies, which look alike anyhow. Without
    image m, HSIC_1 is known at once, because rows that sum to 0 leave only row m of the product.
    """
    n = len(first)
    rows = [(a * b).sum(axis=1) for a, b in ((first, second), (first, first), (second, second))]
    whole = _ratio(*(r.sum() for r in rows))
    without = _ratio(*(r.sum() - 2 * (n - 2) / (n - 3) * r for r in rows))
    return whole + (n - 1) * (without.mean() - without)


def cka_shuffled(
    first: Float[np.ndarray, "n n"], second: Float[np.ndarray, "n n"], draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """CKA of two `u_centred` matrices where images are paired at random; draw by draw the same
    pairing for all matrices."""
    size = np.sqrt((first**2).sum() * (second**2).sum()) or np.inf
    rng = generator(seed, Purpose.PAIRING)
    orders = [rng.permutation(len(first)) for _ in range(draws)]
    return np.array([np.vdot(first, second[order][:, order]) / size for order in orders])


def _ratio(cross: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum(one * other, 0))
    return np.where(size > 0, cross / np.where(size > 0, size, 1), 0)
