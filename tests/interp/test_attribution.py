"""Attribution patching: the derivative it claims to be, and how far it is from exact ablation."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.causal import features_without_sets
from reference.direct import attribution as naive_attribution
from reference.direct import effects as naive_effects
from reference.hooked import tower_activations
from test_hooked import TOWERS, build, pictures

from interp.causal.ablation import ablate
from interp.causal.attribution import agreement, attribution, integrated_attribution
from interp.causal.units import Ablation, mean_activations
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError

SITES = {"heads": "blocks.{}.attn.hook_z", "mlps": "blocks.{}.hook_mlp_out"}


def direction(seed=0, n=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 20, dtype=torch.float64, generator=generator)


def margin(features, texts=None):
    """Cosine with a text of each image's own."""
    texts = direction(n=len(features)) if texts is None else texts
    return F.cosine_similarity(features, texts, dim=-1)


def linear(features):
    return (features * direction(n=len(features))).sum(dim=-1)


@pytest.fixture(scope="module")
def tower():
    return HookedVisionTransformer(build())


def ablations(tower):
    mean_z, mean_mlp = mean_activations(tower, [pictures(tower.visual, n=6, seed=5)])
    for tokens in ("all", "class"):
        yield Ablation("zero", tokens)
        yield Ablation("mean", tokens, mean_z, mean_mlp)
        yield Ablation("resample", tokens)


def stand_ins(tower, image, donor, ablation):
    """For the naive tower: what replaces each head's z in one image, `[token, d_head]` each."""
    z = tower_activations(tower.visual, image)["z"]
    others = tower_activations(tower.visual, donor)["z"]
    found = {}
    for layer in range(tower.cfg.n_layers):
        for head in range(tower.cfg.n_heads):
            value = z[layer][:, head].clone()
            at = slice(None) if ablation.tokens == "all" else 0
            if ablation.kind == "zero":
                value[at] = 0
            elif ablation.kind == "mean":
                value[at] = ablation.mean_z[layer, at, head]
            else:
                value[at] = others[layer][at, head]
            found[layer, head] = value
    return found


@pytest.mark.parametrize("name", ["quickgelu", "LayerScale", "avg"])
def test_it_is_the_derivative_towards_the_ablation(name):
    tower = HookedVisionTransformer(build(**TOWERS[name]))
    images, donors = pictures(tower.visual, n=2), pictures(tower.visual, n=2, seed=9)
    for ablation in ablations(tower):
        others = [donors] if ablation.kind == "resample" else []
        found = attribution(tower, images, margin, ablation, others)
        assert found.heads.shape == (2, tower.cfg.n_layers, tower.cfg.n_heads)
        assert found.mlps is None and not found.heads.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(found.metric, margin(tower(images)))
            for i, (image, donor) in enumerate(zip(images, donors)):
                own = partial(margin, texts=direction(n=2)[i])
                replace = stand_ins(tower, image, donor, ablation)
                for (layer, head), slope in naive_attribution(
                    tower.visual, image, own, replace
                ).items():
                    torch.testing.assert_close(
                        found.heads[i, layer, head], slope, rtol=1e-5, atol=1e-9
                    )


def test_mlps_have_their_derivative_too(tower):
    images = pictures(tower.visual)
    for ablation in ablations(tower):
        donors = [pictures(tower.visual, seed=9)] if ablation.kind == "resample" else []
        found = attribution(tower, images, margin, ablation, donors, mlps=True)
        heads = attribution(tower, images, margin, ablation, donors).heads
        torch.testing.assert_close(found.heads, heads)
        for layer in range(3):
            site = SITES["mlps"].format(layer)
            with torch.no_grad():
                _, cache = tower.run_with_cache(images, names_filter=site)
                if donors:
                    _, other = tower.run_with_cache(donors[0], names_filter=site)
                    value = other[site]
                else:
                    value = 0 if ablation.kind == "zero" else ablation.mean_mlp[layer]
                ends = []
                for step in (1e-4, -1e-4):
                    moved = cache[site] + step * (value - cache[site])
                    if ablation.tokens == "class":
                        moved = torch.cat([moved[:, :1], cache[site][:, 1:]], dim=1)
                    with tower.hooks([(site, lambda x, hook, moved=moved: moved)]):
                        ends.append(margin(tower(images)))
            slope = (ends[0] - ends[1]) / 2e-4
            torch.testing.assert_close(found.mlps[:, layer], slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "LayerScale", "avg"])
def test_it_is_exact_where_the_tower_is_linear(name):
    """Last layer, MLP and final scale held, a score linear in the output."""
    tower = HookedVisionTransformer(build(**TOWERS[name]))
    images, last = pictures(tower.visual), tower.cfg.n_layers - 1
    sites = [f"blocks.{last}.hook_mlp_out", "ln_final.hook_scale"]
    with torch.no_grad():
        _, cache = tower.run_with_cache(images, names_filter=sites)
    given = [ablation for ablation in ablations(tower) if ablation.kind != "resample"]
    with tower.hooks([(site, lambda x, hook: cache[hook.name]) for site in sites]):
        for ablation in given:
            found = [
                f(tower, images, linear, ablation) for f in (attribution, integrated_attribution)
            ]
            for head in range(tower.cfg.n_heads):
                removal = [Head(last, head)], ablation.kind, ablation.mean_z, ablation.tokens
                with torch.no_grad(), ablate(tower, *removal):
                    without = linear(tower(images))
                with torch.no_grad():
                    effect = without - linear(tower(images))
                assert effect.abs().max() > 1e-4 or (name, ablation.tokens) == ("avg", "class")
                for estimate in found:
                    torch.testing.assert_close(estimate.heads[:, last, head], effect)


def smooth(name):
    """A tower whose softmax is flat enough for few points: the others need 128 for 1e-9."""
    visual = build(**TOWERS[name])
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[: 2 * visual.transformer.width] *= 0.3
    return HookedVisionTransformer(visual)


@pytest.mark.parametrize("name", ["plain", "norm after pool"])
def test_integrated_effects_of_a_layer_sum_to_its_removal(name):
    tower = smooth(name)
    images, n_heads = pictures(tower.visual), tower.cfg.n_heads
    layers = [[Head(layer, head) for head in range(n_heads)] for layer in range(tower.cfg.n_layers)]
    for ablation in ablations(tower):
        if ablation.kind == "resample":
            continue
        given = ablation.kind, ablation.mean_z, ablation.tokens
        bank = features_without_sets(tower, images, [[], *layers], *given)
        removed = torch.stack([margin(f) for f in bank[1:]], dim=1) - margin(bank[0])[:, None]
        errors = []
        for steps in (1, 4, 16):
            found = integrated_attribution(tower, images, margin, ablation, steps=steps)
            errors.append(float((found.heads.sum(dim=-1) - removed).abs().max()))
        first_order = attribution(tower, images, margin, ablation).heads.sum(dim=-1)
        assert errors[2] < errors[1] < errors[0] < (first_order - removed).abs().max()
        assert errors[2] < 1e-9


def test_the_path_of_a_lone_head_ends_in_its_exact_effect():
    """One head a layer: completeness is about that head alone, donors and draws included."""
    tower = smooth("LayerScale")
    images = pictures(tower.visual, n=2)
    draws = [pictures(tower.visual, n=2, seed=seed) for seed in (8, 9)]
    for ablation in ablations(tower):
        donors = draws if ablation.kind == "resample" else []
        found = integrated_attribution(tower, images, margin, ablation, donors, steps=16)
        with torch.no_grad():
            for i, image in enumerate(images):
                own = partial(margin, texts=direction(n=2)[i])
                each = [
                    naive_effects(tower.visual, image, own, stand_ins(tower, image, d[i], ablation))
                    for d in donors or [images]
                ]
                for layer, head in each[0]:
                    exact = torch.stack([effect[layer, head] for effect in each]).mean()
                    error = (found.heads[i, layer, head] - exact).abs()
                    assert error < 1e-9 and exact.abs() > 1e-5


def test_draws_are_averaged(tower):
    images = pictures(tower.visual)
    draws = [pictures(tower.visual, seed=seed) for seed in (8, 9)]
    for method in (attribution, integrated_attribution):
        both = method(tower, images, margin, Ablation("resample"), draws).heads
        each = [method(tower, images, margin, Ablation("resample"), [d]).heads for d in draws]
        torch.testing.assert_close(both, sum(each) / 2)


def calls(tower, images):
    yield attribution(tower, images, margin, Ablation())
    yield attribution(tower, images, margin, Ablation(), mlps=True)
    yield integrated_attribution(tower, images, margin, Ablation())


def test_nothing_is_left_on_the_users_model():
    visual = build().train()
    frozen = visual.transformer.resblocks[1].mlp.c_fc.weight.requires_grad_(False)
    tower, images = HookedVisionTransformer(visual), pictures(visual).requires_grad_()
    tower(images).sum().backward()
    before = copy.deepcopy(visual.state_dict())
    held = {
        name: p.grad if p.grad is None else p.grad.clone() for name, p in visual.named_parameters()
    }
    pixels, plain = images.grad.clone(), tower(images).detach()
    for found in calls(tower, images):
        assert found.heads.grad_fn is None and found.metric.grad_fn is None
        assert not tower.list_hooks() and visual.training and not frozen.requires_grad
        for name, parameter in visual.named_parameters():
            assert parameter.requires_grad == (parameter is not frozen)
            grad = held[name]
            assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
        assert torch.equal(images.grad, pixels) and torch.equal(tower(images), plain)
    assert all(torch.equal(x, before[name]) for name, x in visual.state_dict().items())


def test_the_callers_context_does_not_matter(tower):
    images = pictures(tower.visual)
    plain = [found.heads for found in calls(tower, images)]
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            inside = pictures(tower.visual)  # inference tensors in inference mode
            assert all(map(torch.equal, [f.heads for f in calls(tower, inside)], plain))
    frozen = HookedVisionTransformer(build().requires_grad_(False))
    assert all(map(torch.equal, [f.heads for f in calls(frozen, images)], plain))


def test_an_estimate_on_an_ablated_tower_is_of_that_tower(tower):
    images = pictures(tower.visual)
    with ablate(tower, [Head(1, 2)], "zero"):
        found = list(calls(tower, images))
    for estimate in found:
        assert not estimate.heads[:, 1, 2].any() and estimate.heads[:, 2].abs().min() > 0


def test_half_precision_runs():
    tower = HookedVisionTransformer(build(dtype=torch.bfloat16))
    exact = HookedVisionTransformer(build(dtype=torch.float32))
    images = pictures(tower.visual)

    def metric(features):
        return margin(features.float(), direction().float())

    for method in (attribution, integrated_attribution):
        coarse = method(tower, images, metric, Ablation()).heads.flatten()
        fine = method(exact, images.float(), metric, Ablation()).heads.flatten()
        assert coarse.dtype == torch.float32
        assert F.cosine_similarity(coarse, fine, dim=0) > 0.95


def test_agreement_by_hand():
    exact = np.array([[[4.0, -3.0, 0.0], [1.0, 1.0, 1.0]], [[0.0, -1.0, 2.0], [1.0, 1.0, 1.0]]])
    means = exact.mean(axis=0)
    estimate = np.broadcast_to(np.array([[3.0, -2.0, 2.0], [0.0, 1.0, 2.0]]), (2, 2, 3))
    found = agreement(estimate, exact, top=2)
    assert (found.images, found.top, len(found.layers)) == (2, 2, 2)
    first, second = found.layers
    assert means[0].tolist() == [2, -2, 1]
    assert first.pearson == pytest.approx(np.corrcoef(means[0], [3, -2, 2])[0, 1])
    assert (first.spearman, first.relative_error) == (pytest.approx(1), pytest.approx(2 / 5))
    assert (first.recall, first.chance, first.heads) == (1, pytest.approx(2 / 3), 3)
    assert (second.pearson, second.spearman, second.recall) == (None, None, None)
    assert second.relative_error == pytest.approx(2 / 3)
    whole = found.overall
    assert (whole.recall, whole.chance, whole.heads) == (1, pytest.approx(1 / 3), 6)
    assert whole.relative_error == pytest.approx(4 / 8)
    same = agreement(exact, exact, top=9).overall
    assert (same.recall, same.chance, same.relative_error) == (1, 1, 0)
    nothing = agreement(np.zeros((2, 1, 1)), np.zeros((2, 1, 1))).overall
    assert (nothing.pearson, nothing.relative_error, nothing.recall) == (None, None, None)


def test_agreement_refuses_what_it_cannot_compare():
    effects = np.ones((4, 2, 3))
    for estimate, exact, top in ((effects[:3], effects, 2), (effects, effects, 0)):
        with pytest.raises(UserError, match="compare"):
            agreement(estimate, exact, top)
    with pytest.raises(UserError, match="compare"):
        agreement(effects[:0], effects[:0])
    with pytest.raises(UserError, match="not finite"):
        agreement(np.where(effects == 1, np.nan, 0), effects)


@pytest.mark.parametrize("method", [attribution, integrated_attribution])
def test_bad_requests_are_named(tower, method):
    images = pictures(tower.visual)
    mean_z, _ = mean_activations(tower, [images])
    for ablation, donors, named in (
        (Ablation("swap"), [], "'swap'"),
        (Ablation("zero", "patch"), [], "'patch'"),
        (Ablation("mean"), [], "needs mean_z"),
        (Ablation("zero", mean_z=mean_z), [], "takes no mean_z"),
        (Ablation("mean", mean_z=mean_z[:2]), [], r"\[2, 10, 4, 8\]"),
        (Ablation("resample"), [], "needs donors"),
        (Ablation("zero"), [images], "takes no donors"),
        (Ablation("resample"), [images[:2]], "every image"),
    ):
        with pytest.raises(UserError, match=named):
            method(tower, images, margin, ablation, donors)
    for metric, named in (
        (lambda f: f.sum(), "one score an image"),
        (lambda f: f, "one score an image"),
        (lambda f: linear(f.detach()), "no gradient"),
    ):
        with pytest.raises(UserError, match=named):
            method(tower, images, metric, Ablation())
    assert not tower.list_hooks()


def test_means_of_mlps_and_steps_are_asked_for(tower):
    images = pictures(tower.visual)
    mean_z, _ = mean_activations(tower, [images])
    with pytest.raises(UserError, match="mean_mlp"):
        attribution(tower, images, margin, Ablation("mean", mean_z=mean_z), mlps=True)
    with pytest.raises(UserError, match="0 integration steps"):
        integrated_attribution(tower, images, margin, Ablation(), steps=0)
