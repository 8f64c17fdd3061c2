import numpy as np
import pytest
from reference import metrics as reference

from interp.analysis import _pointing_chance
from interp.grounding import baselines, metrics
from interp.grounding.metrics import PairScores
from interp.heads import Head

N, L, H, P = 12, 2, 3, 9


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Maps with ties and zeros, boxes with ignored parts, two strata and one image in none."""
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 6, (N, L, H, P)) + 0.0
    maps[..., 0] += 1
    maps = (maps / maps.sum(axis=-1, keepdims=True)).astype(np.float16)
    coverage = rng.random((N, P)) * (rng.random((N, P)) < 0.5)
    coverage[3] = 0
    coverage[4] = 0.99
    valid = np.where(rng.random((N, P)) < 0.3, rng.random((N, P)), 1.0)
    valid[5, 2] = 0
    stratum = np.array([0] * 6 + [1] * 5 + [-1])
    return maps, coverage.astype(np.float32), valid.astype(np.float32), stratum


def by_head(function, maps, *others) -> np.ndarray:
    values = [
        function(maps[i, lay, h], *(o[i] for o in others)) for i, lay, h in np.ndindex(N, L, H)
    ]
    return np.array(values).reshape(N, L, H)


@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (metrics.in_box_mass, reference.score),
        (metrics.normalised_mass, reference.normalised_mass),
        (metrics.patch_auroc, reference.auroc),
    ],
)
def test_metrics_equal_loops(data, fast, slow) -> None:
    maps, coverage, valid, _ = data
    np.testing.assert_allclose(
        fast(maps, coverage, valid), by_head(slow, maps, coverage, valid), atol=1e-6
    )


def test_pointing_equals_loops_and_shares_ties(data) -> None:
    maps, coverage, valid, _ = data
    hits = coverage > 0.5
    got = metrics.pointing(maps, hits, valid)
    np.testing.assert_allclose(got, by_head(reference.pointing, maps, hits, valid))
    assert ((got > 0) & (got < 1)).any()


def test_undefined_scores_are_nan(data) -> None:
    maps, coverage, valid, _ = data
    auroc = metrics.patch_auroc(maps, coverage, valid)
    assert np.isnan(auroc[3]).all() and np.isfinite(auroc[[0, 4]]).all()
    normalised = metrics.normalised_mass(maps, coverage, valid)
    assert np.isnan(normalised[4]).all() and np.isfinite(normalised[0]).all()


def test_excess_equals_loops(data) -> None:
    maps, coverage, valid, stratum = data
    got = metrics.excess(PairScores(maps, coverage, valid), stratum)
    for lay, h in np.ndindex(L, H):
        inside = slice(0, 11)
        expected = reference.excess(
            maps[inside, lay, h], coverage[inside], valid[inside], stratum[inside]
        )
        np.testing.assert_allclose(got[inside, lay, h], expected, atol=1e-6)
    assert np.isnan(got[11]).all()


def test_pair_scores_move_boxes_and_ignored_regions_together(data) -> None:
    maps, coverage, valid, _ = data
    pairs = PairScores(maps, coverage, valid)
    rows = np.array([7, 2, 5])
    for heads, scores in pairs.blocks(rows):
        flat = maps.reshape(N, L * H, P)[rows, heads]
        for i, j, h in np.ndindex(scores.shape):
            k = rows[j]
            assert scores[i, j, h] == pytest.approx(
                reference.score(flat[i, h], coverage[k], valid[k]), abs=1e-6
            )
    chosen = pairs.select([Head(1, 2), Head(0, 1)])
    np.testing.assert_array_equal(chosen.maps, np.stack([maps[:, 1, 2], maps[:, 0, 1]], axis=1))


def test_small_blocks_give_the_same_scores(data, monkeypatch) -> None:
    maps, coverage, valid, stratum = data
    pairs = PairScores(maps, coverage, valid)
    whole = metrics.excess(pairs, stratum)
    monkeypatch.setattr(metrics, "_BLOCK", 80)
    assert sum(1 for _ in pairs.blocks(np.arange(6))) == 3
    np.testing.assert_allclose(metrics.excess(pairs, stratum), whole, atol=1e-12)


def test_attention_on_ignored_patches_alone_scores_zero() -> None:
    maps = np.array([[[1.0, 0.0]]])
    coverage, valid = np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])
    assert metrics.in_box_mass(maps, coverage, valid) == 0
    assert metrics.pointing(maps, coverage > 0.5, valid) == 1  # only the second may be pointed at


def test_uniform_attention_is_chance(data) -> None:
    _, coverage, valid, stratum = data
    maps = np.broadcast_to(baselines.uniform(P), (N, 1, P))
    np.testing.assert_allclose(
        metrics.in_box_mass(maps, coverage, valid)[:, 0], metrics.area(coverage, valid)
    )
    auroc = metrics.patch_auroc(maps, coverage, valid)
    np.testing.assert_allclose(auroc[~np.isnan(auroc)], 0.5)
    excess = metrics.excess(PairScores(maps, coverage, valid), stratum)
    np.testing.assert_allclose(excess[:11], 0, atol=1e-12)


def test_category_mean_weighs_categories_not_images() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    assert metrics.category_mean(values, ["cat", "cat", "cat", "dog"]) == 0.5


def test_legacy_mass_is_the_mass_on_centres() -> None:
    maps = np.array([[[0.5, 0.25, 0.25]]])
    assert metrics.legacy_mass(maps, np.array([[True, False, True]])) == 0.75


def test_best_fixed_patch_is_the_one_most_often_covered(data) -> None:
    _, coverage, valid, _ = data
    best = baselines.best_fixed_patch(coverage, valid)
    scores = [
        np.mean([reference.score(np.eye(P)[p], coverage[i], valid[i]) for i in range(N)])
        for p in range(P)
    ]
    assert best.argmax() == np.argmax(scores) and best.sum() == 1


def test_saliency_finds_the_odd_patch() -> None:
    pixels = np.full((3, 6, 6), 100, np.uint8)
    pixels[:, 2:4, 4:6] = 200  # patch (1, 2) of a 3 x 3 grid, flat inside
    pixels[0, 0, 0] = 130  # a speck in patch 0
    distance = baselines.mean_colour_distance(pixels, (3, 3))
    assert distance.argmax() == baselines.colour_distance(pixels, (3, 3)).argmax() == 5
    contrast = baselines.patch_contrast(pixels, (3, 3))
    assert contrast.argmax() == 0 and contrast[5] == 0
    mean = pixels.reshape(3, -1).mean(axis=1)
    raw = np.linalg.norm(pixels.astype(float) - mean[:, None, None], axis=0)
    patches = np.array([raw[r : r + 2, c : c + 2].mean() for r in (0, 2, 4) for c in (0, 2, 4)])
    np.testing.assert_allclose(
        baselines.colour_distance(pixels, (3, 3)), patches / patches.sum(), atol=1e-12
    )
    flat = baselines.colour_distance(np.full((3, 6, 6), 7, np.uint8), (3, 3))
    np.testing.assert_allclose(flat, 1 / 9)


def test_sharpening_reaches_an_entropy(data) -> None:
    maps = data[0][:, 0, 0].astype(np.float64) + 0.01
    power = baselines.power_at_entropy(maps, 1.2)
    assert baselines.entropy(baselines.sharpen(maps, power)).mean() == pytest.approx(1.2, abs=1e-6)
    np.testing.assert_allclose(baselines.entropy(baselines.uniform(P)[None]), np.log(P))
    ends = [baselines.power_at_entropy(maps, target) for target in (5.0, -1.0)]
    assert ends == pytest.approx([2**-8, 2**8])


def test_best_power_sharpens_a_map_that_knows_the_object_and_not_its_opposite() -> None:
    rng = np.random.default_rng(1)
    coverage = np.eye(9)[rng.integers(0, 9, 60)]
    maps = 0.5 + 0.2 * coverage + 0.1 * rng.random(coverage.shape)
    flat = np.zeros(60, np.int64)
    assert baselines.best_power(maps, coverage, np.ones_like(maps), flat) >= 16
    assert baselines.best_power(1 / maps, coverage, np.ones_like(maps), flat) == 1


def test_centre_gaussian_has_its_width() -> None:
    prior = baselines.centre_gaussian((4, 8)).reshape(4, 8)
    np.testing.assert_allclose(prior, prior[::-1, ::-1])
    assert prior[0, 3] / prior[1, 3] == pytest.approx(np.exp(-(0.375**2 - 0.125**2) / 0.125))


def test_the_chance_of_pointing_is_that_of_a_patch_that_may_be_pointed_at() -> None:
    hits = np.array([[True, True, False, False], [True, False, False, False]])
    valid = np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert _pointing_chance(hits, valid) == (1 + 1 / 4) / 2
    for shape in range(2):  # every patch in its turn the strongest
        turns = np.eye(4)[valid[shape] > 0]
        rows = (np.repeat(a[shape : shape + 1], len(turns), 0) for a in (hits, valid))
        shares = metrics.pointing(turns, *rows)
        assert shares.mean() == _pointing_chance(hits[shape : shape + 1], valid[shape : shape + 1])
