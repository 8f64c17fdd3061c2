import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import stats as reference

from interp.grounding.metrics import PairScores, excess
from interp.heads import Head
from interp.stats.draws import Purpose, generator
from interp.stats.intervals import (
    excess_interval,
    head_blocks,
    influence_values,
    interval_of,
    mean_interval,
    rank_stability,
    ratio_interval,
    simultaneous_band,
)
from interp.stats.multiplicity import holm, max_t, mcnemar, sign_flip_test
from interp.stats.pairing import pairing_draws, pairing_test
from interp.stats.selection import best_heads, champion, judge
from interp.stats.splits import assign_split, groups, strata, strata_by_split

N, L, H, P = 24, 2, 3, 6


@pytest.fixture
def pairs() -> PairScores:
    rng = np.random.default_rng(0)
    coverage = rng.random((N, P)) * (rng.random((N, P)) < 0.6)
    valid = np.where(rng.random((N, P)) < 0.2, 0.5, 1.0)
    logits = rng.normal(size=(N, L, H, P))
    logits[:, 1, 2] += 2 * coverage
    maps = np.exp(logits)
    maps[:, 0, 1] = maps[0, 0, 1]  # one head never moves
    return PairScores((maps / maps.sum(-1, keepdims=True)).astype(np.float16), coverage, valid)


@pytest.fixture
def stratum() -> np.ndarray:
    labels = np.repeat([0, 1, 2, -1], [8, 7, 7, 2])
    return np.random.default_rng(1).permutation(labels)


def test_split_shares_and_independence_of_the_salt() -> None:
    keys = [f"{k:012d}" for k in range(20_000)]
    split = np.array([assign_split(key) for key in keys])
    shares = [np.mean(split == name) for name in ("discovery", "validation", "confirm")]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    other = np.array([assign_split(key, "other") for key in keys])
    assert np.mean(split == other) == pytest.approx(0.25 + 0.09 + 0.04, abs=0.015)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 150).flatmap(
        lambda n: st.tuples(arrays(float, n, elements=st.floats(0, 1, width=16)), arrays(bool, n))
    )
)
def test_strata_are_large_enough_and_in_order(images) -> None:
    area, portrait = images
    labels = strata(area, portrait)
    sizes = np.bincount(labels)
    assert len(sizes) <= 8
    if len(area) < 40:
        assert len(sizes) == 1
    else:
        assert sizes.min() >= 10
    for side in (False, True):  # a stratum is a run of neighbouring coverages
        one = labels[portrait == side][np.argsort(area[portrait == side], kind="stable")]
        assert np.count_nonzero(np.diff(one)) <= len(np.unique(one)) - (len(one) > 0)


def test_strata_are_quartiles_by_orientation() -> None:
    area = np.tile(np.linspace(0, 1, 80), 2)
    portrait = np.repeat([True, False], 80)
    labels = strata(area, portrait)
    assert np.bincount(labels).tolist() == [20] * 8
    assert len(np.unique(strata(area, np.zeros(160, bool)))) == 4  # a constant factor drops out
    assert len(np.unique(strata(np.full(160, 0.3), portrait))) == 2
    few = np.arange(160) < 6  # six portraits cannot stand alone
    assert len(np.unique(strata(area, few))) == 4


def test_padding_is_never_exchanged() -> None:
    rng = np.random.default_rng(0)
    padding = ["none"] * 60 + ["sides"] * 30 + ["odd"] * 4
    labels = strata(rng.random(94), rng.random(94) < 0.5, padding=padding)
    first, second = set(labels[:60]), set(labels[60:90])
    assert not first & second and len(second) == 1
    assert (labels[90:] == -1).all()


def test_strata_stay_within_a_split() -> None:
    rng = np.random.default_rng(0)
    split = rng.choice(["discovery", "validation", "confirm"], 300)
    labels = strata_by_split(split, rng.random(300), rng.random(300) < 0.5)
    assert (labels[split == "confirm"] == -1).all()
    assert not set(labels[split == "discovery"]) & set(labels[split == "validation"])
    assert min(len(rows) for rows in groups(labels)) >= 10
    assert sum(len(rows) for rows in groups(labels)) == (split != "confirm").sum()


def test_draws_depend_on_seed_purpose_and_stream_alone() -> None:
    def draw(*key) -> int:
        return int(generator(*key).integers(2**62))

    assert draw(1, Purpose.PAIRING, 2) == draw(1, Purpose.PAIRING, 2)
    keys = [(0, Purpose.PAIRING), (1, Purpose.PAIRING), (0, Purpose.BOOTSTRAP)]
    assert len({draw(*key, stream) for key in keys for stream in range(3)}) == 9


def test_pairing_test_equals_loops(pairs, stratum) -> None:
    members = groups(stratum)
    drawn = [pairing_draws(len(rows), 60, 3, s) for s, rows in enumerate(members)]
    assert all((np.sort(d, axis=1) == np.arange(d.shape[1])).all() for d in drawn)
    order = np.concatenate(members)
    (_, scores) = next(pairs.blocks(np.arange(N)))
    place = [np.flatnonzero(np.isin(order, rows)) for rows in members]
    expected = reference.pairing_test(
        scores[np.ix_(order, order)], place, [[d[b] for d in drawn] for b in range(61)]
    )
    result = pairing_test(pairs, stratum, draws=60, seed=3)
    for got, want in zip((result.mean, result.t, result.p, result.p_adjusted), expected):
        np.testing.assert_allclose(got.ravel(), want, atol=1e-9)
    assert result.n == 22 and result.p_adjusted[1, 2] == pytest.approx(1 / 61)
    own = np.nanmean(excess(pairs, stratum), axis=0)
    np.testing.assert_allclose(result.mean, own, atol=1e-12)


def test_a_head_that_never_moves_is_not_rejected(pairs, stratum) -> None:
    result = pairing_test(pairs, stratum, draws=99)
    assert result.t[0, 1] == 0 and result.p[0, 1] == 1 and result.p_adjusted[0, 1] == 1
    assert result.mean[0, 1] == pytest.approx(0, abs=1e-12)


def test_pairing_does_not_depend_on_blocks(pairs, stratum, monkeypatch) -> None:
    whole = pairing_test(pairs, stratum, draws=99)
    monkeypatch.setattr("interp.grounding.metrics._BLOCK", 100)
    monkeypatch.setattr("interp.stats.pairing._BLOCK", 100)
    parts = pairing_test(pairs, stratum, draws=99)
    np.testing.assert_array_equal(whole.p_adjusted, parts.p_adjusted)
    np.testing.assert_allclose(whole.t, parts.t)
    again = pairing_test(pairs, stratum, draws=99, seed=1)
    assert not np.array_equal(again.p, whole.p)


def test_max_t_by_hand() -> None:
    t = np.array([[3.0, 1.0, 2.0], [1, 0, 0], [0, 4, 0], [0, 2, 0]])
    p, adjusted = max_t(t)
    np.testing.assert_allclose(p, [1 / 4, 3 / 4, 1 / 4])
    # Heads by falling T: 0, 2, 1. Maxima over all of them 3, 1, 4, 2; over {2, 1} 2, 0, 4, 2.
    np.testing.assert_allclose(adjusted, [2 / 4, 3 / 4, 3 / 4])


def test_holm_equals_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.array([0.04, 0.001, 0.3, 0.02, 0.9])
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_influence_values_have_the_mean_of_the_excess(pairs, stratum) -> None:
    values, own = influence_values(pairs, stratum), excess(pairs, stratum)
    np.testing.assert_allclose(np.nanmean(values, 0), np.nanmean(own, 0), atol=1e-12)
    assert np.array_equal(np.isnan(values), np.isnan(own))


def test_excess_interval_and_the_difference_of_two_heads(pairs, stratum) -> None:
    own = np.nanmean(excess(pairs, stratum), axis=0)
    strong, weak = (head_blocks(pairs.select([head]), stratum) for head in (Head(1, 2), Head(0, 0)))
    interval = excess_interval(strong, 999)
    assert interval.estimate == pytest.approx(own[1, 2]) and interval.n == 22
    assert interval.low < own[1, 2] < interval.high
    paired = excess_interval([a - b for a, b in zip(strong, weak)], 999)
    assert paired.estimate == pytest.approx(own[1, 2] - own[0, 0])
    nothing = excess_interval([a - a for a in strong], 99)
    assert (nothing.low, nothing.estimate, nothing.high) == (0, 0, 0)
    with pytest.raises(AssertionError, match="one head"):
        head_blocks(pairs, stratum)


@pytest.mark.parametrize("pictures", [48, 100, 297])
def test_an_interval_that_ends_at_0_lies_on_neither_side(pictures: int) -> None:
    values = np.zeros(pictures)
    values[0] = -1  # many a resample holds it not, and is 0 but for rounding
    assert mean_interval(values).high == 0


def test_heads_that_see_nothing_lie_on_neither_side_of_their_band() -> None:
    seeing = np.random.default_rng(0).normal(size=(200, 1))
    blind = np.full((200, 4), [1e-17, -1e-17, 3e-17, 0.0])  # the same map for every picture
    band = simultaneous_band(np.hstack([seeing, blind]), np.zeros(200, int), draws=199)
    assert not (band.low[1:] > 0).any() and not (band.high[1:] < 0).any()
    assert band.low[0] < band.high[0]


def test_mean_interval_has_the_textbook_width() -> None:
    values = np.random.default_rng(0).normal(2, 1, 400)
    interval = mean_interval(values)
    error = values.std(ddof=1) / 20
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.03)
    holes = mean_interval(np.append(values, np.nan))
    assert holes.n == 400 and holes == interval


def test_stratified_interval_ignores_differences_between_strata() -> None:
    rng = np.random.default_rng(0)
    stratum = np.arange(200) % 2
    values = rng.normal(size=200) + 10 * stratum
    inside = np.mean([values[stratum == s].var(ddof=1) for s in (0, 1)])
    interval = mean_interval(values, stratum)
    width = (interval.high - interval.low) / (2 * 1.96 * np.sqrt(inside / 200))
    assert width == pytest.approx(1, abs=0.03)


def test_ratio_interval_is_that_of_means() -> None:
    rng = np.random.default_rng(0)
    area = rng.uniform(0.1, 0.3, 300)
    mass = 3 * area + rng.normal(0, 0.05, 300)
    interval = ratio_interval(mass, area)
    assert interval.estimate == pytest.approx(mass.mean() / area.mean())
    error = (mass - interval.estimate * area).std() / area.mean() / np.sqrt(300)
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    difference = interval_of(
        lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 1],
        np.stack([mass, area, mass], axis=1),
    )
    assert (difference.low, difference.high) == (0, 0)


def test_band_is_wider_than_a_pointwise_interval_and_shuts_on_constants() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1, 1, (200, 5, 4))
    values[:, 0, 0] = 7
    band = simultaneous_band(values, np.zeros(200, int))
    assert band.low.shape == (5, 4) and band.n == 200
    assert 2.8 < band.critical < 3.3  # normal quantile of 19 independent heads: 3.0
    assert (band.low[0, 0], band.high[0, 0]) == (7, 7)
    expected = 2 * band.critical * values[:, 1:].std(axis=0, ddof=1) / np.sqrt(200)
    np.testing.assert_allclose((band.high - band.low)[1:], expected)


def test_rank_stability() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (100, 8))
    values[:, 3] += 2
    first, among = rank_stability(values, np.zeros(100, int), top=2)
    assert first[3] == 1 and first.sum() == pytest.approx(1)
    assert among[3] == 1 and among.sum() == pytest.approx(2)


def test_sign_flips() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 1, (80, 2, 5))
    effects[:, 0, 3] += 0.7
    effects[:, 1, 1] -= 0.7
    effects[:, 1, 4] = 0
    one, two = (sign_flip_test(effects, two_sided=s, draws=999) for s in (False, True))
    assert one.p_adjusted[0, 3] == two.p_adjusted[0, 3] == pytest.approx(0.001)
    assert one.p_adjusted[1, 1] == 1 and two.p_adjusted[1, 1] == pytest.approx(0.001)
    assert one.t[1, 4] == 0 and two.p[1, 4] == 1
    exact = np.array([[1.0], [2.0], [3.0]])  # all signs agree in one of eight flips
    assert sign_flip_test(exact, draws=20_000).p[0] == pytest.approx(1 / 8, abs=0.01)


def test_mcnemar_is_the_binomial_of_discordant_images() -> None:
    first = np.array([True] * 9 + [False] + [True] * 5)
    second = np.array([False] * 9 + [True] + [True] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar(first, first) == 1.0


def test_champion_ties_go_to_the_lower_layer_then_index() -> None:
    mean = np.array([[0.1, 0.4, 0.2], [0.4, 0.4, 0.3]])
    assert champion(mean) == Head(0, 1)
    assert best_heads(mean, 4) == (Head(0, 1), Head(1, 0), Head(1, 1), Head(1, 2))


def test_the_judge_never_looks_at_confirm(pairs) -> None:
    split = np.array(["discovery", "validation", "confirm"])[np.arange(N) % 3]
    stratum = strata_by_split(split, pairs.coverage.mean(1), np.zeros(N, bool))
    verdict = judge(pairs, split, stratum, draws=99)
    blank = PairScores(*(x.copy() for x in (pairs.maps, pairs.coverage, pairs.valid)))
    blank.maps[split == "confirm"] = np.nan
    again = judge(blank, split, stratum, draws=99)
    assert verdict.top == again.top and verdict.validation == again.validation
    np.testing.assert_array_equal(verdict.p, again.p)
    assert verdict.champion == Head(1, 2) and verdict.discovery.n == verdict.validation[0].n == 8
    assert (verdict.p_holm >= verdict.p).all() and verdict.band.low.shape == (L, H)
    assert verdict.p_top[1, 2] >= verdict.p_first[1, 2] > 0.5
