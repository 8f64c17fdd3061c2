"""Runs that are asked to stop, or whose checkpoints, losses or disks fail."""

import os
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch
from conftest import ROOT, command, refused
from test_resume import WORDS, record

from superclip.model.weights import damage_of, load_checkpoint
from superclip.ops.phases import Phase

LONG = [*WORDS.split(), "--epochs", "2"]


@pytest.fixture(scope="module")
def long(few_scenes):
    return [*LONG, "--val-data", str(few_scenes)]


def start(words, out):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
    )


def wait_for(out, count):
    """Until the record has so many lines."""
    path, end = out / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def trained(words, out, *more):
    done = command(*words, "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, long):
    out = tmp_path_factory.mktemp("long") / "run"
    trained(long, out, "--save-every", "3")
    return out


def same_weights(a, b):
    x, y = (torch.load(out / "final_epoch.pt", weights_only=True)["state_dict"] for out in (a, b))
    return all(torch.equal(x[name], y[name]) for name in x)


def interrupt(words, out, number, lines):
    """Send a signal once the record has so many lines; then give the same command again."""
    run = start(words, out)
    wait_for(out, lines)
    run.send_signal(number)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "resubmit to continue" in said and "Traceback" not in errors
    assert not (out / "final_epoch.pt").exists()
    assert "resuming from" in trained(words, out).stdout


def test_a_signal_ends_the_step_and_the_same_command_goes_on(long, undisturbed, tmp_path):
    interrupt(long, tmp_path / "run", signal.SIGUSR1, 3)
    assert same_weights(tmp_path / "run", undisturbed)
    assert record(tmp_path / "run") == record(undisturbed)


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short(tmp_path):
    """The record's line 8 is the epoch's last step: its evaluation, of 2 000 scenes, is running."""
    trained(LONG, tmp_path / "whole")
    interrupt(LONG, tmp_path / "run", signal.SIGTERM, 8)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert record(tmp_path / "run") == record(tmp_path / "whole")


def cut_at(undisturbed, out, *names):
    out.mkdir()
    for name in ("run.json", *names):
        (out / name).write_bytes((undisturbed / name).read_bytes())
    return out


def test_a_damaged_checkpoint_is_passed_over(long, undisturbed, tmp_path):
    out = cut_at(undisturbed, tmp_path / "run", "step_3.pt", "step_6.pt", "epoch_1.pt")
    newest, middle = out / "epoch_1.pt", out / "step_6.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    middle.write_bytes(middle.read_bytes()[:-1000])
    assert "checksum" in (damage_of(newest) or "")
    done = trained(long, out)
    assert "resuming from step_3.pt" in done.stdout
    warnings = [x for x in done.stderr.splitlines() if "passed over" in x]
    assert ["epoch_1.pt" in warnings[0], "step_6.pt" in warnings[1]] == [True, True]
    assert same_weights(out, undisturbed)
    refusal = refused("superclip.evaluate", "--ckpt", str(_flipped(out / "final_epoch.pt")))
    assert "checksum" in refusal


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = path.with_name("damaged.pt")
    damaged.write_bytes(content)
    return damaged


def test_without_a_whole_checkpoint_the_run_is_not_begun_anew(long, undisturbed, tmp_path):
    out = cut_at(undisturbed, tmp_path / "run", "step_3.pt")
    (out / "step_3.pt").write_bytes(b"PK")
    done = command(*long, "--out", str(out))
    assert done.returncode == 2 and "none of the 1 checkpoints" in done.stderr


@pytest.mark.slow
def test_an_evaluation_that_a_crash_cut_short_is_made_up_for(long, undisturbed, tmp_path):
    out = cut_at(undisturbed, tmp_path / "run", "epoch_1.pt", "metrics.jsonl")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:8]))
    trained(long, out)
    assert record(out) == record(undisturbed)


def test_only_the_newest_checkpoints_are_kept(long, tmp_path):
    """By the clock, a checkpoint after every step."""
    trained(long, tmp_path, "--save-every-minutes", "1e-6", "--keep-last", "2")
    assert {p.name for p in tmp_path.glob("*.pt")} == {"step_15.pt", "epoch_2.pt", "final_epoch.pt"}


def test_a_loss_that_is_not_finite_stops_and_keeps_its_batch(long, tmp_path):
    done = command(*long, "--lr", "1e30", "--out", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "not finite at step" in message and "image ids" in message and "rank(s) 0" in message
    (kept,) = tmp_path.glob("nonfinite_*.pt")
    content, model = torch.load(kept, weights_only=True), load_checkpoint(kept).model
    out = model(content["batch"]["images"], content["batch"]["tokens"])
    assert not torch.cat([out.image_features, out.text_features]).isfinite().all()


def test_what_one_watches_changes_nothing(long, undisturbed, tmp_path):
    """Profile, shares and TensorBoard in one run."""
    words = "--profile 3 --log-grad-share 4 --track tensorboard"
    said = trained(long, tmp_path, *words.split()).stdout
    assert same_weights(tmp_path, undisturbed)

    assert (tmp_path / "profile_trace.json.gz").stat().st_size > 1000
    table = [line.split() for line in said.splitlines() if line.startswith("  ")]
    spent = {name: float(share) for name, _, _, share, _ in table}
    assert set(spent) == {*get_args(Phase), "other"}
    assert spent["forward"] > 5 and spent["backward"] > 5
    assert sum(spent.values()) == pytest.approx(100, abs=1)

    shares = [x for x in record(tmp_path) if "grad_share_token" in x]
    assert [x["step"] for x in shares] == [4, 8, 12, 16]
    for x in shares:
        assert x["grad_share_token"] + x["grad_share_contrastive"] == pytest.approx(1, abs=1e-9)
        assert 0 < x["grad_share_contrastive"] != x["grad_share_token"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    mirrored = [scalar.value for scalar in events.Scalars("loss")]
    assert mirrored == pytest.approx([x["loss"] for x in record(tmp_path) if "loss" in x])
    assert {"update_norm_clip", "param_norm_head", "data_wait"} <= set(events.Tags()["scalars"])
