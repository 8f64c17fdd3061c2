"""Losses in the whole training step: with micro-batches, cut short and resumed, with raw features,
with a temperature held constant."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_dist import launch
from test_resume import equal, record

from superclip import train
from superclip.config import train_config
from superclip.data.loader import collate
from superclip.ops.world import World
from superclip.training.build import build_run
from superclip.training.step import train_step

VALUES = {"train_num_samples": 48, "batch_size": 12, "val_data": "scenes:val", "precision": "fp32"}


def built(name, path, **more):
    return build_run(train_config(VALUES | {"loss": name, "out": str(path)} | more), World(), [])


@pytest.mark.parametrize("name", ["cyclip", "vicreg", "onlineclr", "siglip"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, tmp_path):
    """Two steps, so that the state is in it; plain SGD exposes any wrong factor."""
    run, start = built(name, tmp_path / "run", grad_clip_norm=None)
    ends = []
    for accum in (1, 2):
        state = copy.deepcopy(start)
        own = [*state.model.parameters(), *state.loss.parameters()]
        state.optimizer = torch.optim.SGD(
            [{"params": own, "name": "decay"}, {"params": [], "name": "scale"}], lr=0.01
        )
        part = replace(run, plan=replace(run.plan, micro_batch=12 // accum, accum_freq=accum))
        for step in range(2):
            batch = collate([run.rows[(0, row, 0)] for row in range(12 * step, 12 * step + 12)])[0]
            found = train_step(state, batch, part)
        ends.append((state, found))
    (whole, want), (parts, found) = ends
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=1e-6)
    pairs = zip((*whole.model.named_parameters(), *whole.loss.named_parameters()),
                (*parts.model.parameters(), *parts.loss.parameters()))  # fmt: skip
    for (key, a), b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=key)
    for key, value in whole.loss.state_dict().items():
        torch.testing.assert_close(parts.loss.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_vicreg_trains_on_raw_features_and_evaluates_unit_vectors(tmp_path):
    run, state = built("vicreg", tmp_path / "run")
    batch = collate([run.rows[(0, row, 0)] for row in range(4)])[0]
    out = state.model(batch.images, batch.tokens)
    unit = state.model.encode_image(batch.images), state.model.encode_text(batch.tokens)
    for raw, encoded in zip((out.image_features, out.text_features), unit):
        assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(F.normalize(raw, dim=1), encoded)


def test_lr_tau_0_holds_the_temperature_of_any_loss(tmp_path):
    run, state = built("cyclip", tmp_path / "run", lr_tau=0.0, init_scale=50.0)
    batch = collate([run.rows[(0, row, 0)] for row in range(12)])[0]
    train_step(state, batch, run)
    assert state.model.clip.logit_scale.item() == pytest.approx(math.log(50.0))
    assert not state.model.clip.logit_scale.requires_grad


def go_on(run, cut, start):
    """Run to the end; then again from what a run killed after step 2 would have left behind."""
    start(run)
    cut.mkdir()
    for name in ("run.json", "step_2.pt"):
        (cut / name).write_bytes((run / name).read_bytes())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:2]))
    assert "resuming from step_2.pt" in start(cut)
    a, b = (torch.load(d / "epoch_1.pt", weights_only=True) for d in (run, cut))
    assert a["training"]["loss"].keys() and equal(a["state_dict"], b["state_dict"])
    assert equal(a["training"], b["training"]) and record(run) == record(cut)
    return a["training"]["loss"]


WORDS = ["--train-num-samples", "48", "--save-every", "2", "--log-every", "1"]
KEPT = {"onlineclr": "log_u", "siglip": "bias"}


@pytest.mark.parametrize("name", KEPT)
def test_four_steps_are_two_a_restart_and_two(name, few_scenes, tmp_path, capsys):
    words = [*WORDS, "--val-data", str(few_scenes), "--batch-size", "12", "--precision", "fp32"]

    def start(out):
        train.main([*words, "--loss", name, "--out", str(out)])
        return capsys.readouterr().out

    kept = go_on(tmp_path / "run", tmp_path / "cut", start)
    assert kept.keys() == {KEPT[name]} and kept[KEPT[name]].isfinite().all()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", KEPT)
def test_so_they_are_on_three_ranks(name, few_scenes, tmp_path):
    words = [*WORDS, "--val-data", str(few_scenes), "--loss", name]
    many = go_on(tmp_path / "run", tmp_path / "cut", lambda out: launch(3, out, *words))
    launch(1, tmp_path / "one", *words)
    one = torch.load(tmp_path / "one" / "epoch_1.pt", weights_only=True)["training"]["loss"]
    torch.testing.assert_close(many, one, rtol=0, atol=1e-5)
