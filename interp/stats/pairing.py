"""The pairing permutation: does a head's attention follow where *this* image's boxes are?

For a head, K[i, j] is the score of image i's map against image j's boxes and
C[i, j] = K[i, j] - mean over k != i of K[k, j] takes off the head's leave-one-out prior within the
stratum. The excess of image i is C[i, i]; under the null that maps and boxes are paired at random
within strata it is exchangeable with C[i, pi(i)]. One permutation serves all heads, so the maximum
of their studentised means has the right joint law (Westfall and Young 1993).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from interp.heads import Head
from interp.stats.draws import DRAWS, Purpose, generator
from interp.stats.multiplicity import max_t, studentised
from interp.stats.splits import groups

_BLOCK = 2**22  # permuted cells looked up at a time


@runtime_checkable
class PairScores(Protocol):
    """What the tests need of `interp.grounding.metrics.PairScores`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the head axes."""
        ...

    def blocks(
        self, rows: Int[np.ndarray, " s"]
    ) -> Iterator[tuple[slice, Float[np.ndarray, "s s h"]]]:
        """Scores K[i, j] among the images `rows`, a few heads (flat slice) at a time."""
        ...

    def select(self, heads: Sequence[Head]) -> PairScores:
        """The same for these heads of a `[layer, head]` sweep, as one axis in this order."""
        ...


@dataclass(frozen=True)
class PairingTest:
    """Result of the pairing permutation; arrays have the shape of the head axes.

    Attributes:
        mean: observed mean excess G.
        t: its studentised value.
        p: one-sided p of each head by itself.
        p_adjusted: step-down max-T over all heads of the test.
        null_95: 95 % quantile of the mean excess under the null, head by head.
        null_max_t_95: 95 % quantile of the largest T under the null.
        n: images in the test. draws: permutations.
    """

    mean: Float[np.ndarray, " ..."]
    t: Float[np.ndarray, " ..."]
    p: Float[np.ndarray, " ..."]
    p_adjusted: Float[np.ndarray, " ..."]
    null_95: Float[np.ndarray, " ..."]
    null_max_t_95: float
    n: int
    draws: int


def pairing_test(
    pairs: PairScores, stratum: Int[np.ndarray, " n"], draws: int = DRAWS, seed: int = 0
) -> PairingTest:
    """Test all heads of `pairs` at once on the images whose `stratum` is 0 or more."""
    members = groups(stratum)
    heads = int(np.prod(pairs.shape))
    n = sum(len(rows) for rows in members)
    assert n > 1, f"{n} images in the strata: nothing to permute"
    sums, squares = np.zeros((2, draws + 1, heads))
    for stream, rows in enumerate(members):
        permutations = pairing_draws(len(rows), draws, seed, stream)
        for block, scores in pairs.blocks(rows):
            for lines, total, square in permuted_sums(centred(scores), permutations):
                sums[lines, block] += total
                squares[lines, block] += square
    t = studentised(sums, squares, n)
    p, adjusted = max_t(t)
    null = np.quantile(sums[1:] / n, 0.95, axis=0)
    arrays = (x.reshape(pairs.shape) for x in (sums[0] / n, t[0], p, adjusted, null))
    limit = float(np.quantile(t[1:].max(axis=1), 0.95))
    return PairingTest(*arrays, null_max_t_95=limit, n=n, draws=draws)


def pairing_draws(size: int, draws: int, seed: int, stream: int = 0) -> Int[np.ndarray, "b size"]:
    """Permutations of a stratum's images; row 0 is the observed pairing, the identity."""
    identity = np.tile(np.arange(size, dtype=np.int32), (draws + 1, 1))
    generator(seed, Purpose.PAIRING, stream).permuted(identity[1:], axis=1, out=identity[1:])
    return identity


def centred(scores: Float[np.ndarray, "s s h"]) -> Float[np.ndarray, "s s h"]:
    """C[i, j]: the score minus the mean score of the stratum's other maps in the same boxes."""
    size = len(scores)
    return (size * scores - scores.sum(axis=0)) / (size - 1)


def permuted_sums(
    centred: Float[np.ndarray, "s s h"], permutations: Int[np.ndarray, "b s"]
) -> Iterator[tuple[slice, Float[np.ndarray, "c h"], Float[np.ndarray, "c h"]]]:
    """Sums over i of C[i, pi(i)] and of its square, a slice of the permutations at a time.

    A draw is a row with `s` ones in a sparse matrix, so that one pass over C serves every head.
    """
    size = len(centred)
    cells = centred.reshape(size * size, -1)
    squared = cells**2
    flat = permutations + size * np.arange(size, dtype=permutations.dtype)
    step = max(1, _BLOCK // size)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        ends = np.arange(len(part) + 1, dtype=part.dtype) * size
        pick = csr_array((np.ones(part.size), part.ravel(), ends), (len(part), size * size))
        yield slice(start, start + len(part)), pick @ cells, pick @ squared
