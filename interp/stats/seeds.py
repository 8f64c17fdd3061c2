"""What t and the exact test over seeds (`superclip.evaluation.statistics.relabelled`) can tell
together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from math import comb

import numpy as np
from jaxtyping import Float

MOST = 4096
"""Relabellings beyond which t alone says as much as both tests (above twelve pairs)."""
STUDIES = 2000
"""That are simulated: a share of .8 has a standard error of .009."""


@cache
def _weights(seeds: tuple[int, ...]) -> Float[np.ndarray, "r n"]:
    """The mean (one number of seeds) or difference of means (two) under every relabelling, the true
    one first."""
    if len(seeds) == 1:
        return np.array([*product((1.0, -1.0), repeat=seeds[0])]) / seeds[0]
    whole = range(sum(seeds))
    weights = np.full((comb(len(whole), seeds[0]), len(whole)), -1.0 / seeds[1])
    for row, chosen in zip(weights, combinations(whole, seeds[0])):
        row[list(chosen)] = 1.0 / seeds[0]
    return weights


def share_told(seeds: tuple[int, ...], distances: Sequence[float]) -> float | None:
    """Share of studies in which both tests, t and the exact one, tell the value from every edge, by
    simulation of normal seeds; None above MOST relabellings.

    Args:
        seeds: how many, of one side or of pairs; two numbers where two sides are not paired.
        distances: of the true value above each edge (negative: below), in standard errors.
    """
    from scipy.stats import t

    if (2 ** seeds[0] if len(seeds) == 1 else comb(sum(seeds), seeds[0])) > MOST:
        return None
    weights, n = _weights(seeds), sum(seeds)
    drawn = np.random.default_rng(0).standard_normal((STUDIES, n))
    parts = np.split(drawn, [seeds[0]], axis=1)[: len(seeds)]
    freedom, scale = n - len(seeds), np.sqrt(sum(1 / k for k in seeds))
    error = np.sqrt(sum(k * part.var(1) for k, part in zip(seeds, parts)) / freedom) * scale
    told = np.ones(STUDIES, bool)
    for distance in distances:
        moved = drawn.copy()
        moved[:, : seeds[0]] += distance * scale
        found = moved @ weights.T
        value = found[:, :1]
        beyond = [(way * (found - value) > -1e-12).mean(1) for way in (1, -1)]
        exact = 2 * np.minimum(*beyond) <= 0.05
        told &= exact & (np.sign(distance) * value[:, 0] > t(freedom).ppf(0.975) * error)
    return float(told.mean())


@cache
def least_told(seeds: tuple[int, ...]) -> float | None:
    """Distance from an edge, in standard errors, that both tests tell in 8 of 10 studies; None if
    they never do (too few seeds), and above MOST relabellings."""
    low, high = 0.0, 64.0
    best = share_told(seeds, [high])
    if best is None or best < 0.8:
        return None
    while high - low > 0.01:
        middle = (low + high) / 2
        share = share_told(seeds, [middle])
        assert share is not None
        low, high = (low, middle) if share >= 0.8 else (middle, high)
    return high
