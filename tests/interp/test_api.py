"""The functions of the package: names, options, and what stands is opened rather than made anew."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from interp import ablate, course, load, patch, relevance, sweep
from interp.config import SweepConfig
from interp.render.course import caption, figure
from interp.results import SweepResults
from interp.sweep import sweep_one
from superclip.errors import UserError
from tests.conftest import ROOT
from tests.interp.sweeps import small_sweep

FEW = {"num": 220, "draws": 199}


@pytest.fixture(scope="module")
def ckpt(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    path = shutil.copytree(tiny_run, folder) / "final_epoch.pt"
    sweep(path, untrained=1, **FEW)
    return path


@pytest.mark.parametrize("first", ["import interp.sweep", "from interp.sweep import render", ""])
def test_a_name_is_the_function_whatever_was_imported_before(first):
    code = f"""{first}
import sys, interp
assert not {{'torch', 'matplotlib'}} & set(sys.modules)
from interp import sweep, lens
from interp.lens import render
from interp import lens as again
import interp.lens, importlib
assert sweep.__module__ == lens.__module__ == again.__module__ == 'interp.api'
assert importlib.import_module('interp.sweep').DONE == 'findings.json'
import interp.heads
assert interp.heads.Head and not hasattr(interp, 'nothing')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_sweep_is_that_of_the_command_and_stands(ckpt, tmp_path):
    mine = sweep(str(ckpt), untrained=1, **FEW)
    files = ckpt.parent / "sweep"
    theirs, findings, _ = sweep_one(SweepConfig(ckpt, untrained=1, out=tmp_path / "s", **FEW))
    assert (files / "results.npz").read_bytes() == (tmp_path / "s/results.npz").read_bytes()
    assert mine.findings.heads == findings.heads and "champion L" in str(mine)
    assert mine.results.manifest == theirs.manifest
    with pytest.raises(UserError, match="another --kind"):
        sweep(ckpt, kind="patches", out=str(tmp_path / "s"), untrained=1, **FEW)
    with pytest.raises(UserError, match="unknown option nums; did you mean 'num'"):
        sweep(ckpt, nums=3)


def test_a_report_that_stands_is_opened_if_it_is_what_is_asked_for(ckpt):
    found = relevance(ckpt, methods="rollout", draws=199)
    path = ckpt.parent / "sweep" / "relevance.json"
    before = path.stat().st_mtime_ns
    again = relevance(ckpt, methods="rollout", draws=199, batch_size=16)
    assert path.stat().st_mtime_ns == before and again == found and "rollout" in str(again)
    with pytest.raises(UserError, match=r"relevance.json is another report \(other --methods\)"):
        relevance(ckpt, methods="maskclip", draws=199)
    assert "maskclip" in relevance(ckpt, methods="maskclip", draws=199, overwrite=True)["methods"]
    path.write_text("[]")
    with pytest.raises(UserError, match="other content"):
        relevance(ckpt, methods="maskclip", draws=199)
    options = {"units": "top:1", "kinds": ["mean"], "sets": 0, "draws": 199}
    removed = ablate(ckpt, **options)
    before = (path.parent / "ablation.json").stat().st_mtime_ns
    assert ablate(ckpt, results=str(path.parent), **options) == removed
    assert (path.parent / "ablation.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="has no picture; print it"):
        removed.figure()


def test_a_report_of_another_checkpoint_is_not_opened(ckpt, tmp_path):
    other = shutil.copytree(ckpt.parent, tmp_path / "other") / "final_epoch.pt"
    relevance(other, methods="rollout", draws=199, overwrite=True)
    shutil.copy(other.with_name("epoch_1.pt"), other)  # the same weights in another file
    with pytest.raises(UserError, match="is the sweep of another checkpoint"):
        relevance(other, methods="rollout", draws=199)


def test_a_list_of_pairs_is_read_anew(ckpt, tmp_path):
    (tmp_path / "pairs.json").write_text("no JSON")
    with pytest.raises(UserError, match=r"pairs\.json"):
        patch(ckpt, pairs=str(tmp_path / "pairs.json"))


def test_a_picture_under_the_tower(ckpt):
    look = load(ckpt).look(2)
    assert look.maps.sum(-1) == pytest.approx(1) and look.record.key
    assert len(look.heads().axes) == 2 + 16 and len(look.head(0, 1).axes) == 2 + 1
    with pytest.raises(UserError, match="there is no 99999"):
        load(ckpt).look(99999)


def test_a_course_needs_two_checkpoints_and_says_when(ckpt):
    with pytest.raises(UserError, match="matches 1 of a run's"):
        course(ckpt.parent / "*.pt")
    flat = {"low": [-1.0, 0.1], "high": [1.0, 0.3], "estimate": [0.0, 0.2], "n": 9, "appears": 20}
    told = {"what": "excess", "steps": [10, 20], "champion": "L1H0"}
    told["curves"] = {"L0": flat | {"appears": None}, "champion L1H0": flat, "best": flat}
    assert "n = 9 validation" in caption(told) and "champion, from step 20 on" in caption(told)
    labels = [text.get_text().strip() for text in figure(told).axes[0].texts]
    assert labels == ["L0", "champion L1H0"]
    told["curves"]["champion L1H0"]["appears"] = None
    assert "at no step" in caption(told)


def test_a_metric_may_be_undefined_and_a_map_may_not(tmp_path):
    results = small_sweep()
    results.metrics["normalised_mass"][0] = np.nan  # a picture that objects cover whole
    results.save(tmp_path)
    assert np.isnan(SweepResults.load(tmp_path).metrics["normalised_mass"][0]).all()
    for array, bad in ((results.maps, np.nan), (results.metrics["excess"], np.inf)):
        kept, array[0] = array[0].copy(), bad
        results.save(tmp_path)
        with pytest.raises(UserError, match="not finite"):
            SweepResults.load(tmp_path)
        array[0] = kept
