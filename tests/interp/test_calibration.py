"""The product's tests and intervals keep their promises on sweeps whose truth is known.

Every synthetic sweep has 6 x 6 heads that look at nothing in particular, on 60 images, and 99
permutations. A family-wise level of 5 % then rejects in 36 to 64 of 1 000 sweeps (the central 95 %
of a binomial and a little more); each wrong variant must leave that range by far.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from interp.grounding.metrics import PairScores
from interp.heads import Head
from interp.stats.intervals import (
    excess_interval,
    head_blocks,
    influence_values,
    simultaneous_band,
)
from interp.stats.pairing import pairing_test
from interp.stats.selection import champion, judge
from interp.stats.splits import groups, strata, strata_by_split

SWEEPS, IMAGES, SIDE, DRAWS = 1000, 60, 5, 99
LAYERS = HEADS = 6
PLANTED = Head(4, 2)
FAMILIES = ("centre", "stratum", "heavy", "ignore", "constant")


@dataclass(frozen=True)
class Sweep:
    pairs: PairScores
    stratum: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def overlap(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of each of SIDE bins of [0, 1] that [low, high] covers, `[n, SIDE]`."""
    edges = np.linspace(0, 1, SIDE + 1)
    inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.maximum(inside, 0) * SIDE


def rectangles(x: np.ndarray, y: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Coverage `[n, p]` of one rectangle an image, given by its centre."""
    across = overlap(x - width / 2, x + width / 2)
    down = overlap(y - height / 2, y + height / 2)
    return (down[:, :, None] * across[:, None, :]).reshape(len(x), -1)


def boxes(rng: np.random.Generator, portrait: np.ndarray) -> tuple[np.ndarray, ...]:
    """Objects near the middle as photographers put them, upright in portrait pictures."""
    x, y = np.clip(rng.normal(0.5, 0.15, (2, len(portrait))), 0.1, 0.9)
    width, height = rng.uniform(0.2, 0.6, (2, len(portrait)))
    return x, y, np.where(portrait, width / 2, width), np.where(portrait, height, height / 2)


def centre_pull() -> np.ndarray:
    line = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    return -(line[:, None] ** 2 + line**2).ravel() / (2 * 0.25**2)


def sweep(rng: np.random.Generator, family: str, images: int = IMAGES) -> Sweep:
    portrait = rng.random(images) < 0.4
    x, y, width, height = boxes(rng, portrait)
    if family == "heavy":  # a few pictures are nearly all object
        width, height = (np.minimum(side * rng.pareto(1.5, images), 1) for side in (width, height))
    coverage = rectangles(x, y, width, height)
    valid = np.ones_like(coverage)
    stratum = strata(coverage.mean(axis=1), portrait)
    logits = rng.normal(size=(images, LAYERS, HEADS, SIDE * SIDE))
    if family in ("centre", "ignore"):
        logits += rng.uniform(0, 3, (LAYERS, HEADS, 1)) * centre_pull()
    if family == "stratum":  # heads know the kind of picture and where its kind has objects
        for rows in groups(stratum):
            logits[rows] += rng.uniform(0, 12, (LAYERS, HEADS, 1)) * coverage[rows].mean(axis=0)
    if family == "heavy":
        logits *= rng.pareto(1.5, (images, LAYERS, HEADS, 1))
    if family == "constant":
        logits[:, ::2] = logits[0, ::2]
        logits[:, 1] = np.where(np.arange(SIDE * SIDE) == 12, 0, -np.inf)
    if family == "alike":  # every head looks at the objects, and equally much
        logits += 0.5 * coverage[:, None, None]
    if family == "planted":  # one does
        logits[:, PLANTED.layer, PLANTED.index] += 0.8 * coverage
    if family == "ignore":  # a crowd stands on both sides of the object
        beside = rectangles(x, y, np.ones(images), height)
        valid = 1 - np.maximum(beside - coverage, 0)
        coverage = np.divide(coverage, valid, out=np.zeros_like(coverage), where=valid > 0)
    maps = softmax(logits).astype(np.float16)
    return Sweep(PairScores(maps, coverage, valid), stratum)


def as_made(made: Sweep) -> Sweep:
    return made


def global_prior(made: Sweep) -> Sweep:
    return replace(made, stratum=np.zeros_like(made.stratum))


def renormalised_ignore(made: Sweep) -> Sweep:
    """Takes the ignored mass off each map once, by its own picture, before anything is permuted."""
    pairs = made.pairs
    kept = pairs.maps * pairs.valid[:, None, None]
    maps = kept / kept.sum(axis=-1, keepdims=True)
    coverage = pairs.valid * pairs.coverage
    return Sweep(PairScores(maps, coverage, np.ones_like(coverage)), made.stratum)


def rejections(
    family: str,
    sweeps: int = SWEEPS,
    variant: Callable[[Sweep], Sweep] = as_made,
    adjusted: bool = True,
) -> int:
    """Sweeps in which any head has p <= .05."""
    count = 0
    for seed in range(sweeps):
        rng = np.random.default_rng([7, FAMILIES.index(family), seed])
        made = variant(sweep(rng, family))
        result = pairing_test(made.pairs, made.stratum, DRAWS, seed)
        count += bool(((result.p_adjusted if adjusted else result.p) <= 0.05).any())
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_max_t_keeps_its_level(family: str) -> None:
    assert 36 <= rejections(family) <= 64


def test_one_prior_for_all_strata_rejects_heads_that_know_the_stratum() -> None:
    assert rejections("stratum", 200, global_prior) > 100


def test_taking_ignored_mass_off_before_permuting_rejects_blind_heads() -> None:
    assert rejections("ignore", 200, renormalised_ignore) > 150


def test_without_max_t_some_head_of_36_is_nearly_always_found() -> None:
    assert rejections("centre", 200, adjusted=False) > 130


def intervals_above_zero(variant: Callable[[Sweep], Sweep], sweeps: int = 200) -> float:
    """Share of the intervals of blind heads that lie above 0."""
    above = []
    for seed in range(sweeps):
        made = variant(sweep(np.random.default_rng([8, seed]), "stratum"))
        for index in range(HEADS):
            blocks = head_blocks(made.pairs.select([Head(1, index)]), made.stratum)
            above.append(excess_interval(blocks, 199, seed).low > 0)
    return float(np.mean(above))


def test_interval_of_a_head_that_knows_only_the_stratum() -> None:
    assert 0.015 <= intervals_above_zero(as_made) <= 0.04  # nominal .025, n = 1 200
    assert intervals_above_zero(global_prior) > 0.25


def test_planted_head_is_found() -> None:
    """An excess of .027 where objects cover .08, on 60 images: power .9 against 36 heads."""
    found, first, excess = [], [], []
    for seed in range(200):
        made = sweep(np.random.default_rng([9, seed]), "planted")
        result = pairing_test(made.pairs, made.stratum, DRAWS, seed)
        excess.append(result.mean[PLANTED.layer, PLANTED.index])
        found.append(result.p_adjusted[PLANTED.layer, PLANTED.index] <= 0.05)
        first.append(champion(result.mean) == PLANTED)
    assert np.mean(excess) == pytest.approx(0.027, abs=0.002)
    assert np.mean(found) > 0.85
    assert np.mean(first) > 0.9


def test_winner_s_curse_stays_on_discovery() -> None:
    """The champion of 36 equal heads is overrated where it was chosen, and nowhere else."""
    split = ["discovery"] * IMAGES + ["validation"] * IMAGES
    discovery, validation, truth = [], [], []
    for seed in range(200):
        made = sweep(np.random.default_rng([10, seed]), "alike", 2 * IMAGES)
        area = made.pairs.coverage.mean(axis=1)
        stratum = strata_by_split(split, area, np.zeros(len(area), bool))
        verdict = judge(made.pairs, split, stratum, DRAWS, seed)
        discovery.append(verdict.discovery.mean[verdict.champion.layer, verdict.champion.index])
        validation.append(verdict.validation[0].estimate)
        truth.append(verdict.discovery.mean.mean())
        assert verdict.shrinkage == pytest.approx(discovery[-1] - validation[-1])
    error = np.std(validation) / np.sqrt(len(validation))
    assert abs(np.mean(validation) - np.mean(truth)) < 3 * error
    assert np.mean(discovery) - np.mean(truth) > 10 * error


def test_interval_of_a_looking_head_covers() -> None:
    """Nominal .95; the truth is the mean estimate of 400 sweeps, 40 times sharper than one."""
    intervals = []
    for seed in range(400):
        made = sweep(np.random.default_rng([11, seed]), "planted")
        blocks = head_blocks(made.pairs.select([PLANTED]), made.stratum)
        intervals.append(excess_interval(blocks, 399, seed))
    truth = np.mean([i.estimate for i in intervals])
    assert 0.92 <= np.mean([i.low <= truth <= i.high for i in intervals]) <= 0.98


def test_band_holds_all_blind_heads_at_once() -> None:
    """Nominal .95 for 36 heads together; pointwise intervals hold them far less often."""
    held, pointwise = [], []
    for seed in range(300):
        made = sweep(np.random.default_rng([12, seed]), "centre", 150)
        values = influence_values(made.pairs, made.stratum)
        band = simultaneous_band(values, made.stratum, 2, 399, seed)
        held.append(((band.low <= 0) & (band.high >= 0)).all())
        error = (band.high - band.estimate) / band.critical
        pointwise.append((np.abs(band.estimate) <= 1.96 * error).all())
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(pointwise) < 0.5
