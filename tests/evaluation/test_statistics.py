"""Intervals, differences and their power: against enumeration, and over a thousand simulations."""

import numpy as np
import pytest
from reference import evaluation as naive
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from superclip.evaluation.measures import (
    ClassMean,
    Mean,
    MeanAveragePrecision,
    Measure,
    Median,
    Result,
)
from superclip.evaluation.statistics import (
    all_hit_bound,
    compare,
    detectable,
    intervals,
    least_p,
    mcnemar_by_picture,
    mcnemar_detectable,
    mcnemar_power,
    picture_weights,
    power,
)
from superclip.evaluation.tables import difference_lines, differences_of


@pytest.fixture
def weights() -> np.ndarray:
    return next(iter(picture_weights(12, 50)))


@pytest.mark.parametrize("kind", [Mean, Median])
def test_weighted_statistics_are_those_of_the_resample_written_out(kind, weights):
    rng = np.random.default_rng(0)
    picture = np.sort(rng.integers(0, 12, 30))
    values = rng.integers(0, 6, 30).astype(float)
    statistic = kind(values, picture, 12)
    take = np.mean if kind is Mean else np.median
    assert statistic.value == pytest.approx(take(values))
    expected = [take(naive.repeated(values, picture, w)) for w in weights]
    np.testing.assert_allclose(statistic(weights), expected)


def test_class_mean_leaves_classes_without_pictures_out(weights):
    rng = np.random.default_rng(1)
    label, hits = rng.choice([0, 1, 3], 12), rng.integers(0, 2, 12).astype(float)
    statistic = ClassMean(hits, label)
    assert statistic.value == pytest.approx(np.mean([hits[label == c].mean() for c in (0, 1, 3)]))
    for w, found in zip(weights, statistic(weights)):
        drawn = [
            naive.repeated(hits[label == c], range(sum(label == c)), w[label == c])
            for c in (0, 1, 3)
        ]
        assert found == pytest.approx(np.mean([np.mean(d) for d in drawn if d]))


def test_mean_average_precision_with_ties_and_an_empty_class():
    rng = np.random.default_rng(2)
    scores, right = rng.integers(0, 4, (12, 4)).astype(float), rng.random((12, 4)) < 0.4
    right[:, 2] = False
    statistic = MeanAveragePrecision(scores, right)
    expected = [naive.average_precision(scores[:, c], right[:, c]) for c in (0, 1, 3)]
    assert statistic.value == pytest.approx(np.mean(expected))
    assert statistic.queries == 3


def test_mean_average_precision_of_a_resample_counts_copies_at_one_place(weights):
    # Copies of a picture have one score: precision is that at the score, as scikit-learn has it.
    rng = np.random.default_rng(2)
    scores, right = rng.random((12, 3)), rng.random((12, 3)) < 0.4
    statistic = MeanAveragePrecision(scores, right)
    for w, found in zip(weights, statistic(weights)):
        each = [
            average_precision_score(right[:, c], scores[:, c], sample_weight=w)
            for c in range(3)
            if w @ right[:, c] > 0
        ]
        assert found == pytest.approx(np.mean(each))


def test_captions_stay_with_their_picture():
    # Two hits or two misses a picture: the interval is that of 200 pictures, not of 400 queries.
    hits = np.repeat(np.tile([0.0, 1.0], 100), 2)
    measure = Measure("R@1", Mean(hits, np.repeat(np.arange(200), 2), 200), 0.005)
    (found,) = intervals([measure], 2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)


@pytest.mark.parametrize("gains", [[1, 1, -1, 0], [2, -1, 3, 0, -5, 1], [0, 0], [1] * 9])
def test_mcnemar_equals_enumeration(gains):
    assert mcnemar_by_picture(np.array(gains, float)) == pytest.approx(naive.swap_test(gains))


def test_mcnemar_of_one_query_a_picture_is_the_textbook_test():
    gains = np.array([1] * 31 + [-1] * 14 + [0] * 200, float)
    assert mcnemar_by_picture(gains) == pytest.approx(binomtest(31, 45).pvalue)


def test_power_of_the_textbook():
    # Student's t with 10 degrees of freedom: noncentral, two-sided (Cohen 1988, d = 1, n = 11).
    assert power(11**0.5, 1.0, 10.0) == pytest.approx(0.853, abs=0.01)
    assert power(detectable(0.7, 5.0), 0.7, 5.0) == pytest.approx(0.8)
    assert power(0.0, 1.0) == pytest.approx(0.05)
    assert power(1.0, 0.0) == 1.0


@pytest.mark.parametrize("captions", [1, 5])
def test_power_of_mcnemar_is_the_share_of_samples_that_it_finds(captions):
    rng, gains = np.random.default_rng(4), []
    for _ in range(400):
        own = rng.normal(0, 1, (2, 60, 1)) + rng.normal(0, 0.7, (2, 60, captions))
        hits = own + np.array([0.4, 0.0])[:, None, None] > 0
        gains.append((hits[0].sum(1) - hits[1].sum(1)).astype(float))
    queries = 60 * captions
    effect = np.mean([g.sum() / queries for g in gains])
    found = np.mean([mcnemar_by_picture(g) <= 0.05 for g in gains])
    stated = np.mean([mcnemar_power(effect, g, queries) for g in gains])
    assert found == pytest.approx(stated, abs=0.06)
    assert mcnemar_power(mcnemar_detectable(gains[0], queries), gains[0], queries) == pytest.approx(
        0.8, abs=0.01
    )


def test_what_too_few_pictures_can_tell():
    """Five pictures never reach p = .05: 2 / 2**5 = .0625. No discordant one is no certainty."""
    assert mcnemar_power(1.0, np.ones(5), 5) == 0
    assert mcnemar_detectable(np.zeros(5), 5) is None
    assert 0.2 < mcnemar_detectable(np.zeros(20), 20) < 0.5
    picture = np.arange(10)
    hits = [Measure("R@1", Mean(np.full(10, h), picture, 10), 0.1, hits=True) for h in (1.0, 0.0)]
    all_, none = intervals(hits, 200)
    clopper = binomtest(10, 10).proportion_ci(method="exact")
    assert (all_.low, all_.high) == pytest.approx((clopper.low, 1))
    assert (none.low, none.high) == pytest.approx((0, 1 - clopper.low))
    means = [Measure("rank", Mean(np.full(10, 3.0), picture, 10), 5.0, percent=False)] * 2
    same = compare(means[:1], means[1:], paired=False, effect=1.0, draws=100)
    assert (same.power, same.detectable) == (None, None)


@pytest.mark.parametrize("seeds", [3, 6])
def test_one_checkpoint_against_several_varies_as_they_do(seeds):
    """Under the null with much spread over seeds, p <= .05 in about 5 % of cases."""
    rng, rejected, runs = np.random.default_rng(9), 0, 150
    for _ in range(runs):
        (one, *_), many = models(rng, seeds, 0.0, 0.4, pictures=150)
        found = compare([one], many, paired=False, effect=0.02, draws=100)
        rejected += found.p <= 0.05
        assert found.verdict == "descriptive"
    assert rejected / runs < 0.12


def models(rng, seeds: int, gap: float, seed_sd: float, pictures: int = 400) -> list[list[Measure]]:
    """Two arms of models that hit pictures of equal difficulty; captions of a picture agree."""
    easy, arms = rng.normal(0, 1, pictures), []
    picture = np.repeat(np.arange(pictures), 3)
    taste = rng.normal(0, 0.7, (2, pictures))  # what each recipe likes about a picture
    for arm, shift in enumerate((gap, 0.0)):
        level = shift + rng.normal(0, seed_sd, seeds)
        own = rng.normal(0, 0.7, (seeds, pictures))
        score = np.repeat(easy + taste[arm] + own + level[:, None], 3, axis=1)
        hits = (score + rng.normal(0, 0.5, score.shape) > 0).astype(float)
        arms.append([Measure("R@1", Mean(h, picture, pictures), 0.0, hits=True) for h in hits])
    return arms


def simulate(runs: int, seeds: int, gap: float, seed_sd: float, pictures: int = 400):
    """Of all runs: how often the difference is cleared of 0, and the power they state."""
    rng, clear, stated, values = np.random.default_rng(7), 0, [], []
    for _ in range(runs):
        first, second = models(rng, seeds, gap, seed_sd, pictures)
        found = compare(first, second, paired=False, effect=0.02, draws=300)
        clear += not found.low <= 0 <= found.high
        stated.append(found.power)
        values.append(found.value)
    return clear / runs, float(np.mean(stated)), float(np.mean(values))


@pytest.mark.slow
@pytest.mark.parametrize("seeds, seed_sd", [(1, 0.0), (6, 0.1)])
def test_a_null_difference_is_called_null(seeds, seed_sd):
    """One model a side over pictures; six over seeds and pictures. 1 000 simulations each."""
    rejected, _, _ = simulate(1000, seeds, 0.0, seed_sd)
    print(f"{seeds} seed(s): null called null in {100 * (1 - rejected):.1f} %")
    assert 0.03 <= rejected <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("seeds, seed_sd", [(1, 0.0), (6, 0.02)])
def test_a_planted_difference_is_found_as_often_as_the_power_says(seeds, seed_sd):
    found, stated, value = simulate(400, seeds, 0.075, seed_sd, pictures=3000)
    assert value == pytest.approx(0.02, abs=0.003)  # a gap of 0.075 is two points of R@1
    print(
        f"{seeds} seed(s): {100 * value:.2f} points found in {100 * found:.1f} %, "
        f"stated {100 * stated:.1f} %"
    )
    assert found == pytest.approx(stated, abs=0.08)


def test_words_follow_intervals_and_seeds():
    rng = np.random.default_rng(3)
    far = models(rng, 6, 1.0, 0.0)
    assert compare(*far, paired=False, effect=0.02, draws=200).verdict == "better"
    assert compare(*far[::-1], paired=False, effect=0.02, draws=200).verdict == "worse"
    few = [arm[:3] for arm in far]
    assert compare(*few, paired=True, effect=0.02, draws=200).verdict == "descriptive"
    one = compare(far[0][:1], far[1][:1], paired=True, effect=0.02, draws=200)
    assert one.verdict == "this checkpoint is better; of the recipes: descriptive"
    assert one.test == "McNemar by picture" and one.p < 1e-6
    same = compare(far[0], far[0], paired=True, effect=0.02, draws=200)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert same.verdict == "no difference shown"
    assert least_p((3, 3), True) == 0.25 and least_p((4, 4), False) < 0.05


def test_the_interval_of_average_precision_holds_its_value():
    """Drawn pictures come in copies that rank together: uncorrected, chance lies below."""
    rng = np.random.default_rng(5)
    scores, right = rng.random((120, 20)), rng.random((120, 20)) < 0.05
    (found,) = intervals([Measure("mAP", MeanAveragePrecision(scores, right), 0.05)], 300)
    assert found.low < found.value < found.high


def test_better_is_said_of_what_holm_leaves_alone():
    """One row of many at p = .03: different alone, and no more is claimed."""
    rng = np.random.default_rng(1)
    picture, base = np.arange(200), rng.random(200) < 0.5
    worse = base.copy()
    worse[np.flatnonzero(base)[:6]] = False  # six to none: p = .031
    arms = [
        [
            Measure(f"row {k}", Mean(hits.astype(float), picture, 200), 0.0, hits=True)
            for k, hits in enumerate([first, *[base] * 9])
        ]
        for first in (base, worse)
    ]
    results = [[[Result("toy", {"name": "toy"}, arm)]] for arm in arms]
    rows = differences_of(*results, paired=False, effect=2.0, draws=200)
    assert rows[0]["p"] == pytest.approx(0.03125) and rows[0]["p_holm"] == pytest.approx(0.3125)
    said = "not after Holm; of the recipes: descriptive"
    assert rows[0]["verdict"] == said
    lines = difference_lines(rows)
    assert lines[0].index("verdict") == lines[1].index(said) and "McNemar" in lines[-1]


def test_too_few_draws_are_named_where_they_decide():
    """The least p of a bootstrap is 2 / (draws + 1): of ten rows none can pass Holm with 100."""
    rng = np.random.default_rng(1)
    picture, low = np.arange(200), rng.random(200)
    arms = [
        [Measure(f"row {k}", Mean(values, picture, 200), 0.0) for k in range(10)]
        for values in (low + 1, low)
    ]
    results = [[[Result("toy", {"name": "toy"}, arm)]] for arm in arms]
    few, enough = (
        differences_of(*results, paired=False, effect=2.0, draws=draws)[0] for draws in (100, 999)
    )
    assert few["p"] == few["least_p"] == pytest.approx(2 / 101)
    assert few["verdict"] == "not told by so few --bootstrap draws; of the recipes: descriptive"
    assert enough["verdict"] == "this checkpoint is better; of the recipes: descriptive"


def test_the_bound_of_all_hits_is_the_least_mean_that_allows_them():
    """By search over two classes' shares with p^a q^b = level."""
    for a, b in ((3, 9), (1, 30), (4, 4)):
        p = np.linspace(0.025 ** (1 / a), 1, 20001)
        q = np.minimum(1, (0.025 / p**a) ** (1 / b))
        assert all_hit_bound(np.array([a, b]), 0.025) == pytest.approx(
            ((p + q) / 2).min(), abs=1e-4
        )
    hits, label = np.ones(12), np.repeat([0, 1], [3, 9])
    (found,) = intervals([Measure("per class", ClassMean(hits, label), 0.5)], 200)
    assert (found.value, found.high) == (1, 1) and 0.5 < found.low < 0.025 ** (1 / 12)


def test_rounding_is_no_spread_over_seeds():
    """Equal values, averaged over 3 and over 5 models, differ by rounding alone."""
    hits, picture = (np.random.default_rng(0).random(21) < 0.8).astype(float), np.arange(21)
    arms = [[Measure("R@1", Mean(hits, picture, 21), 0.0, hits=True)] * k for k in (3, 5)]
    found = compare(*arms, paired=False, effect=0.02, draws=200)
    assert (found.value, found.low, found.high, found.p, found.power) == (0, 0, 0, 1, None)


def test_what_seeds_alone_would_allow_stands_beside_t():
    rng = np.random.default_rng(3)
    found = compare(*models(rng, 4, 1.0, 0.0), paired=False, effect=0.02, draws=200)
    assert found.p < found.least_p == pytest.approx(2 / 70)
    assert found.freedom is None or found.freedom > 2


def test_models_that_differ_by_rounding_alone_do_not_differ():
    values = np.random.default_rng(0).random(60)
    one, other = (
        [Measure("excess", Mean(v, np.arange(60), 60), 0.0)] for v in (values, values + 1e-16)
    )
    found = compare(one, other, True, 0.02, 199)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert "no difference shown" in found.verdict
