"""The hooked tower equals open_clip, shows what it says, and leaves the user's model alone."""

import copy
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNormFp32, QuickGELU, VisionTransformer
from reference.hooked import sink_share, tower_activations
from torch import nn
from transformer_lens import ActivationCache
from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

from interp.hooked import HookedVisionTransformer
from interp.hooked.rows import patch_rows
from superclip.errors import UserError

TOWERS = {
    "plain": {},
    "quickgelu": {"act_layer": QuickGELU, "heads": 2},
    "no ln_pre": {"no_ln_pre": True, "width": 48, "heads": 6},
    "LayerScale": {"ls_init_value": 0.7, "heads": 1},
    "avg": {"pool_type": "avg", "layers": 2},
    "norm after pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "tok, norm after pool": {"final_ln_after_pool": True},
    "oblong grid": {"image_size": (24, 40), "patch_size": (8, 8)},
    "oblong patch": {"image_size": (24, 32), "patch_size": (12, 8)},
    "sin-cos": {"pos_embed_type": "sin_cos_2d", "mlp_ratio": 2.0},
    "other eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "custom block, plain": {"block_type": "custom"},
    "output_tokens": {"output_tokens": True},
}


def build(seed=0, dtype=torch.float64, **changes) -> VisionTransformer:
    """A small tower in which every parameter matters and no softmax is flat."""
    options = {
        "image_size": 24, "patch_size": 8, "width": 32, "layers": 3, "heads": 4,
        "mlp_ratio": 4.0, "output_dim": 20,
    }  # fmt: skip
    visual = VisionTransformer(**(options | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("in_proj_weight"):
                noise[: 2 * visual.transformer.width] *= 2.5  # queries and keys
            scale = 0.3 if parameter.ndim == 1 else 1.0 / parameter[0].numel() ** 0.5
            is_gain = "gamma" in name or ("ln_" in name and name.endswith("weight"))
            parameter.copy_(float(is_gain) + scale * noise)
    return visual.to(dtype).eval()


def pictures(visual, n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, *visual.image_size, generator=generator)
    return images.to(visual.conv1.weight.dtype)


def own(visual, images):
    out = visual(images)
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture(scope="module")
def tower():
    return HookedVisionTransformer(build())


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=["fp64", "fp32"]
)
def test_equals_open_clip(options, dtype, limit):
    visual = build(dtype=dtype, **options)
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    with torch.no_grad():
        expected = own(visual, images)
        explicit, _ = tower.run_with_cache(images, names_filter=list(tower.hook_dict))
        resumed = tower(tower(images, stop_at_layer=2), start_at_layer=2)
        assert tower.class_attention(images).rows.std(dim=-1).mean() > 0.05  # softmax is not flat
        for features in (tower(images), explicit, resumed):
            assert (features - expected).abs().max() <= limit * expected.abs().max()


def test_equals_open_clip_with_float32_norms():
    visual = build(dtype=torch.float32, norm_layer=partial(LayerNormFp32, eps=1e-4))
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    torch.testing.assert_close(tower(images), visual(images), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_in_direction(dtype):
    visual = build(dtype=dtype)
    images = pictures(visual)
    with torch.no_grad():
        features, expected = HookedVisionTransformer(visual)(images), visual(images)
    assert features.dtype == dtype
    assert (torch.cosine_similarity(features.float(), expected.float()) > 0.999).all()


def test_without_projection_the_pooled_vector_comes_out():
    visual = build()
    visual.prune_intermediate_layers(2, prune_head=True)
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    assert tower.cfg.embed_dim == tower.cfg.d_model == 32
    torch.testing.assert_close(tower(images), visual(images), rtol=0, atol=1e-10)


def test_tower_of_a_model_config():
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(48, vision, text, quick_gelu=True)
    cfg = HookedVisionTransformer(model.visual).cfg
    assert (cfg.n_heads, cfg.d_head, cfg.grid, cfg.n_ctx) == (4, 16, (4, 4), 17)
    assert (cfg.activation, cfg.embed_dim, cfg.d_mlp) == ("QuickGELU", 48, 256)


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
def test_activations_equal_the_naive_tower(options):
    visual = build(**options)
    tower, images = HookedVisionTransformer(visual), pictures(visual, n=2)
    with torch.no_grad():
        features, cache = tower.run_with_cache(images)
        class_rows, patch_mean = tower.class_attention(images), tower.patch_attention(images)
        for i, image in enumerate(images):
            naive = tower_activations(visual, image)
            torch.testing.assert_close(features[i], naive["features"])
            for layer in range(tower.cfg.n_layers):
                pattern = naive["pattern"][layer]
                torch.testing.assert_close(cache["pattern", layer][i], pattern)
                torch.testing.assert_close(cache["z", layer][i], naive["z"][layer])
                resid = naive["resid_post"][layer]
                torch.testing.assert_close(cache["resid_post", layer][i], resid)
                torch.testing.assert_close(class_rows.rows[i, layer], pattern[:, 0])
                torch.testing.assert_close(patch_mean.rows[i, layer], pattern[:, 1:].mean(dim=1))
                norms = resid.norm(dim=-1)[1:].numpy()
                received = pattern[:, 0, 1:].mean(dim=0).numpy()
                for head in range(tower.cfg.n_heads):
                    share = sink_share(pattern[head, 0, 1:].numpy(), norms, received)
                    assert class_rows.sink[i, layer, head].item() == pytest.approx(share)


def test_a_planted_high_norm_patch_is_the_sink(tower):
    images = pictures(tower.visual)

    def outlier(x, hook):
        x = x.clone()
        x[:, 5] += 1e3 * torch.linspace(-1, 1, x.shape[-1])
        return x

    with torch.no_grad(), tower.hooks([("blocks.1.hook_resid_post", outlier)]):
        out = tower.class_attention(images)
    patches = out.rows[:, 2, :, 1:]
    torch.testing.assert_close(out.sink[:, 2], patches[..., 4] / patches.sum(dim=-1))


def test_patch_rows_do_not_depend_on_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 10, 3, 4, generator=generator, dtype=torch.float64) for _ in "qk")
    whole = patch_rows(q, k, prefix_tokens=1)
    monkeypatch.setattr("interp.hooked.rows.SCORE_BUDGET", 2 * 3 * 10 * 4)  # 4, 4 and 1 queries
    torch.testing.assert_close(patch_rows(q, k, prefix_tokens=1), whole)


def test_fast_rows_leave_the_features_bit_equal(tower):
    images = pictures(tower.visual)
    with torch.no_grad():
        plain = tower(images)
        for out in (tower.class_attention(images), tower.patch_attention(images)):
            assert torch.equal(out.features, plain)
            torch.testing.assert_close(out.rows.sum(dim=-1), torch.ones_like(out.rows[..., 0]))


def test_fast_rows_see_hooked_queries_and_refuse_hooked_patterns(tower):
    images = pictures(tower.visual)

    def flat(q, hook):
        return torch.zeros_like(q)

    with torch.no_grad(), tower.hooks([("blocks.1.attn.hook_q", flat)]):
        rows = tower.class_attention(images).rows
    torch.testing.assert_close(rows[:, 1], torch.full_like(rows[:, 1], 0.1))
    with (
        pytest.raises(UserError, match="cache 'pattern'"),
        tower.hooks([("blocks.1.attn.hook_pattern", flat)]),
    ):
        tower.class_attention(images)


def test_rows_of_a_bfloat16_tower_are_float32():
    visual = build(dtype=torch.bfloat16)
    out = HookedVisionTransformer(visual).class_attention(pictures(visual))
    assert out.rows.dtype == out.sink.dtype == torch.float32


FUSED = [
    "hook_embed", "hook_pos_embed", "hook_full_embed", "hook_ln_pre", "hook_pooled", "hook_proj",
    *(f"blocks.1.attn.hook_{site}" for site in "qkvz"), "blocks.1.hook_attn_out",
    "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out",
    *(f"blocks.1.hook_resid_{place}" for place in ("pre", "mid", "post")),
]  # fmt: skip


def test_recording_changes_no_bit_where_the_kernel_stays_fused():
    tower = HookedVisionTransformer(build(dtype=torch.float32))
    images = pictures(tower.visual)
    with torch.no_grad():
        plain = tower(images)
        recorded, cache = tower.run_with_cache(images, names_filter=FUSED)
    assert sorted(cache) == sorted(FUSED)
    assert torch.equal(recorded, plain)


def test_sites_and_shapes(tower):
    images, cfg = pictures(tower.visual), tower.cfg
    _, cache = tower.run_with_cache(images, names_filter=list(tower.hook_dict))
    b, t, d, h, e = len(images), cfg.n_ctx, cfg.d_model, cfg.n_heads, cfg.d_head
    stream, head, square = (b, t, d), (b, t, h, e), (b, h, t, t)
    outside = {
        "hook_embed": stream, "hook_pos_embed": stream, "hook_full_embed": stream,
        "hook_ln_pre": stream, "ln_final.hook_scale": (b, t, 1), "ln_final.hook_normalized": stream,
        "hook_pooled": (b, d), "hook_proj": (b, cfg.embed_dim),
    }  # fmt: skip
    inside = {
        "hook_resid_pre": stream, "ln1.hook_scale": (b, t, 1), "ln1.hook_normalized": stream,
        "attn.hook_q": head, "attn.hook_k": head, "attn.hook_v": head, "attn.hook_z": head,
        "attn.hook_attn_scores": square, "attn.hook_pattern": square,
        "attn.hook_result": (b, t, h, d), "hook_attn_out": stream, "hook_resid_mid": stream,
        "ln2.hook_scale": (b, t, 1), "ln2.hook_normalized": stream,
        "mlp.hook_pre": (b, t, cfg.d_mlp), "mlp.hook_post": (b, t, cfg.d_mlp),
        "hook_mlp_out": stream, "hook_resid_post": stream,
    }  # fmt: skip
    expected = outside | {
        f"blocks.{layer}.{site}": shape
        for layer in range(cfg.n_layers)
        for site, shape in inside.items()
    }
    assert {name: tuple(value.shape) for name, value in cache.items()} == expected
    assert torch.equal(cache["hook_ln_pre"], cache["resid_pre", 0])
    scores = cache["q", 1][:, :, 2] @ cache["k", 1][:, :, 2].mT / e**0.5
    torch.testing.assert_close(cache["attn_scores", 1][:, 2], scores)
    assert isinstance(cache, ActivationCache)
    assert torch.equal(cache["pattern", -1], cache["blocks.2.attn.hook_pattern"])


def test_default_cache_leaves_out_results_and_what_is_not_reached(tower):
    images = pictures(tower.visual)
    _, cache = tower.run_with_cache(images)
    left_out = set(tower.hook_dict) - set(cache)
    assert left_out == {f"blocks.{layer}.attn.hook_result" for layer in range(3)}
    _, cache = tower.run_with_cache(cache["resid_pre", 2], start_at_layer=2)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks")} == {"2"}
    assert "hook_embed" not in cache and "hook_proj" in cache
    stream, cache = tower.run_with_cache(images, stop_at_layer=1)
    assert torch.equal(stream, cache["resid_post", 0])
    assert "blocks.1.hook_resid_pre" not in cache and "hook_proj" not in cache


def test_weights_are_views_in_transformer_lens_layout(tower):
    _, cache = tower.run_with_cache(pictures(tower.visual))
    for layer in range(tower.cfg.n_layers):
        attn, source = tower.blocks[layer].attn, tower.visual.transformer.resblocks[layer].attn
        y = cache["normalized", layer, "ln1"]
        y = y * (norm := tower.visual.transformer.resblocks[layer].ln_1).weight + norm.bias
        for site, weight, bias in (
            ("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K), ("v", attn.W_V, attn.b_V)
        ):  # fmt: skip
            assert weight.shape == (4, 32, 8) and bias.shape == (4, 8)
            assert weight.untyped_storage().data_ptr() == source.in_proj_weight.data_ptr()
            value = torch.einsum("btm,hmd->bthd", y, weight) + bias
            torch.testing.assert_close(cache[site, layer], value)
        assert attn.W_O.shape == (4, 8, 32)
        assert attn.W_O.untyped_storage().data_ptr() == source.out_proj.weight.data_ptr()
        out = torch.einsum("bthd,hdm->btm", cache["z", layer], attn.W_O) + attn.b_O
        torch.testing.assert_close(cache["attn_out", layer], out)


def test_parameters_are_shared_and_the_users_model_is_untouched():
    visual = build().train()
    before = copy.deepcopy(visual.state_dict())
    hooks_before = [len(m._forward_hooks) for m in visual.modules()]
    images = pictures(visual)
    expected = visual(images).detach()
    tower = HookedVisionTransformer(visual)
    tower.eval()
    tower.run_with_cache(images)
    assert visual.training and all(m.training for m in visual.modules())
    assert list(visual.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())
    assert [len(m._forward_hooks) for m in visual.modules()] == hooks_before
    assert torch.equal(visual(images), expected)
    assert list(tower.parameters()) == [] and tower.state_dict() == {}
    with torch.no_grad():
        visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(2)
    torch.testing.assert_close(tower(images), visual(images), rtol=0, atol=1e-10)
    with pytest.raises(UserError, match=r"tower\.visual"):
        tower.float()


def test_a_hook_that_writes_in_place_does_not_reach_the_parameters(tower):
    before = copy.deepcopy(tower.visual.state_dict())

    def overwrite(x, hook):
        x[...] = 7.0

    with torch.no_grad():
        for name in tower.hook_dict:
            tower.run_with_hooks(pictures(tower.visual, n=1), fwd_hooks=[(name, overwrite)])
    assert all(torch.equal(v, before[name]) for name, v in tower.visual.state_dict().items())


@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_equal_open_clip(explicit):
    visual = build(ls_init_value=0.5)
    tower, images = HookedVisionTransformer(visual), pictures(visual).requires_grad_()
    names = ["class_embedding", "transformer.resblocks.0.attn.in_proj_weight", "proj"]
    wanted = [images, *(visual.get_parameter(name) for name in names)]
    expected = torch.autograd.grad(visual(images).square().sum(), wanted)
    site = "attn.hook_pattern" if explicit else "attn.hook_q"
    seen = {}
    hook = (lambda name: name.endswith(site), lambda grad, hook: seen.update({hook.name: grad}))
    with tower.hooks(bwd_hooks=[hook]):
        grads = torch.autograd.grad(tower(images).square().sum(), wanted)
    torch.testing.assert_close(grads, expected)
    assert len(seen) == tower.cfg.n_layers and all(g.abs().max() > 0 for g in seen.values())


@pytest.mark.parametrize(
    "site",
    [
        *("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result"),
        *("ln1.hook_scale", "ln2.hook_normalized", "hook_mlp_out"),
    ],
)
def test_interventions_change_the_output_and_leave_nothing(tower, site):
    images = pictures(tower.visual)
    with torch.no_grad():
        plain = tower(images)
        double = [(f"blocks.1.{site}", lambda x, hook: 2 * x)]
        assert (tower.run_with_hooks(images, fwd_hooks=double) - plain).abs().max() > 1e-3
        with pytest.raises(RuntimeError, match="stop"), tower.hooks(double):
            tower(images)
            raise RuntimeError("stop")
        assert not tower.list_hooks() and not tower.is_caching
        assert torch.equal(tower(images), plain)


def test_hooks_that_match_or_fire_never_are_errors(tower):
    images = pictures(tower.visual)

    def keep(x, hook):
        return x

    with pytest.raises(UserError, match=r"did you mean 'blocks.1.attn.hook_z'"):
        tower.run_with_hooks(images, fwd_hooks=[("blocks.1.attn.hook_y", keep)])
    with pytest.raises(UserError, match="did you mean"):
        tower.run_with_cache(images, names_filter=["hook_embed", "blocks.1.hook_resid_preX"])
    with pytest.raises(UserError, match="matches no hook point"):
        tower.run_with_cache(images, names_filter=lambda name: "sae" in name)
    with pytest.raises(UserError, match="matches no hook point"):
        tower.add_hook(lambda name: False, keep)
    with pytest.raises(UserError, match="no hook point"):
        tower.add_hook("blocks.1", keep)
    with (
        pytest.raises(UserError, match=r"'?hook_embed'? never fired"),
        tower.hooks([("hook_embed", keep), ("blocks.1.hook_resid_pre", keep)]),
    ):
        tower(tower.visual.positional_embedding[None], start_at_layer=1)
    with pytest.raises(UserError, match="never fired"), tower.hooks([("hook_embed", keep)]):
        pass
    with pytest.raises(UserError, match="never fired"):
        tower.run_with_hooks(images, bwd_hooks=[("hook_proj", keep)])
    assert not tower.list_hooks()


def test_added_hooks_stay_until_reset(tower):
    images = pictures(tower.visual)
    plain = tower(images)
    tower.add_hook("hook_proj", lambda x, hook: 2 * x)
    torch.testing.assert_close(tower(images), 2 * plain)
    tower.reset_hooks()
    torch.testing.assert_close(tower(images), plain)


def poisoned(visual):
    visual.transformer.resblocks[1].attn.register_forward_hook(lambda m, i, o: (2 * o[0], None))
    return visual


def with_nan(visual):
    with torch.no_grad():
        visual.proj[0, 0] = torch.nan
    return visual


def widened(visual):
    class OtherBlock(type(visual.transformer.resblocks[0])):
        pass

    visual.transformer.resblocks[1].__class__ = OtherBlock
    return visual


REFUSED = {
    "attn_pool": (lambda: build(attentional_pool=True, output_dim=32), "attn_pool"),
    "ln_q": (lambda: build(qk_norm=True), r"attn\.ln_q"),
    "logit_scale": (lambda: build(scaled_cosine_attn=True), r"attn\.logit_scale"),
    "head_scale": (lambda: build(scale_heads=True), r"attn\.head_scale"),
    "ln_inner": (lambda: build(scale_attn_inner=True), r"attn\.ln_inner"),
    "ln_attn": (lambda: build(scale_attn=True), "ln_attn"),
    "mlp.ln": (lambda: build(scale_fc=True), r"mlp\.ln"),
    "pool none": (lambda: build(pool_type="none"), "pool_type 'none'"),
    "patch dropout": (lambda: build(patch_dropout=0.5).train(), r"visual\.eval"),
    "resnet": (lambda: ModifiedResNet([1, 1, 1, 1], 8, 2, 32, 8), "ResNet"),
    "another module": (lambda: nn.Linear(2, 2), "Linear"),
    "another norm": (lambda: build(norm_layer=nn.RMSNorm), "RMSNorm"),
    "another block": (lambda: widened(build()), "OtherBlock"),
    "changed forward": (lambda: poisoned(build()), "fused forward misses"),
    "weights not finite": (lambda: with_nan(build()), "nan"),
}  # fmt: skip


@pytest.mark.parametrize("make, named", REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_does_not_model(make, named):
    with pytest.raises(UserError, match=named):
        HookedVisionTransformer(make())


def test_bad_input_is_named(tower):
    images = pictures(tower.visual)
    with pytest.raises(UserError, match=r"takes \[batch, 3, 24, 24\]"):
        tower(images[..., :16])
    with pytest.raises(UserError, match=r"\[batch, 10, 32\]"):
        tower(images, start_at_layer=1)
    for span in ({"start_at_layer": 4}, {"stop_at_layer": -1}):
        with pytest.raises(UserError, match="0 to 3"):
            tower(images, **span)
    visual = build(patch_dropout=0.5)
    dropping = HookedVisionTransformer(visual)
    visual.train()
    with pytest.raises(UserError, match="patch dropout"):
        dropping(images)


@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
def test_cache_decomposes_the_stream(options):
    visual = build(**options)
    tower, images = HookedVisionTransformer(visual), pictures(visual)
    _, cache = tower.run_with_cache(images)
    n = tower.cfg.n_layers
    parts, labels = cache.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(dim=0), cache["resid_post", n - 1])
    embeds = ["embed", "pos_embed"] + ["ln_pre_bias"] * ("no_ln_pre" not in options)
    assert labels[: len(embeds)] == embeds and len(labels) == len(embeds) + 2 * n
    torch.testing.assert_close(
        cache.decompose_resid(1, mlp_input=True).sum(dim=0), cache["resid_mid", 1]
    )
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels[-1] == f"L{n - 1}H{tower.cfg.n_heads - 1}"
    bias = sum(
        block.attn.out_proj.bias * getattr(block.ls_1, "gamma", 1.0)
        for block in visual.transformer.resblocks
    )
    attention = cache.decompose_resid(mode="attn", incl_embeds=False).sum(dim=0)
    torch.testing.assert_close(heads.sum(dim=0) + bias, attention)
    _, asked = tower.run_with_cache(images, names_filter=lambda name: "hook_result" in name)
    for layer in range(n):
        torch.testing.assert_close(asked["result", layer], cache["result", layer])


def test_cache_functions_of_transformer_lens(tower):
    images = pictures(tower.visual)
    features, cache = tower.run_with_cache(images)
    norm, proj = tower.visual.ln_post, tower.visual.proj
    parts = cache.decompose_resid(apply_ln=True)  # divided by the final scale
    direct = (parts.sum(dim=0)[:, 0] * norm.weight + norm.bias) @ proj
    torch.testing.assert_close(direct, features)
    class_only = cache.decompose_resid(apply_ln=True, pos_slice=0)
    torch.testing.assert_close(class_only, parts[..., 0, :])
    lens, labels = cache.accumulated_resid(apply_ln=True, incl_mid=True, return_labels=True)
    assert labels[-1] == "final_post"
    torch.testing.assert_close(lens[-1, :, 0] @ proj, features)
    torch.testing.assert_close(lens[2], norm(cache["resid_pre", 1]))
    into_mlp = cache.accumulated_resid(1, mlp_input=True, apply_ln=True)
    torch.testing.assert_close(into_mlp[-1], cache["normalized", 1, "ln2"])
    first = cache.apply_slice_to_batch_dim(0)
    torch.testing.assert_close(first.decompose_resid(apply_ln=True), parts[:, 0])
    _, single = tower.run_with_cache(images[:1], remove_batch_dim=True)
    torch.testing.assert_close(single.stack_head_results(), cache.stack_head_results()[:, 0])
    for refused in (cache.logit_attrs, cache.get_full_resid_decomposition):
        with pytest.raises(UserError, match="decompose_resid"):
            refused()


def test_decomposition_that_would_be_wrong_is_refused(tower):
    images = pictures(tower.visual)
    double = ("blocks.1.hook_resid_mid", lambda x, hook: 2 * x)
    with tower.hooks([double]):
        _, cache = tower.run_with_cache(images)
    with pytest.raises(UserError, match="intervened"):
        cache.decompose_resid()
    _, partial_cache = tower.run_with_cache(images, names_filter="hook_embed")
    with pytest.raises(UserError, match="hook_pos_embed"):
        partial_cache.decompose_resid()
    with pytest.raises(UserError, match="incl_embeds"):
        partial_cache.decompose_resid(0, incl_embeds=False)
    after = HookedVisionTransformer(build(final_ln_after_pool=True))
    _, cache = after.run_with_cache(images)
    with pytest.raises(UserError, match="pools before"):
        cache.stack_head_results(apply_ln=True)


def test_head_patching_of_transformer_lens_runs(tower):
    clean, corrupt = pictures(tower.visual, seed=1), pictures(tower.visual, seed=2)
    with torch.no_grad():
        _, cache = tower.run_with_cache(clean)
        grid = get_act_patch_attn_head_out_all_pos(tower, corrupt, cache, lambda out: out.sum())
        z = cache["z", 2].clone()

        def one_head(value, hook):
            return torch.cat([value[:, :, :3], z[:, :, 3:]], dim=2)

        expected = tower.run_with_hooks(corrupt, fwd_hooks=[("blocks.2.attn.hook_z", one_head)])
    assert grid.shape == (3, 4) and np.ptp(grid.numpy()) > 0
    torch.testing.assert_close(grid[2, 3].double(), expected.sum(), rtol=1e-5, atol=1e-5)
