"""Intervals of one model, and differences of two, over pictures and seeds.

Pictures are the inner level: they are drawn with all their captions, and the same draws serve both
models. Seeds are the outer level: training again gives another model, and a claim about a recipe
must survive that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from superclip.evaluation.measures import ClassMean, Mean, MeanAveragePrecision, Measure

LEVEL = 0.95
BOOTSTRAP = "paired bootstrap"
ROUNDING = 1e-12
"""A difference of means, or a spread, this far below the values is none."""
_BLOCK = 2**24  # weights drawn at a time: 128 MB


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval over pictures."""

    value: float
    low: float
    high: float


def picture_weights(
    pictures: int, draws: int, seed: int = 0
) -> Iterator[Float[np.ndarray, "block n"]]:
    """How often each picture counts in each draw; the same for every model and measure."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xB007]))
    step = max(1, _BLOCK // pictures)
    share = np.full(pictures, 1 / pictures)
    for start in range(0, draws, step):
        yield rng.multinomial(pictures, share, size=min(step, draws - start)).astype(float)


def redrawn(
    measures: Sequence[Measure], draws: int, seed: int = 0
) -> Float[np.ndarray, "measures draws"]:
    """Every measure in every draw of the pictures; they must be of the same pictures."""
    (pictures,) = {m.statistic.pictures for m in measures}
    blocks = [
        np.stack([m.statistic(weights) for m in measures])
        for weights in picture_weights(pictures, draws, seed)
    ]
    drawn = np.concatenate(blocks, axis=1)
    for row, measure in zip(drawn, measures):
        if isinstance(measure.statistic, MeanAveragePrecision):
            # Copies of a picture rank together, which lifts the precision of every draw.
            row += measure.statistic.value - np.nanmean(row)
    return drawn


def intervals(measures: Sequence[Measure], draws: int, seed: int = 0) -> list[Interval]:
    """Percentile intervals over pictures; where all queries hit, or all miss, no draw differs from
    another, and the interval is the exact one of Clopper and Pearson (1934) for that many pictures,
    or its like for a mean over classes.
    """
    edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found: dict[int, Interval] = {}
    for pictures in {m.statistic.pictures for m in measures}:  # folds may use fewer than all
        places = [k for k, m in enumerate(measures) if m.statistic.pictures == pictures]
        drawn = redrawn([measures[k] for k in places], draws, seed)
        for k, row in zip(places, drawn):
            low, high = np.nanquantile(row, edges)
            value = measures[k].statistic.value
            statistic = measures[k].statistic
            if isinstance(statistic, ClassMean):
                sizes = np.unique(statistic.label, return_counts=True)[1]
            else:
                sizes = np.array([pictures]) if measures[k].hits else None
            if sizes is not None and value in (0, 1):
                least = all_hit_bound(sizes, edges[0])
                low, high = (least, 1) if value else (0, 1 - least)
            found[k] = Interval(value, float(low), float(high))
    return [found[k] for k in range(len(measures))]


def all_hit_bound(sizes: Int[np.ndarray, " c"], level: float) -> float:
    """The least mean over classes under which all pictures hit with chance `level` or more.

    sum n_c log p_c >= log level with the least mean of p_c: p_c = min(1, t n_c) for one t, by
    Lagrange. Of one class this is Clopper and Pearson's limit.

    >>> [round(all_hit_bound(np.array(sizes), 0.025), 4) for sizes in ([10], [5, 5])]
    [0.6915, 0.6915]
    """
    from scipy.optimize import brentq

    def over(log_t: float) -> float:
        return float((sizes * np.minimum(0, log_t + np.log(sizes))).sum() - math.log(level))

    widest = -float(np.log(sizes.max()))
    found: Any = brentq(over, widest + math.log(level) - 1, widest)
    return float(np.minimum(1, np.exp(found) * sizes).mean())


def cleaned(values: np.ndarray, noise: float = ROUNDING) -> np.ndarray:
    """What is 0 but for rounding as 0: an interval that ends there lies on neither side."""
    return np.where(np.abs(values) < noise, 0, values)


@dataclass(frozen=True)
class Difference:
    """First arm minus second, of one measure.

    Attributes:
        first, second: means over seeds.
        value, low, high: the difference and its 95 % interval.
        p: two-sided. test: how it was found. freedom: degrees of freedom of its t (None: none).
        least_p: the smallest p that the test allows; of several seeds, that which relabelling
            them allows, while t reaches below by taking seeds for normal.
        seeds: models of each arm. paired: whether they share seeds and initial weights.
        power: chance that this test finds a true difference of `effect`. detectable: the true
            difference that it finds in 80 % of cases. None where no draw differs from another, so
            that nothing is known of the spread; `detectable` also where no difference is that sure.
            (Power at the observed difference would repeat the p-value: Hoenig and Heisey 2001.)
        exact: two-sided p of the exact test over the seeds alone (`relabelled`); None where an arm
            has one.
        verdict: what may be said of this row alone.
    """

    name: str
    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    test: str
    freedom: float | None
    least_p: float | None
    seeds: tuple[int, int]
    paired: bool
    effect: float
    power: float | None
    detectable: float | None
    exact: float | None
    verdict: str


def compare(
    first: Sequence[Measure],
    second: Sequence[Measure],
    paired: bool,
    effect: float,
    draws: int,
    seed: int = 0,
) -> Difference:
    """`comparisons` of a single measure."""
    rows = comparisons([[m] for m in first], [[m] for m in second], paired, [effect], draws, seed)
    return rows[0]


def comparisons(
    first: Sequence[Sequence[Measure]],
    second: Sequence[Sequence[Measure]],
    paired: bool,
    effects: Sequence[float],
    draws: int,
    seed: int = 0,
) -> list[Difference]:
    """Two arms on the same pictures: the same measures of each of their models.

    One model each: percentile interval of the paired bootstrap over pictures; p from McNemar's
    exact test by picture where the values are hits, else from the bootstrap. Several: the variance
    of the mean difference has a part from seeds, one from pictures, and one from both that each of
    the two holds once (two-way clustering: Cameron, Gelbach and Miller 2011), and Student's t with
    Satterthwaite's degrees of freedom. An arm of a single model against one of several is taken to
    vary from seed to seed as much as the other.

    Args:
        first, second: for each model of the arm, its measures.
        paired: model k of both arms had the same seed and initial weights.
        effects: of each measure the difference for which the power is stated, in its unit.
    """
    columns = list(zip(*first, *second, strict=True))
    found: dict[int, Difference] = {}
    for pictures in {column[0].statistic.pictures for column in columns}:
        places = [k for k, c in enumerate(columns) if c[0].statistic.pictures == pictures]
        drawn = redrawn([m for k in places for m in columns[k]], draws, seed)
        for k, rows in zip(places, np.split(drawn, len(places))):
            arms = columns[k][: len(first)], columns[k][len(first) :]
            found[k] = _compare(*arms, rows[: len(first)], rows[len(first) :], paired, effects[k])
    return [found[k] for k in range(len(columns))]


def _compare(
    first: Sequence[Measure],
    second: Sequence[Measure],
    a: np.ndarray,
    b: np.ndarray,
    paired: bool,
    effect: float,
) -> Difference:
    """One measure; `a` and `b` are its values in the draws, `[model, draw]`."""
    arms = [np.array([m.statistic.value for m in arm]) for arm in (first, second)]
    value = float(arms[0].mean() - arms[1].mean())
    noise = ROUNDING * max(1.0, *(float(np.abs(arm).max()) for arm in arms))
    value = 0.0 if abs(value) < noise else value
    single, drawn = len(first) == len(second) == 1, a[0] - b[0]
    sure = least = floor = None
    drawn = cleaned(drawn, noise)
    if single:
        low, high = map(float, np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        error, freedom = float(np.nanstd(drawn)), math.inf
    else:
        error, freedom = _two_way_error(arms, a, b, paired)
        error = 0.0 if error < noise else error
        half = _quantile(freedom) * error
        low, high = value - half, value + half
    if single and first[0].hits:
        gains = _gains(first[0], second[0])
        p, test = mcnemar_by_picture(gains), "McNemar by picture"
        queries = first[0].statistic.queries
        sure, least = mcnemar_power(effect, gains, queries), mcnemar_detectable(gains, queries)
    elif single:
        below, above = (drawn <= 0).sum(), (drawn >= 0).sum()
        floor = 2 / (1 + len(drawn))
        p = min(1.0, (1 + float(min(below, above))) * floor)
        test = BOOTSTRAP
    else:
        p, test = _two_sided(value, error, freedom), "t over seeds and pictures"
        floor = least_p((len(first), len(second)), paired)
    if error > 0 and sure is None:
        sure, least = power(effect, error, freedom), detectable(error, freedom)
    return Difference(
        name=first[0].name,
        first=float(arms[0].mean()),
        second=float(arms[1].mean()),
        value=value,
        low=low,
        high=high,
        p=p,
        test=test,
        freedom=None if single or math.isinf(freedom) else freedom,
        least_p=floor,
        seeds=(len(first), len(second)),
        paired=paired,
        effect=effect,
        power=sure,
        detectable=least,
        exact=None if min(map(len, arms)) < 2 else relabelled(arms, 0.0, paired),
        verdict=verdict(low, high, p, first[0].higher_is_better, len(first), len(second), paired),
    )


def _gains(first: Measure, second: Measure) -> Float[np.ndarray, " n"]:
    """How many more hits each picture has with the first model."""
    one, other = first.statistic, second.statistic
    assert isinstance(one, Mean) and isinstance(other, Mean)
    return one.sums - other.sums


def mcnemar_by_picture(gains: Float[np.ndarray, " n"]) -> float:
    """Exact two-sided p that swapping the two models' answers, picture by picture, changes nothing.

    With one query a picture this is McNemar's exact test. With several, captions of a picture are
    not independent, so they are swapped together; the null distribution of the sum of signed gains
    is the convolution of one binomial for every size of gain.

    Args:
        gains: whole numbers, hits of the first model minus hits of the second.
    """
    from scipy.stats import binom

    gains = np.rint(gains).astype(int)
    sizes, counts = np.unique(np.abs(gains[gains != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    null = np.ones(1)  # of the sum over positive gains minus negative ones, from its least value
    for size, count in zip(sizes, counts):
        steps = np.zeros(2 * size * count + 1)
        steps[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        null = np.convolve(null, steps)
    middle, seen = len(null) // 2, abs(int(gains.sum()))
    return float(min(1.0, null[middle + seen :].sum() + null[: middle - seen + 1].sum()))


def mcnemar_power(effect: float, gains: Float[np.ndarray, " n"], queries: int) -> float:
    """Chance that `mcnemar_by_picture` gives p <= .05 where the true difference is `effect`.

    Exact for one query a picture: the number of pictures on which the models disagree is binomial,
    with the observed rate (one added, so that it is never 0; raised where the effect needs more),
    and so is the number of those that go one way. Gains of several queries count as so many of one
    size: as many as have the same sum of sizes and of squares.

    >>> round(mcnemar_power(0.1, np.repeat([1.0, -1.0, 0.0], [15, 5, 80]), 100), 2)
    0.53
    """
    from scipy.stats import binom

    sizes, n = np.abs(gains), len(gains)
    unit = (sizes**2).sum() / sizes.sum() if sizes.any() else 1.0
    rate = min(1.0, (sizes.sum() / unit + 1) / (n + 2))
    shift = min(1.0, abs(effect) * queries / (n * unit))
    rate = max(rate, shift)
    d = np.arange(n + 1)
    # The most that the rarer side may have: twice its tail is at most .05.
    worst = binom.ppf((1 - LEVEL) / 2, d, 0.5)
    worst -= 2 * binom.cdf(worst, d, 0.5) > 1 - LEVEL
    share = (rate + shift) / (2 * rate)
    rejects = binom.cdf(worst, d, share) + binom.sf(d - worst - 1, d, share)
    return float(binom.pmf(d, n, rate) @ np.where(worst < 0, 0.0, rejects))


def mcnemar_detectable(
    gains: Float[np.ndarray, " n"], queries: int, wanted: float = 0.8
) -> float | None:
    """The true difference that the test finds with chance `wanted`; None if even the largest is
    not."""
    from scipy.optimize import brentq

    if mcnemar_power(1.0, gains, queries) < wanted:
        return None
    found: Any = brentq(lambda x: mcnemar_power(x, gains, queries) - wanted, 0.0, 1.0, xtol=1e-5)
    return float(found)


def _two_way_error(
    arms: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray, paired: bool
) -> tuple[float, float]:
    """Standard error of the mean difference, and its degrees of freedom."""
    over_pictures = float(np.nanvar(a.mean(0) - b.mean(0)))
    if paired:
        groups = [(arms[0] - arms[1], a - b)]
    else:
        groups = [(arms[0], a), (arms[1], b)]
    over_seeds, both, terms = 0.0, 0.0, 0.0
    for values, drawn in groups:
        k = len(values)
        if k == 1:  # beside an arm of several, whose spread over seeds stands for its own
            values, drawn = max(groups, key=lambda group: len(group[0]))
        m = len(values)
        part = float(values.var(ddof=1)) / k
        over_seeds += part
        terms += part**2 / (m - 1)
        both += float(np.nanvar(drawn - drawn.mean(0), axis=1).sum()) / (k * (m - 1))
    # The part from pictures has as many degrees of freedom as pictures: infinite beside the seeds.
    # Neither part alone may be larger than the whole: two seeds may differ by the same by chance.
    variance = max(over_seeds + max(over_pictures - both, 0.0), over_pictures)
    if min(map(len, arms)) == 1:  # one spread serves both arms
        terms = over_seeds**2 / (max(map(len, arms)) - 1)
    return math.sqrt(variance), variance**2 / terms if terms else math.inf


def _quantile(freedom: float) -> float:
    from scipy.stats import norm, t

    upper = (1 + LEVEL) / 2
    return float(norm.ppf(upper) if math.isinf(freedom) else t.ppf(upper, freedom))


def _two_sided(value: float, error: float, freedom: float) -> float:
    from scipy.stats import norm, t

    if error == 0:
        return 1.0 if value == 0 else 0.0
    tail = norm.sf if math.isinf(freedom) else lambda x: t.sf(x, freedom)
    return float(2 * tail(abs(value) / error))


def power(effect: float, error: float, freedom: float = math.inf) -> float:
    """Chance that a two-sided 5 % test with this standard error finds a true difference.

    >>> round(power(2.8, 1.0), 2)
    0.8
    """
    from scipy.stats import nct, norm

    if error == 0:
        return 1.0
    critical, shift = _quantile(freedom), abs(effect) / error
    if math.isinf(freedom):
        return float(norm.sf(critical - shift) + norm.cdf(-critical - shift))
    other_tail = np.nan_to_num(nct.cdf(-critical, freedom, shift))  # scipy has NaN where it is 0
    return float(nct.sf(critical, freedom, shift) + other_tail)


def detectable(error: float, freedom: float = math.inf, wanted: float = 0.8) -> float:
    """The true difference that the test finds with chance `wanted`."""
    from scipy.optimize import brentq

    if error == 0:
        return 0.0
    found: Any = brentq(lambda x: power(x, 1.0, freedom) - wanted, 0.0, 100.0)
    return error * float(found)


def least_p(seeds: tuple[int, int], paired: bool) -> float:
    """The smallest two-sided p of an exact seed-level test: sign flips of pairs, else relabelling.

    >>> least_p((3, 3), True), least_p((6, 6), True)
    (0.25, 0.03125)
    """
    return 2 / (2 ** seeds[0] if paired else math.comb(sum(seeds), seeds[0]))


def relabelled(values: Sequence[Sequence[float] | np.ndarray], edge: float, paired: bool) -> float:
    """Two-sided p of the exact test over seeds that the value is `edge`: signs flipped, by seed or
    by pair, else seeds relabelled. It asks nothing of their distribution but symmetry, where t asks
    that it be normal (all of 2^n or of the choices; above 9 999, so many drawn).

    >>> relabelled([[2.0, 3.0, 4.0], [1.0, 1.5, 1.0]], 0.0, True)
    0.25
    """
    from scipy.stats import permutation_test

    first = np.array(values[0]) - edge
    if len(values) == 2 and not paired:
        data, kind = (first, np.array(values[1])), "independent"
    else:
        data, kind = (first - (np.array(values[1]) if paired else 0),), "samples"

    def mean(a: np.ndarray, b: np.ndarray | None = None, axis: int = -1) -> Any:
        return a.mean(axis) if b is None else a.mean(axis) - b.mean(axis)

    found = permutation_test(data, mean, permutation_type=kind, vectorized=True, rng=0)
    return float(found.pvalue)


def verdict(
    low: float, high: float, p: float, higher_is_better: bool, ka: int, kb: int, paired: bool
) -> str:
    clear = (low > 0 or high < 0) and p <= 1 - LEVEL
    direction = "better" if (low > 0) == higher_is_better else "worse"
    if ka == kb == 1:
        # Two files may differ for certain, while nothing is known of the recipes behind them.
        said = f"this checkpoint is {direction}" if clear else "no difference shown"
        return f"{said}; of the recipes: descriptive"
    if least_p((ka, kb), paired) > 1 - LEVEL or min(ka, kb) < 4:
        return "descriptive"
    return direction if clear else "no difference shown"
