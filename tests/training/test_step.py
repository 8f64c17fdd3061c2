import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from superclip.config import train_config
from superclip.data.batch import Batch
from superclip.ops.world import World
from superclip.training.build import build_run
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
    pairs = [run.rows[(0, row)] for row in range(12)]
    from superclip.data.loader import collate

    return collate(pairs)[0]


def stepped(built, batch: Batch, accum: int, **optim):
    """Weights and terms after one step from the same start."""
    run, state = built
    options = replace(run.config.optim, batch_size=12 // accum, accum_freq=accum, **optim)
    run = replace(run, config=replace(run.config, optim=options))
    state = copy.deepcopy(state)
    state.forward = state.model
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
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
    assert set(state.grad_norms) == {"clip", "head"}
    free, _ = stepped(built, batch, 1, grad_clip_norm=None)
    assert state.grad_norms["clip"] == free.grad_norms["clip"] > 0.5


def test_scale_is_clamped(built, batch):
    run, state = built
    state = copy.deepcopy(state)
    state.forward = state.model
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.0)
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
