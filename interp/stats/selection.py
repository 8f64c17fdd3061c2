"""Choose on discovery, judge on validation: the rule by which a head becomes the champion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from interp.heads import Head
from interp.stats.draws import DRAWS
from interp.stats.intervals import (
    Band,
    Interval,
    excess_interval,
    head_blocks,
    influence_values,
    rank_stability,
    simultaneous_band,
)
from interp.stats.multiplicity import holm
from interp.stats.pairing import PairingTest, PairScores, pairing_test

TOP = 5


@dataclass(frozen=True)
class Verdict:
    """What a sweep says about one tower.

    Attributes:
        top: the five best heads of discovery, champion first.
        discovery: max-T test of all heads on the images that chose.
        validation: excess of each of `top` on the images that judge, with its interval.
        p: one-sided pairing p of each of `top` on validation; the champion's counts alone.
        p_holm: the same p adjusted for the five by Holm.
        band: simultaneous band of all heads' excess on validation.
        p_first, p_top: share of the discovery bootstrap that ranks each head first, among five.
    """

    top: tuple[Head, ...]
    discovery: PairingTest
    validation: tuple[Interval, ...]
    p: Float[np.ndarray, " k"]
    p_holm: Float[np.ndarray, " k"]
    band: Band
    p_first: Float[np.ndarray, "l h"]
    p_top: Float[np.ndarray, "l h"]

    @property
    def champion(self) -> Head:
        return self.top[0]

    @property
    def shrinkage(self) -> float:
        """Champion's excess on discovery minus that on validation: the winner's curse, if any."""
        found = self.discovery.mean[self.champion.layer, self.champion.index]
        return float(found) - self.validation[0].estimate


def best_heads(mean_excess: Float[np.ndarray, "l h"], count: int = TOP) -> tuple[Head, ...]:
    """Heads by falling mean excess; ties go to the lower layer, then to the lower index."""
    assert np.isfinite(mean_excess).all(), "a head without a score cannot be ranked"
    order = np.argsort(-mean_excess, axis=None, kind="stable")[:count]
    return tuple(Head(*divmod(int(flat), mean_excess.shape[1])) for flat in order)


def champion(mean_excess: Float[np.ndarray, "l h"]) -> Head:
    """The head with the largest mean excess on discovery."""
    return best_heads(mean_excess, 1)[0]


def judge(
    pairs: PairScores,
    split: Sequence[str] | np.ndarray,
    stratum: Int[np.ndarray, " n"],
    draws: int = DRAWS,
    seed: int = 0,
) -> Verdict:
    """Choose the champion on discovery and test it on validation.

    Args:
        pairs: scores of `[n, layer, head, p]` maps.
        split: name of each image's split; `confirm` is not looked at.
        stratum: `splits.strata_by_split` of the same images.
    """
    names = np.asarray(split)
    chooses, judges = (np.where(names == s, stratum, -1) for s in ("discovery", "validation"))
    discovery = pairing_test(pairs, chooses, draws, seed)
    top = best_heads(discovery.mean)
    test = pairing_test(pairs.select(top), judges, draws, seed)
    validation = tuple(
        excess_interval(head_blocks(pairs.select([head]), judges), draws, seed) for head in top
    )
    band = simultaneous_band(influence_values(pairs, judges), judges, 2, draws, seed)
    first, among = rank_stability(influence_values(pairs, chooses), chooses, TOP, 2, draws, seed)
    return Verdict(top, discovery, validation, test.p, holm(test.p), band, first, among)
