"""Animations and sheets: one scale, captions from the results, one picture by its id."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib.colors import Normalize
from PIL import Image
from sweeps import small_sweep

from interp.analysis import analyse
from interp.animate import main
from interp.heads import Head
from interp.render import animation, gallery, words
from superclip.errors import UserError


@pytest.fixture(scope="module")
def results():
    return small_sweep()


@pytest.fixture
def folder(results, tmp_path):
    results.save(tmp_path / "sweep")
    return tmp_path / "sweep"


def frames_of(path):
    with Image.open(io.BytesIO(path.read_bytes())) as moving:
        return moving.n_frames


def test_a_still_holds_every_head_on_one_scale(results):
    findings = analyse(results)
    heads = [Head(1, k) for k in range(3)]
    norm = Normalize(0, 0.5)
    panels = [
        animation.Panel(str(h), gallery.attention(results, h, 0), words.evidence(findings, h))
        for h in heads
    ]
    figure = animation.still(results, 0, "title", panels, norm)
    over = [m for axes in figure.axes for m in axes.images if m.get_cmap().name == gallery.MAP]
    assert [m.get_clim() for m in over] == [(0, 0.5)] * 3
    for image, head in zip(over, heads):
        assert np.array_equal(image.get_array(), gallery.attention(results, head, 0))
    said = " ".join(" ".join(t.get_text() for t in figure.texts).split())
    assert all(" ".join(line.split()) in said for panel in panels for line in panel.under)
    figure.draw_without_rendering()
    right = figure.get_size_inches()[0] * figure.dpi
    boxes = [text.get_window_extent() for text in figure.texts]
    assert max(box.x1 for box in boxes) <= right + 1
    for k, a in enumerate(boxes):  # no words over others
        assert not any(a.overlaps(b) for b in boxes[k + 1 :]), figure.texts[k].get_text()


def test_every_kind_is_written_once(folder, results, capsys):
    main([str(folder), "--what", "layers"])
    assert frames_of(folder / "layers.gif") == results.shape[0]
    main([str(folder), "--what", "layer", "--layer", "0", "--out", str(folder / "l0.gif")])
    assert frames_of(folder / "l0.gif") == 3
    main([str(folder)])
    assert frames_of(folder / "duel.gif") == 3 and "duel.gif" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        main([str(folder)])
    main([str(folder), "--overwrite", "--largest", "0.05"])
    assert (folder / "duel.gif").stat().st_size <= 50_000 or frames_of(folder / "duel.gif") == 1
    main([str(folder), "--what", "sheets", "--head", "L0H1"])
    kept = str(results.image_ids[results.gallery_rows[animation_picture(results)]])
    names = {path.name for path in (folder / "sheets").iterdir()}
    expected = {f"gallery_L0H1.{k}" for k in ("png", "pdf")}
    assert names == expected | {f"heads_{kept}.{k}" for k in ("png", "pdf")}
    assert (folder / "sheets" / "gallery_L0H1.pdf").read_bytes().startswith(b"%PDF")


def animation_picture(results):
    judged = np.flatnonzero(results.split[results.gallery_rows] == 1)
    return int(judged[0]) if len(judged) else 0


def test_training_shares_one_scale_over_checkpoints(results):
    faint = dataclasses.replace(results, maps=(results.maps / 2).astype(np.float16))
    drawn = animation.training_frames([10, 20], [faint, results], [Head(1, 2)], 0)
    assert len(drawn) == 2 and drawn[0].shape == drawn[1].shape
    assert not np.array_equal(*drawn)
    again = animation.training_frames([10, 20], [results, results], [Head(1, 2)], 0)
    assert not np.array_equal(again[1], drawn[1])  # the scale is that of all checkpoints
    other = small_sweep(seed=9)
    with pytest.raises(UserError, match="other pictures"):
        animation.training_frames([1, 2], [other, results], [Head(0, 0)], 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--what layers --image nope", "is none that the sweep kept"),
        ("--what layer --layer 7", "layers 0 to 1"),
        ("--challenger L9H9", "--challenger L9H9: the tower's heads are L0H0 to L1H2"),
        ("--challenger x", "--challenger: 'x' is not a head"),
        ("--what sheets --head L9H1", "--head L9H1: the tower's heads are L0H0 to L1H2"),
        ("--what training --head x", "checkpoint.s. are swept, two are needed"),
        ("--head L0H0", "--head goes with --what training or sheets"),
        ("--largest 0", "--largest 0 must lie in"),
        ("--what sheets --head L1H2 --layer 0", "--layer goes with --what layer"),
    ],
)
def test_mistakes_are_one_line(folder, words, said):
    with pytest.raises(UserError, match=said):
        main([str(folder), *words.split()])


def test_a_sweep_without_pictures_says_so(tmp_path):
    small_sweep(gallery=0).save(tmp_path)
    with pytest.raises(UserError, match="kept no pictures"):
        main([str(tmp_path), "--what", "layers"])
