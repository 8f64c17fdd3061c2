"""Courses along training: onsets by hand, bands over all curves, and both commands on a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import command, refused
from sweeps import PLANTED, small_sweep

from interp.grounding.metrics import PairScores, excess
from interp.heads import Head
from interp.stats.intervals import first_held
from interp.timeline import courses, dependence, grounding, numbered, render
from superclip.errors import UserError


def test_first_held_by_hand():
    held = np.array([[True, True], [False, True], [True, False], [False, False]])
    assert first_held(held).tolist() == [0, 1, 2, 2]


def test_onset_is_where_half_of_the_end_is_held():
    """Up to .6 of the end at step 20, below half at 30, then for good: onset 40."""
    rng = np.random.default_rng(0)
    shape = np.array([0.0, 0.6, 0.3, 0.7, 1.0])
    curves = {
        "rises": shape + 0.05 * rng.normal(size=(80, 5)),
        "early": np.ones(5) + 0.05 * rng.normal(size=(80, 5)),
        "noise": 0.3 * rng.normal(size=(80, 5)),
    }
    found = courses(curves, [10, 20, 30, 40, 50], np.zeros(80, int), 1, 499, 0)
    rises = found["rises"]
    assert rises["onset"] == {"estimate": 40, "low": 40, "high": 40, "n": 80}
    assert rises["appears"] == 20 and found["early"]["appears"] == 10
    assert found["early"]["onset"]["estimate"] == 10
    assert found["noise"]["appears"] is None and found["noise"]["onset"] is None
    for name, values in curves.items():
        np.testing.assert_allclose(found[name]["estimate"], values.mean(0))
        half = np.subtract(found[name]["high"], found[name]["low"]) / 2
        alone = 1.96 * values.std(0, ddof=1) / 80**0.5
        assert (half > 1.2 * alone).all()  # 15 means at once


def test_an_uncertain_onset_has_a_wide_interval():
    rng = np.random.default_rng(1)
    values = np.array([0.0, 0.5, 0.5, 1.0]) + rng.normal(size=(60, 4))
    (found,) = courses({"c": values}, [1, 2, 3, 4], np.zeros(60, int), 1, 499, 0).values()
    assert found["onset"]["low"] < found["onset"]["high"]


def test_grounding_follows_the_last_champion():
    """The planted head grows from nothing: its layer's mean and the champion appear, others not."""
    sweeps = [small_sweep(0, planted=share) for share in (0.0, 0.05, 0.3)]
    course = grounding([10, 20, 30], sweeps, 299)
    planted = Head(*PLANTED)
    assert course["champion"] == str(planted) and course["best_heads"][-1] == str(planted)
    curve = course["curves"][f"champion {planted}"]
    rows = sweeps[-1].rows("validation")
    last = sweeps[-1]
    pairs = PairScores(last.maps[rows], last.coverage[rows], last.valid[rows])
    expected = excess(pairs, last.stratum[rows].astype(int))[:, *PLANTED].mean()
    assert curve["estimate"][-1] == pytest.approx(expected, abs=1e-5)
    assert curve["appears"] == 20 and curve["onset"]["estimate"] == 30
    assert course["curves"][f"L{planted.layer}"]["appears"] in (20, 30)
    assert course["curves"]["L0"]["appears"] is None
    text = render(course)
    assert f"champion {planted}" in text and "n = 28 validation pictures" in text
    other = dict(sweeps[0].manifest, images_sha256="0" * 64)
    with pytest.raises(UserError, match="step 10 was swept on other pictures"):
        grounding([10, 30], [replace(sweeps[0], manifest=other), sweeps[-1]], 99)


def test_dependence_needs_every_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "ablation.json").write_text("{}")
        arrays = {"mean L0H0": -step + rng.normal(size=40), "mean L0H1": rng.normal(size=40)}
        arrays |= {"mean L1H0": rng.normal(size=40)} if step == 2 else {}
        np.savez(tmp_path / str(step) / "ablation.npz", **arrays)
    folders = [tmp_path / "1", tmp_path / "2"]
    course = dependence([1, 2], folders, Head(0, 0), "mean", 199, 0)
    assert list(course["curves"]) == ["mean L0H0", "mean L0H1"]
    assert course["curves"]["mean L0H0"]["appears"] == 1
    assert course["curves"]["mean L0H1"]["appears"] is None
    with pytest.raises(UserError, match="mean ablation of L1H0 is not there for every"):
        dependence([1, 2], folders, Head(1, 0), "mean", 99, 0)
    with pytest.raises(UserError, match=r"run interp\.ablate"):
        dependence([1, 2], [tmp_path, *folders[:1]], Head(0, 0), "mean", 99, 0)


def test_checkpoints_in_the_order_of_their_steps(tmp_path):
    for name in ("epoch_2.pt", "epoch_10.pt", "step_35.pt", "final_epoch.pt", "step_x.pt"):
        (tmp_path / name).touch()
    (tmp_path / "run.json").write_text(json.dumps({"steps_per_epoch": 10}))
    found = [(step, path.name) for step, path in numbered(tmp_path / "*.pt")]
    assert found == [(20, "epoch_2.pt"), (35, "step_35.pt"), (100, "epoch_10.pt")]
    with pytest.raises(UserError, match="matches 1 of a run's"):
        numbered(tmp_path / "step_*.pt")


@pytest.mark.slow
def test_both_commands_over_a_run(tmp_path):
    words = "--train-num-samples 256 --batch-size 32 --head-vocab seen --save-every 4"
    run = tmp_path / "run"
    done = command("superclip.train", *words.split(), "--out", str(run))
    assert done.returncode == 0, done.stderr
    ckpt = ("--ckpt", str(run / "*.pt"))  # step_4.pt and epoch_1.pt
    said = refused("interp.ablate", *ckpt)
    assert "python -m interp.sweep first" in said
    flags = ("--draws", "99", "--threads", "1")
    swept = command("interp.sweep", *ckpt, *flags, "--num", "220", "--untrained", "1")
    assert swept.returncode == 0, swept.stderr
    course = json.loads((run / "course.json").read_text())
    assert course["steps"] == [4, 8] and set(course["curves"]) > {"L0", "L3", "best"}
    flags220 = (*flags, "--num", "220", "--untrained", "1")
    assert "course.json exists" in refused("interp.sweep", *ckpt, *flags220)
    (run / "course.json").unlink()
    for other, said in (
        (flags, "another --num"),
        ((*flags220, "--seed", "1"), "another --seed"),
        ((*flags220, "--split", "train"), "another set of pictures"),
    ):
        assert said in refused("interp.sweep", *ckpt, *other)
    (run / "sweep-step_4" / "findings.json").unlink()  # as if cut short while judging
    again = command("interp.sweep", *ckpt, *flags220)  # nothing is swept twice
    assert again.returncode == 0 and "pictures:" not in again.stderr, again.stderr
    assert json.loads((run / "course.json").read_text()) == course
    kinds = ("--kinds", "mean", "--units", "top:1")
    done = command("interp.ablate", *ckpt, *flags, *kinds)
    assert done.returncode == 0, done.stderr
    ablated = json.loads((run / "course-mean-ablation.json").read_text())
    assert f"mean {ablated['champion']}" in ablated["curves"]
    assert ablated["champion"] == course["champion"]
    assert "--overwrite" in refused("interp.ablate", *ckpt, *flags, *kinds)
    course_file = run / "course-mean-ablation.json"
    course_file.unlink()  # a course that was cut short goes on from the reports that stand
    before = (run / "sweep-step_4" / "ablation.json").stat().st_mtime_ns
    assert command("interp.ablate", *ckpt, *flags, *kinds).returncode == 0
    assert json.loads(course_file.read_text()) == ablated
    assert (run / "sweep-step_4" / "ablation.json").stat().st_mtime_ns == before
    course_file.unlink()
    arrays = run / "sweep-step_4" / "ablation.npz"
    kept = arrays.read_bytes()
    arrays.write_bytes(kept[:-1])
    assert "ablation.npz is not that of ablation.json" in refused(
        "interp.ablate", *ckpt, *flags, *kinds
    )
    arrays.write_bytes(kept)
    assert "(kinds differs)" in refused("interp.ablate", *ckpt, *flags, "--kinds", "zero")
    assert "go with one checkpoint" in refused("interp.sweep", *ckpt, "--out", str(tmp_path))
