"""The towers that people use, at their real size and with random weights: exact all the same."""

import pytest
import torch
from reference.causal import features_without

from interp.causal.attribution import attribution
from interp.causal.direct import cosines, decompose
from interp.causal.sweep import ablate_batch
from interp.causal.units import Ablation, Unit, group
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError
from superclip.model.factory import build_clip, model_config

NAMES = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14"]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("name", NAMES)
def test_ablation_direct_effects_and_attribution(name, pool):
    config = model_config(name)
    config["vision_cfg"]["pool_type"] = pool
    visual = build_clip(config).visual.eval()
    before = {key: value.clone() for key, value in visual.state_dict().items()}
    tower = HookedVisionTransformer(visual)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = visual(images)
    last = tower.cfg.n_layers - 1
    units = [group([Head(0, 1)]), group([Head(last, 0), Head(last // 2, 3)]), Unit("mlp", (), (2,))]
    found = ablate_batch(tower, images, Ablation("zero"), units).features[0]
    sites = {f"blocks.{k}.attn.hook_z": 0 for k in range(last + 1)}
    sites |= {"blocks.2.hook_mlp_out": 0}
    for unit, features in zip(units, found, strict=True):
        slow = features_without(tower, images, unit.heads, unit.mlps, "all", sites)
        assert (features - slow).abs().max() <= 5e-5 * slow.abs().max()
        assert (features - plain).abs().max() > 1e-4 * plain.abs().max()
    parts = decompose(tower, images)
    torch.testing.assert_close(parts.sum(), plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    text = torch.randn(1, plain.shape[1], generator=torch.Generator().manual_seed(1))
    heads = attribution(tower, images, lambda f: cosines(f, text)[:, 0], Ablation("zero")).heads
    assert heads.shape == (1, last + 1, tower.cfg.n_heads) and heads.isfinite().all()
    with torch.no_grad():
        assert torch.equal(visual(images), plain), "the user's model has changed"
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, named", [("vit_medium_patch16_gap_256", "TimmModel"), ("RN50", "ResNet")]
)
def test_towers_of_other_makers_are_refused_by_name(name, named):
    with pytest.raises(UserError, match=named):
        HookedVisionTransformer(build_clip(model_config(name)).visual)
