"""Direct effects: they sum to the output, equal the naive ones, and are what direct paths carry."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.causal import features_without_sets
from reference.direct import direct_parts
from test_hooked import TOWERS, build, pictures

from interp.causal.ablation import ablate, contrastive_margin
from interp.causal.direct import (
    CAPTIONS,
    caption_directions,
    cosines,
    decompose,
    decompose_heads,
    direct_ablation,
    direct_effects,
    head_patch_map,
    repair,
)
from interp.causal.units import Ablation, mean_activations
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError

# One tower for each way to pool, normalise and embed.
READOUTS = {
    name: TOWERS[name]
    for name in (
        *("plain", "quickgelu", "no ln_pre", "LayerScale", "avg", "norm after pool"),
        *("tok, norm after pool", "oblong grid", "other eps"),
    )
}


def every_head(tower):
    return [Head(i, h) for i in range(tower.cfg.n_layers) for h in range(tower.cfg.n_heads)]


def texts(n, seed=0, width=20):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, dtype=torch.float64, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def tower():
    return HookedVisionTransformer(build())


@pytest.mark.parametrize("options", READOUTS.values(), ids=READOUTS)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_parts_sum_to_the_output(options, dtype, limit):
    tower = HookedVisionTransformer(build(dtype=dtype, **options))
    images = pictures(tower.visual)
    parts = decompose(tower, images)
    patches = decompose_heads(tower, images, every_head(tower))
    with torch.no_grad():
        features = tower(images)
    assert torch.equal(parts.total, features)
    for found, whole in ((parts.sum(), features), (patches.sum(), parts.heads.flatten(1, 2))):
        assert (found - whole).abs().max() <= limit * features.abs().max()


@pytest.mark.parametrize("options", READOUTS.values(), ids=READOUTS)
def test_parts_equal_the_naive_ones(options):
    tower = HookedVisionTransformer(build(**options))
    images = pictures(tower.visual, n=2)
    parts, maps = decompose(tower, images), decompose_heads(tower, images, every_head(tower))
    grid = maps.patches.flatten(-2)
    with torch.no_grad():
        for i, image in enumerate(images):
            naive = direct_parts(tower.visual, image)
            for k, head in enumerate(every_head(tower)):
                tokens = torch.stack(naive[str(head)], dim=-1)
                naive[str(head)] = tokens.sum(dim=-1)
                torch.testing.assert_close(maps.class_token[i, k], tokens[:, 0])
                torch.testing.assert_close(grid[i, k], tokens[:, 1:])
            named = parts.named()
            if "no_ln_pre" in options:
                assert not named.pop("ln_pre_bias").any()
            assert set(named) == set(naive)
            for name, part in named.items():
                torch.testing.assert_close(part[i], naive[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", READOUTS.values(), ids=READOUTS)
def test_cosines_split_as_the_vectors_do(options):
    tower = HookedVisionTransformer(build(**options))
    images, classes = pictures(tower.visual), texts(4)
    own = torch.stack([classes, classes.flip(0), -2 * classes])
    heads = [Head(1, 0), Head(0, 0), Head(1, 0)]
    parts, tokens = decompose(tower, images), decompose_heads(tower, images, heads)
    vectors, norm = torch.stack([*parts.named().values()]), parts.total.norm(dim=-1)[:, None]
    for given in (classes, own, lambda features: own * features.std()):
        directions = given if isinstance(given, torch.Tensor) else given(parts.total)
        found = direct_effects(tower, images, given)
        per_image = directions.expand(3, -1, -1)
        expected = torch.einsum("pbe,bke->pbk", vectors, per_image) / norm
        torch.testing.assert_close(torch.stack([*found.named().values()]), expected)
        torch.testing.assert_close(found.total, cosines(parts.total, directions))
        naive = (F.normalize(parts.total, dim=-1)[:, None] * per_image).sum(dim=-1)
        torch.testing.assert_close(found.total, naive)
        seen = head_patch_map(tower, images, given, heads)
        patches = torch.einsum("bherc,bke->bhkrc", tokens.patches, per_image)
        torch.testing.assert_close(seen.patches, patches / norm[..., None, None, None])
        torch.testing.assert_close(seen.sum()[:, 1], found.heads[:, 0, 0])
        assert seen.patches.shape[3:] == tower.cfg.grid and seen.patches.abs().max() > 1e-4
        assert torch.equal(seen.patches[:, 0], seen.patches[:, 2])


@pytest.mark.parametrize("name", ["plain", "LayerScale", "avg", "norm after pool"])
def test_a_direct_part_is_what_the_direct_path_carries(name):
    """Ablating a head while all that reads it is held changes its own part of the output alone."""
    tower = HookedVisionTransformer(build(**TOWERS[name]))
    images, classes = pictures(tower.visual), texts(4)
    n_layers = tower.cfg.n_layers
    mean, _ = mean_activations(tower, [pictures(tower.visual, n=6, seed=5)])
    with torch.no_grad():
        features, cache = tower.run_with_cache(images)
        _, scale = tower.run_with_cache(images, names_filter="ln_final.hook_scale")
    parts = decompose(tower, images)

    def hold(value, hook):
        return (scale if hook.name == "ln_final.hook_scale" else cache)[hook.name]

    for kind, means in (("zero", None), ("mean", mean)):
        for tokens in ("all", "class"):
            change = direct_ablation(tower, images, classes, Ablation(kind, tokens, means))
            assert change.shape == (3, n_layers, tower.cfg.n_heads, 4)
            for head in (Head(0, 0), Head(n_layers - 1, tower.cfg.n_heads - 1)):
                held = [f"blocks.{layer}.hook_mlp_out" for layer in range(head.layer, n_layers)]
                held += [f"blocks.{layer}.attn.hook_z" for layer in range(head.layer + 1, n_layers)]
                hooks = [(site, hold) for site in (*held, "ln_final.hook_scale")]
                with (
                    torch.no_grad(),
                    tower.hooks(hooks),
                    ablate(tower, [head], kind, means, tokens),
                ):
                    without = tower(images)
                part = parts.heads[:, head.layer, head.index]
                if kind == "zero" and (tokens == "all" or tower.cfg.pool_type == "tok"):
                    torch.testing.assert_close(features - without, part)
                    assert part.abs().max() > 1e-3
                moved = cosines(without, classes) - cosines(features, classes)
                torch.testing.assert_close(change[:, head.layer, head.index], moved)


def test_caption_directions_give_the_margin(tower):
    images, captions = pictures(tower.visual, n=5), texts(11)
    owner = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
    rows = torch.tensor([3, 0])
    with torch.no_grad():
        features = tower(images)
    margin = contrastive_margin(features, captions, owner)[rows]
    given = partial(caption_directions, text_features=7 * captions, owner=owner, rows=rows)
    found = direct_effects(tower, images[rows], given)
    torch.testing.assert_close(found.total[:, CAPTIONS.index("margin")], margin)
    own = (F.normalize(features[3], dim=0) @ captions[owner == 3].T).mean()
    torch.testing.assert_close(found.total[0, CAPTIONS.index("own")], own)
    torch.testing.assert_close(found.heads[..., 0] - found.heads[..., 1], found.heads[..., 2])
    for owners in (torch.tensor([3] * 11), torch.tensor([0] * 11)):
        with pytest.raises(UserError, match="caption of its own"):
            caption_directions(features[rows], captions, owners, rows)


def test_repair_by_hand():
    direct = np.array([[-2.0, 1.0], [-1.0, -1.0], [0.0, -4.0]])
    total = np.array([[-0.5, 1.5], [0.5, -1.0], [3.0, -2.0]])
    found = repair(direct, total)
    assert found.indirect.tolist() == [[1.5, 0.5], [1.5, 0.0], [3.0, 2.0]]
    assert found.repaired.tolist() == [[1.5, -0.5], [1.5, 0.0], [0.0, 2.0]]
    with pytest.raises(UserError, match=r"\(3, 2\).*\(3,\)"):
        repair(direct, total[:, 0])


def test_direct_and_total_effects_meet_in_one_table(tower):
    """The pair that `repair` takes, made as a command makes it."""
    images, classes = pictures(tower.visual), texts(2)
    heads = every_head(tower)
    bank = features_without_sets(tower, images, [[], *([h] for h in heads)])
    total = (cosines(bank[1:], classes) - cosines(bank[0], classes)).movedim(0, 1)
    direct = direct_ablation(tower, images, classes, Ablation()).flatten(1, 2)
    found = repair(direct[..., 0].numpy(), total[..., 0].numpy())
    assert found.repaired.shape == (3, 12) and np.abs(found.indirect).max() > 1e-3


def test_one_forward_pass_that_leaves_the_model_alone():
    visual = build().train()
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    tower(images).sum().backward()
    before, passes = copy.deepcopy(visual.state_dict()), []
    gradients = [p.grad.clone() for p in visual.parameters()]
    plain = tower(images)
    with tower.hooks([("hook_embed", lambda x, hook: passes.append(1))]):
        found = direct_effects(tower, images, texts(2))
    assert len(passes) == 1 and not found.heads.requires_grad and not tower.list_hooks()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(direct_effects(tower, images, texts(2)).heads, found.heads)
    assert visual.training and torch.equal(tower(images), plain)
    assert all(torch.equal(x, before[name]) for name, x in visual.state_dict().items())
    assert all(map(torch.equal, [p.grad for p in visual.parameters()], gradients))


def test_interventions_that_the_sum_can_and_cannot_see(tower):
    images = pictures(tower.visual)
    with ablate(tower, [Head(1, 2)], "zero"):
        parts = decompose(tower, images)
        with torch.no_grad():
            assert torch.equal(parts.total, tower(images))
    assert not parts.heads[:, 1, 2].any() and parts.heads[:, 2].abs().min() > 0
    for site in ("blocks.1.hook_resid_mid", "ln_final.hook_scale", "hook_proj"):
        with (
            tower.hooks([(site, lambda x, hook: 2 * x)]),
            pytest.raises(UserError, match="parts miss the output"),
        ):
            decompose(tower, images)
    with (
        tower.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: x.roll(1, dims=-1))]),
        pytest.raises(UserError, match="parts miss the heads of layer 1"),
    ):
        decompose_heads(tower, images, [Head(1, 0)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_to_its_own_rounding(dtype):
    tower = HookedVisionTransformer(build(dtype=dtype))
    parts = decompose(tower, pictures(tower.visual))
    assert parts.heads.dtype == torch.float32
    assert (F.cosine_similarity(parts.sum(), parts.total) > 0.999).all()


def test_a_tower_without_projection():
    visual = build()
    visual.prune_intermediate_layers(2, prune_head=True)
    tower = HookedVisionTransformer(visual)
    parts = decompose(tower, pictures(visual))
    torch.testing.assert_close(parts.sum(), parts.total)
    assert parts.total.shape == (3, 32)


def test_bad_requests_are_named(tower):
    images = pictures(tower.visual)
    for wrong in (texts(4, width=19), texts(4).expand(2, -1, -1), texts(4)[0]):
        with pytest.raises(UserError, match=r"\[direction, 20\]"):
            direct_effects(tower, images, lambda features, wrong=wrong: wrong)
    with pytest.raises(UserError, match="zero or mean"):
        direct_ablation(tower, images, texts(2), Ablation("resample"))
    with pytest.raises(UserError, match="needs mean_z"):
        direct_ablation(tower, images, texts(2), Ablation("mean"))
    with pytest.raises(UserError, match="no head"):
        decompose_heads(tower, images, [])
    with pytest.raises(UserError, match="L3H0"):
        head_patch_map(tower, images, texts(2), [Head(0, 0), Head(3, 0)])
