"""Tests of many heads at once: max-T by resampling, sign flips, Holm, McNemar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from interp.stats.draws import DRAWS, Purpose, generator

ALPHA = 0.05
"""Two-sided level of the intervals and one-sided level of the tests."""

NO_SPREAD = 1e-9
"""A statistic whose standard deviation is below this is constant: its T is 0, never rejected."""

_BLOCK = 2**22  # float64 values of a block of draws: 32 MB


def studentised(
    sums: Float[np.ndarray, "draws h"], squares: Float[np.ndarray, "draws h"], n: int
) -> Float[np.ndarray, "draws h"]:
    """T = mean / standard error of `n` scores, from their sums and sums of squares."""
    mean = sums / n
    sd = np.sqrt(np.maximum(squares - n * mean**2, 0) / (n - 1))
    spread = sd >= NO_SPREAD
    return np.where(spread, np.sqrt(n) * mean / np.where(spread, sd, 1), 0)


def max_t(
    t: Float[np.ndarray, "draws h"],
) -> tuple[Float[np.ndarray, " h"], Float[np.ndarray, " h"]]:
    """One-sided p of each head, alone and adjusted for all heads by step-down max-T.

    Westfall and Young 1993, algorithm 2.8: the head of the k-th largest T is compared with the
    maximum over itself and the heads behind it. p = (1 + #{draws with T at least as large}) /
    (1 + draws). T equal up to rounding counts as at least as large.

    Args:
        t: row 0 observed, the other rows drawn under the null, jointly for all heads.

    Returns:
        p and adjusted p.
    """
    threshold = t[0] - 1e-9 * np.abs(t[0])
    order = np.argsort(-t[0], kind="stable")
    behind = np.maximum.accumulate(t[:, order[::-1]], axis=1)[:, ::-1]
    adjusted = np.empty(t.shape[1])
    adjusted[order] = np.maximum.accumulate((behind >= threshold[order]).mean(axis=0))
    return (t >= threshold).mean(axis=0), adjusted


def holm(p: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Holm's adjusted p-values of `k` hypotheses chosen beforehand."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


@dataclass(frozen=True)
class SignFlipTest:
    """Sign-flip test of per-image effects.

    Attributes:
        mean: mean effect.
        t: studentised mean (its absolute value decides when two-sided).
        p, p_adjusted: alone; adjusted by step-down max-T over all heads.
        n: images.
    """

    mean: Float[np.ndarray, " ..."]
    t: Float[np.ndarray, " ..."]
    p: Float[np.ndarray, " ..."]
    p_adjusted: Float[np.ndarray, " ..."]
    n: int


def sign_flip_test(
    effects: Float[np.ndarray, "n ..."],
    two_sided: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> SignFlipTest:
    """Is the mean of paired per-image effects (an ablation's, say) above 0, or other than 0?

    Signs are flipped by image, the same for all heads; exact where each image's vector of effects
    is symmetric about 0 under the null.
    """
    shape, values = effects.shape[1:], effects.reshape(len(effects), -1).astype(np.float64)
    n = len(values)
    assert np.isfinite(values).all(), "effects must be finite: leave out the images before"
    rng = generator(seed, Purpose.SIGN_FLIP)
    signs = rng.integers(0, 2, (draws + 1, n), dtype=np.int8) * 2 - 1
    signs[0] = 1
    sums = np.empty((draws + 1, values.shape[1]))
    step = max(1, _BLOCK // n)
    for start in range(0, draws + 1, step):
        sums[start : start + step] = signs[start : start + step].astype(np.float64) @ values
    squares = np.broadcast_to((values**2).sum(axis=0), sums.shape)
    t = studentised(sums, squares, n)
    p, adjusted = max_t(np.abs(t) if two_sided else t)
    mean = sums[0] / n
    return SignFlipTest(*(x.reshape(shape) for x in (mean, t[0], p, adjusted)), n=n)


def mcnemar(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> float:
    """Exact two-sided p that two models are right equally often on the same images (R@1, say)."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
