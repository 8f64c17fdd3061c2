import copy
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import final

import pytest
import torch

from superclip.config import train_config
from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.losses import Loss
from superclip.ops.world import World
from superclip.training.build import build_run
from superclip.training.consensus import Consensus
from superclip.training.nonfinite import handle_nonfinite
from superclip.training.schedule import cosine
from superclip.training.step import train_step

VALUES = {
    "train_num_samples": 48,
    "batch_size": 12,
    "val_data": "scenes:val",
    "head_vocab": "seen",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    values = VALUES | {"out": str(tmp_path_factory.mktemp("step") / "run")}
    return build_run(train_config(values), World(), [])


@pytest.fixture
def batch(built):
    run, _ = built
    pairs = [run.rows[(0, row, 0)] for row in range(12)]
    from superclip.data.loader import collate

    return collate(pairs)[0]


def stepped(built, batch: Batch, accum: int, **optim):
    """Weights and terms after one step from the same start."""
    run, state = built
    options = replace(run.config.optim, **optim)
    plan = replace(run.plan, micro_batch=12 // accum, accum_freq=accum)
    run = replace(run, config=replace(run.config, optim=options), plan=plan)
    state = copy.deepcopy(state)
    groups = [{"params": list(state.model.parameters()), "name": "all"}]
    state.optimizer = torch.optim.SGD(groups, lr=1.0)
    terms = train_step(state, batch, run)
    return state, terms


def test_micro_batches_give_the_gradient_of_the_whole_batch(built, batch):
    """SGD without clipping exposes any wrong factor, the logit scale's included."""
    whole, terms = stepped(built, batch, 1, grad_clip_norm=None)
    for accum in (2, 3):
        parts, found = stepped(built, batch, accum, grad_clip_norm=None)
        for name in terms:
            torch.testing.assert_close(found[name], terms[name], rtol=1e-5, atol=1e-6)
        for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)


def test_running_statistics_move_once_a_micro_batch(tmp_path, batch):
    """Each passes twice, without and with a graph."""
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "patch_size": None}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "rn.json").write_text(json.dumps(config))
    values = {k: v for k, v in VALUES.items() if k != "head_vocab"} | {"loss": "clip"}
    values |= {"model": str(tmp_path / "rn.json"), "out": str(tmp_path / "run")}
    built = build_run(train_config(values), World(), [])
    assert built[0].facts["micro_batch"] == 12  # another one is said on resuming
    with pytest.raises(UserError, match=r"--grad-checkpointing .* batch norm"):
        build_run(train_config(values | {"grad_checkpointing": True}), World(), [])
    small = replace(batch, images=batch.images[..., :64, :64])
    counted = {
        accum: stepped(built, small, accum)[0].model.clip.visual.bn1.num_batches_tracked
        for accum in (1, 2, 3)
    }
    assert counted == {1: 1, 2: 2, 3: 3}


def test_first_step_is_the_autograd_gradient_of_the_summed_terms(built, batch):
    run, state = built
    after, terms = stepped(built, batch, 1, grad_clip_norm=None)
    fresh = copy.deepcopy(state)
    fresh.loss.observe(batch, World())
    out = fresh.model(batch.images, batch.tokens)
    pair = fresh.loss.pair_terms(out.image_features, out.text_features, out.scale, batch, World())
    total = sum(pair.values()) + sum(fresh.loss.row_terms(out, batch).values())
    assert total.item() == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-5)
    total.backward()
    lr = cosine(0, run.config.lr, run.config.optim.warmup, run.plan.total_steps)
    for (name, p), q in zip(fresh.model.named_parameters(), after.model.parameters()):
        if name != "clip.logit_scale":
            torch.testing.assert_close(p.detach() - lr * p.grad, q.detach(), msg=name)


def test_gradients_are_clipped_by_towers_and_head_apart(built, batch):
    state, _ = stepped(built, batch, 1, grad_clip_norm=0.5)
    assert {"grad_norm_clip", "grad_norm_head"} <= state.norms.keys()
    free, _ = stepped(built, batch, 1, grad_clip_norm=None)
    assert state.norms["grad_norm_clip"] == free.norms["grad_norm_clip"] > 0.5


def test_scale_is_clamped(built, batch):
    run, state = built
    state = copy.deepcopy(state)
    groups = [{"params": list(state.model.parameters()), "name": "all"}]
    state.optimizer = torch.optim.SGD(groups, lr=0.0)
    with torch.no_grad():
        state.model.clip.logit_scale.fill_(9.0)
    train_step(state, batch, run)
    assert state.model.clip.logit_scale.item() == pytest.approx(math.log(100))


def test_uneven_micro_batches_are_a_contradiction(batch):
    with pytest.raises(AssertionError):
        batch.split(5)


def test_run_record_is_written(built):
    run, _ = built
    assert (Path(run.directory) / "run.json").exists() and run.plan.total_steps == 4


@final
class Poisoned(Loss):
    """A loss whose gradient is not a number."""

    def pair_terms(self, image_features, text_features, scale, batch, world):
        return {"poison": (image_features.sum() + text_features.sum()) * scale * math.nan}


def test_a_gradient_that_is_not_finite_changes_no_weight(built, batch):
    run, state = built
    state = copy.deepcopy(state)
    before = copy.deepcopy(state.model.state_dict())
    state.loss = Poisoned()
    terms = train_step(state, batch, run)
    assert state.step == 1 and not state.finite and terms["poison"].isnan()
    assert all(torch.equal(a, before[n]) for n, a in state.model.state_dict().items())
    news = Consensus(run).reach(state, terms, Counter())
    assert news.broken_ranks == [0]
    skipping = replace(run, config=replace(run.config, on_nonfinite="skip"))
    handle_nonfinite(skipping, state, batch, news)
    assert state.nonfinite == 1 and state.gauges()["nonfinite_steps"] == 1
    with pytest.raises(UserError, match=r"on rank.s. 0, image ids 0, 1, 2"):
        handle_nonfinite(run, state, batch, news)


def test_a_loss_scale_that_is_too_large_is_halved_and_no_failure(built, batch):
    run, state = built
    state = copy.deepcopy(state)
    before = copy.deepcopy(state.model.state_dict())
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    train_step(state, batch, run)
    assert state.finite and state.scaler.get_scale() == 2.0**126
    state.loss = Poisoned()  # which no loss scale cures
    for scale, sought in ((2.0, True), (1.0, False)):
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        train_step(state, batch, run)
        assert state.finite == sought
    assert all(torch.equal(a, before[n]) for n, a in state.model.state_dict().items())


def test_too_many_unreadable_pictures_stop_the_run_after_saving(built, batch):
    run, state = built
    state = copy.deepcopy(state)
    terms = train_step(state, batch, run)
    Consensus(run).reach(state, terms, Counter({"OSError": 10}))
    with pytest.raises(UserError, match=r"11 of 12 .*OSError 10, UnidentifiedImageError 1"):
        Consensus(run).reach(state, terms, Counter({"UnidentifiedImageError": 1}))
    assert (run.directory / "step_1.pt").exists()
