"""Figures hold the numbers of the findings, on one colour scale, and repeat byte for byte."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from interp.analysis import analyse
from interp.heads import Head
from interp.render import animation, figures, gallery, words
from interp.render.canvas import DARK, LIGHT, png
from interp.render.lens import lens_figure
from interp.render.patching import caption
from interp.render.patching import figure as patching
from interp.stats.intervals import Interval
from superclip.errors import UserError
from tests.interp.sweeps import PIXELS, PLANTED, SIDE, small_sweep


@pytest.fixture(scope="module")
def results():
    return small_sweep()


@pytest.fixture(scope="module")
def findings(results):
    return analyse(results)


def test_the_planted_head_is_what_the_figures_are_about(findings):
    assert findings.champion == Head(*PLANTED)


def texts(figure):
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]


def test_heat_map_shows_the_validation_excess_and_marks_the_champion(results, findings):
    figure = figures.heat_map(results, findings)
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(shown, findings.verdict.band.estimate)
    low, high = axes.images[0].get_clim()
    assert low == -high == -np.abs(shown).max()
    cells = {t.get_text() for t in axes.texts}
    assert cells == {words.number(row["validation_excess"]) for row in findings.heads}
    frame = axes.patches[-1]
    assert frame.get_xy() == (findings.champion.index - 0.5, findings.champion.layer - 0.5)
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert len(dots) == words.significant(findings).sum() >= 1
    assert any(f"n = {findings.verdict.band.n}" in text for text in texts(figure))


def test_a_large_heat_map_leaves_the_numbers_out(results, findings, monkeypatch):
    monkeypatch.setattr(figures, "CELLS_WITH_NUMBERS", 5)
    assert not figures.heat_map(results, findings).axes[0].texts


def test_layers_plot_has_every_head_and_baseline(results, findings):
    axes = figures.layers_plot(results, findings).axes[0]
    at = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"]
    heads = [row["validation_excess"] for row in findings.heads]
    assert sorted(at) == pytest.approx(sorted([*heads, findings.verdict.band.estimate[PLANTED]]))
    towers = [row.excess.estimate for row in words.untrained(findings) if row.excess]
    level = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert len(towers) == 2 and set(towers) <= set(level) and 0.0 in level


def test_gallery_has_one_colour_scale_and_the_data(results, findings):
    head = findings.champion
    figure = gallery.gallery(results, head)
    over = [i for axes in figure.axes for i in axes.images if i.get_cmap().name == gallery.MAP]
    largest = results.maps[:3, head.layer, head.index].astype(float).max(axis=1)
    top = sorted(largest)[1]
    assert len(over) == 3 and {i.get_clim() for i in over} == {(0, top)}
    bars = [axes for axes in figure.axes if not axes.images and axes.get_xticklabels()]
    assert [t.get_text() for t in bars[0].get_xticklabels()] == ["0", "", f"≥ {words.number(top)}"]
    for i, image in enumerate(over):
        shown = np.asarray(image.get_array())
        expected = results.maps[i, head.layer, head.index].reshape(SIDE, SIDE)
        np.testing.assert_array_equal(shown, expected.astype(float))
        assert image.get_extent() == [0, PIXELS, PIXELS, 0]
        assert image.get_interpolation() == "nearest"
    masses = results.metrics["in_box_mass"][:3, head.layer, head.index]
    for mass in masses:
        assert any(f"in-box mass {words.number(mass)}" in text for text in texts(figure))
    assert f"0 to ≥ {words.number(top)} of" in gallery.caption(results, head)
    assert any(
        "validation, picture-003" in t for t in texts(gallery.gallery(small_sweep(0, 4), head))
    )


def test_the_box_lies_on_the_patch_that_a_perfect_head_lights():
    results = small_sweep(planted=1.0)
    figure = gallery.gallery(results, Head(*PLANTED))
    overlays = [axes for axes in figure.axes if len(axes.images) == 2]
    assert len(overlays) == 3
    for axes in overlays:
        [box] = axes.patches
        row, column = np.argwhere(np.asarray(axes.images[1].get_array()) == 1)[0]
        patch = PIXELS / SIDE
        assert box.get_bbox().bounds == (column * patch, row * patch, patch, patch)


def test_empty_gallery_says_so(findings):
    empty = small_sweep(gallery=0)
    assert any("kept none" in text for text in texts(gallery.gallery(empty, findings.champion)))


def test_animation_is_one_scale_equal_frames_and_small(results, findings):
    rival = animation.challenger_of(findings)
    assert rival == findings.verdict.top[1]
    norm = gallery.scale(results, [findings.champion, rival])
    heads = [(h.layer, h.index) for h in (findings.champion, rival)]
    largest = [float(results.maps[i, *head].max()) for head in heads for i in range(3)]
    assert norm.vmax == pytest.approx(np.median(largest)) and norm(1.0) == 1
    for i in range(3):
        figure = animation.duel(results, findings, rival, i, norm)
        over = [m for axes in figure.axes for m in axes.images if m.get_cmap().name == gallery.MAP]
        assert [m.get_clim() for m in over] == [(0, norm.vmax)] * 2
        said = " ".join(" ".join(texts(figure)).split())
        for k, head in enumerate((findings.champion, rival)):
            assert words.number(gallery.mass(results, head, i)) in said
            assert words.span(findings.verdict.validation[k], 4) in said
            assert f"p = {words.p_value(findings.verdict.p[k])}" in said
    frames = animation.frames(results, findings, rival)
    encoded, kept = animation.gif(frames)
    with Image.open(io.BytesIO(encoded)) as moving:
        assert moving.n_frames == kept == 3
        colours, durations = set(), set()
        for k in range(3):
            moving.seek(k)
            durations.add(moving.info["duration"])
            colours |= {tuple(c) for c in np.asarray(moving.convert("RGB")).reshape(-1, 3)}
    assert durations == {animation.MILLISECONDS} and len(colours) <= 256
    assert (255, 255, 255) in colours
    assert encoded == animation.gif(animation.frames(results, findings, rival))[0]
    lower = animation.gif([frames[0][:-20], *frames[1:]])[0]  # fewer lines of words
    with Image.open(io.BytesIO(lower)) as moving:
        assert moving.n_frames == 3 and moving.size == frames[1].shape[1::-1]
    shorter, left = animation.gif(frames, len(encoded) - 1)
    assert left < 3 and len(shorter) < len(encoded)


def test_challenger_is_checked(findings):
    assert animation.challenger_of(findings, Head(0, 1)) == Head(0, 1)
    with pytest.raises(UserError, match="champion itself"):
        animation.challenger_of(findings, findings.champion)
    with pytest.raises(UserError, match="L0H0 to L1H2"):
        animation.challenger_of(findings, Head(7, 0))


def test_a_head_outside_the_finalists_is_given_its_band(findings):
    outside = next(
        h
        for h in map(Head.parse, (r["head"] for r in findings.heads))
        if h not in findings.verdict.top
    )
    excess, p = words.evidence(findings, outside)
    row = words.head_row(findings, outside)
    assert words.number(row["validation_low"], 4) in excess and "band" in excess
    assert words.p_value(row["discovery_p_adjusted"]) in p and "discovery" in p
    chosen, judged = (int(n) for n in (findings.verdict.discovery.n, findings.verdict.band.n))
    assert chosen != judged and p.endswith(f"n = {chosen}") and excess.endswith(f"n = {judged}")
    own, also = words.evidence(findings, findings.champion)
    assert "this head alone" in own and own.endswith(f"n = {judged}")
    assert also.startswith("discovery p") and also.endswith(f"n = {chosen}")


def test_themes_differ_in_paper_and_repeat_byte_for_byte(results, findings):
    light, dark = (png(figures.heat_map(results, findings, t)) for t in (LIGHT, DARK))
    assert light == png(figures.heat_map(results, findings, LIGHT)) != dark
    for theme, image in ((LIGHT, light), (DARK, dark)):
        corner = Image.open(io.BytesIO(image)).convert("RGBA").getpixel((0, 0))
        assert corner == tuple(round(255 * c) for c in to_rgba(theme.paper))


def test_spread_keeps_order_and_distance():
    moved = figures.spread(np.array([0.0, 0.0, 0.01, 3.0]), 0.5)
    assert (np.diff(moved) >= 0.5 - 1e-12).all() and moved[-1] == pytest.approx(3.0, abs=0.6)


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-1.0, 1.0, 0)])
def test_sign_says_better_only_where_the_interval_does(low, high, sign):
    assert words.sign(Interval(0.0, low, high, 9)) == sign


HOSTILE = [
    "$x_1$ $\\frac{",
    "<script>alert(1)</script>",
    "\U0001f440 \u202e\u05e9\u05dc\u05d5\u05dd",
    "two\nlines\tand\x00",
    "W" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_words_of_others_are_drawn_on_one_line_as_they_stand(name):
    curve = {"estimate": [0.2, 0.6], "low": [0.1, 0.5], "high": [0.3, 0.7]}
    curves = dict.fromkeys(("raw", "mean", "tuned"), curve)
    report = {"model": name, "lens": "tokens", "layers": ["L0", "L1"], "forms": list(curves)}
    report |= {"n": 9, "r2": curves, "mean": {"auc": curves}}
    report |= {"concepts": [{"concept": name, "with": 3, "without": 6, "auc": curves}] * 5}
    drawn = lens_figure(report)
    assert png(drawn, int(drawn.dpi))
    width, height = drawn.get_size_inches() * drawn.dpi
    for text in drawn.findobj(Text):
        box = text.get_window_extent()
        assert box.width == 0 or (box.x1 <= width and box.height < height / 4)
        assert "(3 / 6)" not in text.get_text() or box.width < 2.3 * drawn.dpi
    titles = [text for text in texts(drawn) if "(3 / 6)" in text]
    seen = {"$": f"{name} (3 / 6)", "t": "two lines and\u25a1 (3 / 6)"}
    seen["\U0001f440"] = "\u200e\u25a1 \u25a1\u05e9\u05dc\u05d5\u05dd\u200e (3 / 6)"
    assert titles == 5 * [seen.get(name[0], f"{name[:13]}\u2026 (3 / 6)")]
    cell = {"at": "L0H0", "p": 0.5, "n": 9} | dict.fromkeys(curve, 0.1)
    rows = {"heads": [cell] * 3}
    report = {"pairs": name, "n": 9, "denoise": rows, "noise": rows}
    said = caption(report, rows["heads"] * 2, 60)
    assert png(patching(report)) and said.count("\n") < 9
