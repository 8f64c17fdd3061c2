"""What a loss asks of the model: raw features, a temperature that stays where it is."""

import math

import torch
import torch.nn.functional as F

from superclip.config import train_config
from superclip.data.loader import collate
from superclip.ops.world import World
from superclip.training.build import build_run
from superclip.training.step import train_step

VALUES = {"train_num_samples": 12, "batch_size": 12, "val_data": "scenes:val", "precision": "fp32"}


def built(name, path, **more):
    values = VALUES | {"loss": name, "out": str(path / "run")} | more
    run, state = build_run(train_config(values), World(), [])
    return run, state, collate([run.rows[(0, row, 0)] for row in range(12)])[0]


def test_vicreg_trains_on_raw_features_and_evaluates_unit_vectors(tmp_path):
    _, state, batch = built("vicreg", tmp_path)
    out = state.model(batch.images, batch.tokens)
    unit = state.model.encode_image(batch.images), state.model.encode_text(batch.tokens)
    for raw, encoded in zip((out.image_features, out.text_features), unit):
        assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(F.normalize(raw, dim=1), encoded)


def test_lr_tau_0_holds_the_temperature_of_any_loss(tmp_path):
    """And its gradient takes no part in the clipping."""
    run, state, batch = built("cyclip", tmp_path, lr_tau=0.0, init_scale=50.0, warmup=0)
    scale = state.model.clip.logit_scale
    before = scale.item()
    train_step(state, batch, run)
    assert scale.item() == before and math.isclose(math.exp(before), 50, rel_tol=1e-6)
    assert not scale.requires_grad and state.norms["grad_norm_clip"] > 0


def test_the_bias_of_siglip_is_trained_and_stays_out_of_the_clip_model(tmp_path):
    run, state, batch = built("siglip", tmp_path, warmup=0)
    train_step(state, batch, run)
    assert state.loss.get_parameter("bias").item() != -10
    assert "logit_bias" not in state.model.clip.state_dict()
