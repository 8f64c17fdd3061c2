import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.stats import raster_coverage

from interp.grounding.coverage import (
    category_coverage,
    centre_rule,
    patch_coverage,
    pointing_hits,
)

SIZE, FINE = 24, 8

# Edges on the raster's lines, in and outside of the picture, so that rasterising is exact.
edge = st.integers(-4 * FINE, (SIZE + 4) * FINE).map(lambda k: k / FINE)
span = st.tuples(edge, edge).map(sorted)
box = st.tuples(span, span).map(lambda b: (b[0][0], b[1][0], b[0][1], b[1][1]))
annotation = st.tuples(box, st.booleans(), st.sampled_from([0.1, 0.25, 1.0]))
grids = st.sampled_from([(1, 1), (3, 3), (2, 4), (6, 3), (8, 8)])
inner = st.tuples(*[st.integers(k, k + 8).map(float) for k in (0, 0, 16, 16)])


def arrays(annotations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes, crowd, kept = zip(*annotations) if annotations else ((), (), ())
    return (
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(crowd, bool),
        np.array(kept, np.float64),
    )


def cut(boxes, area):
    """Boxes cut to the photograph."""
    left, top, right, bottom = area
    return [
        (
            min(max(b[0], left), right),
            min(max(b[1], top), bottom),
            min(max(b[2], left), right),
            min(max(b[3], top), bottom),
        )
        for b in boxes
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(annotation, max_size=7), grids, st.one_of(st.none(), inner))
def test_areas_equal_a_raster(annotations, grid, area) -> None:
    xyxy, crowd, kept = arrays(annotations)
    coverage, valid = patch_coverage(xyxy, crowd, kept, SIZE, grid, area)
    photo = area or (0, 0, SIZE, SIZE)
    target = ~crowd & (kept >= 0.25)
    objects, ignored = cut(xyxy[target], photo), cut(xyxy[~target], photo)
    left, top, right, bottom = photo
    ignored += [(0, 0, SIZE, top), (0, bottom, SIZE, SIZE), (0, 0, left, SIZE)]
    ignored += [(right, 0, SIZE, SIZE)]
    expected = raster_coverage(objects, ignored, SIZE, grid, FINE)
    np.testing.assert_allclose(coverage, expected[0], atol=1e-9)
    np.testing.assert_allclose(valid, expected[1], atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-5, 30)] * 4), min_size=1, max_size=6), grids)
def test_area_is_conserved_and_order_does_not_matter(boxes, grid) -> None:
    xyxy = np.sort(np.array(boxes).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    crowd, kept = np.zeros(len(xyxy), bool), np.ones(len(xyxy))
    coverage, valid = patch_coverage(xyxy, crowd, kept, SIZE, grid)
    whole, _ = patch_coverage(xyxy, crowd, kept, SIZE, (1, 1))
    again, _ = patch_coverage(xyxy[::-1], crowd, kept, SIZE, grid)
    assert coverage.mean() == pytest.approx(whole[0], abs=1e-9)
    assert np.array_equal(valid, np.ones(grid[0] * grid[1]))
    np.testing.assert_allclose(coverage, again, atol=1e-12)


def test_score_is_object_mass_over_mass_not_ignored() -> None:
    """One patch: object on the left quarter, crowd on the left half; a second patch is free."""
    xyxy = np.array([[0, 0, 1, 4], [0, 0, 2, 4]], float)
    crowd, kept = np.array([False, True]), np.ones(2)
    coverage, valid = patch_coverage(xyxy, crowd, kept, 4, (1, 1))
    assert valid.tolist() == [0.75] and coverage.tolist() == [1 / 3]
    xyxy[:, 2] *= 2
    coverage, valid = patch_coverage(xyxy, crowd, kept, 4, (1, 2))
    np.testing.assert_allclose(valid, [1, 0.0])
    np.testing.assert_allclose(coverage, [1, 0.0])


def test_a_little_left_of_an_object_is_ignored_not_a_target() -> None:
    xyxy, crowd = np.array([[0, 0, 2, 4.0]]), np.zeros(1, bool)
    coverage, valid = patch_coverage(xyxy, crowd, np.array([0.24]), 4, (1, 2))
    assert coverage.tolist() == [0, 0] and valid.tolist() == [0, 1]
    coverage, valid = patch_coverage(xyxy, crowd, np.array([0.25]), 4, (1, 2))
    assert coverage.tolist() == [1, 0] and valid.tolist() == [1, 1]


def test_no_boxes() -> None:
    coverage, valid = patch_coverage(*arrays([]), SIZE, (3, 3))
    assert not coverage.any() and valid.all()
    assert category_coverage(*arrays([]), (), SIZE, (3, 3)) == {}
    assert not pointing_hits(*arrays([]), SIZE, (3, 3)).any()
    assert not centre_rule(np.zeros((0, 4)), SIZE, (3, 3)).any()


def test_categories_share_the_picture_s_ignored_region() -> None:
    xyxy = np.array([[0, 0, 2, 4], [2, 0, 4, 2], [0, 0, 4, 1], [0, 3, 4, 4]], float)
    crowd = np.array([False, False, True, True])
    names = ("cat", "dog", "dog", "crowd")
    found = category_coverage(xyxy, crowd, np.ones(4), names, 4, (1, 2))
    coverage, valid = patch_coverage(xyxy, crowd, np.ones(4), 4, (1, 2))
    assert list(found) == ["cat", "dog"]
    np.testing.assert_allclose(found["cat"] + found["dog"], coverage)
    np.testing.assert_allclose(valid, [1, 0.75])
    np.testing.assert_allclose(found["dog"], [0, 0.5 / 0.75])


def test_pointing_tolerance_reaches_15_pixels_at_224() -> None:
    """Patch centres of a 7 x 7 grid lie at 16, 48, ...; a box from x = 31 on is 15 px from 16."""
    crowd, kept = np.zeros(1, bool), np.ones(1)

    def columns(left: float) -> list[int]:
        hits = pointing_hits(np.array([[left, 0, 70, 224.0]]), crowd, kept, 224, (7, 7))
        return np.flatnonzero(hits.reshape(7, 7).all(axis=0)).tolist()

    assert columns(31) == [0, 1, 2]
    assert columns(31.1) == [1, 2]
    corner = np.array([[16 + 12, 16 + 12, 40, 40.0]])  # 12 px away along both axes: 17 px
    assert not pointing_hits(corner, crowd, kept, 224, (7, 7))[0]


def test_centre_rule_keeps_crowds_and_misses_what_holds_no_centre() -> None:
    xyxy = np.array([[0, 0, 1, 1], [3, 0, 8, 3]], float)
    assert centre_rule(xyxy, 8, (2, 2)).tolist() == [False, True, False, False]
