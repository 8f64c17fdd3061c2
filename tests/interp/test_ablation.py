"""Ablating heads: against the naive tower, the zeroed weights, and hand-made scores."""

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from reference.hooked import margins, tower_activations

from interp.causal.ablation import ablate, contrastive_margin
from interp.causal.units import mean_activations
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError

HEADS = [Head(2, 1), Head(0, 3), Head(2, 0)]


@pytest.fixture(scope="module")
def visual():
    tower = VisionTransformer(24, 8, 32, 3, 4, 4.0, ls_init_value=0.8, output_dim=20)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if parameter.ndim == 1 else noise / 4)
    return tower.double().eval()


@pytest.fixture(scope="module")
def tower(visual):
    return HookedVisionTransformer(visual)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 24, 24, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def means(tower, images):
    return mean_activations(tower, images.split(2))[0]


def test_means_are_those_over_images(visual, images, means):
    with torch.no_grad():
        naive = [torch.stack(tower_activations(visual, image)["z"]) for image in images]
    assert means.shape == (3, 10, 4, 8) and means.dtype == torch.float64
    torch.testing.assert_close(means, torch.stack(naive).mean(dim=0))


@pytest.mark.parametrize("tokens", ["all", "class"])
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_ablation_equals_the_naive_tower(visual, tower, images, means, kind, tokens):
    given = means if kind == "mean" else None
    with torch.no_grad(), ablate(tower, HEADS, kind, given, tokens):
        features = tower(images)
    with torch.no_grad():
        for image, feature in zip(images, features, strict=True):
            replace = {}
            for head in sorted(HEADS):  # a later head's class-only z depends on the earlier ones
                value = means[head.layer, :, head.index] if kind == "mean" else torch.zeros(10, 8)
                if tokens == "class":
                    z = tower_activations(visual, image, replace)["z"][head.layer][:, head.index]
                    value = torch.cat([value[:1], z[1:]])
                replace[head.layer, head.index] = value
            expected = tower_activations(visual, image, replace)["features"]
            torch.testing.assert_close(feature, expected, rtol=1e-10, atol=1e-10)
        assert (features - tower(images)).abs().max() > 1e-3


def test_zero_ablation_equals_a_zeroed_output_projection(visual, tower, images):
    with torch.no_grad():
        with ablate(tower, HEADS, "zero"):
            hooked = tower(images)
        slices = [
            visual.transformer.resblocks[h.layer].attn.out_proj.weight[:, 8 * h.index :][:, :8]
            for h in HEADS
        ]
        kept = [piece.clone() for piece in slices]
        for piece in slices:
            piece.zero_()
        zeroed = visual(images)
        for piece, weight in zip(slices, kept, strict=True):
            piece.copy_(weight)
    torch.testing.assert_close(hooked, zeroed, rtol=1e-10, atol=1e-10)


def test_ablation_leaves_nothing_even_on_error(tower, images):
    with torch.no_grad():
        plain = tower(images)
        with pytest.raises(RuntimeError, match="stop"), ablate(tower, HEADS, "zero"):
            raise RuntimeError("stop")
        assert not tower.list_hooks()
        assert torch.equal(tower(images), plain)


def test_gradients_pass_through_what_is_left(visual, tower, images):
    pixels = images.clone().requires_grad_()
    with ablate(tower, [Head(2, head) for head in range(4)], "zero"):
        tower(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    in_proj = visual.transformer.resblocks[2].attn.in_proj_weight
    assert in_proj.grad is not None and not in_proj.grad.any()
    visual.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "heads, options, named",
    [
        ([], {"kind": "zero"}, "no head"),
        ([Head(3, 0)], {"kind": "zero"}, "L3H0"),
        ([Head(0, 4)], {"kind": "zero"}, "L0H4"),
        (HEADS, {"kind": "resample"}, "'resample'"),
        (HEADS, {"kind": "zero", "tokens": "patch"}, "'patch'"),
        (HEADS, {"kind": "mean"}, "needs means"),
        (HEADS, {"kind": "zero", "means": torch.zeros(3, 10, 4, 8)}, "takes no means"),
        (HEADS, {"kind": "mean", "means": torch.zeros(3, 5, 4, 8)}, r"\[3, 5, 4, 8\]"),
    ],
)
def test_bad_requests_are_named(tower, images, heads, options, named):
    with pytest.raises(UserError, match=named), ablate(tower, heads, **options):
        tower(images)


def test_margin_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[5.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 9.0]])
    owner = torch.tensor([0, 0, 1, 0])  # caption 3 is of image 0 and equals image 1's only one
    margin = contrastive_margin(images, texts, owner)
    torch.testing.assert_close(margin, torch.tensor([(1 + 0.6 + 0) / 3 - 0, 1 - 1.0]))


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_margin_equals_the_naive_one(monkeypatch, budget):
    monkeypatch.setattr("interp.causal.ablation.SIMILARITY_BUDGET", budget)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    texts = torch.randn(19, 3, dtype=torch.float64, generator=generator)
    owner = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(19) % 7))
    margin = contrastive_margin(images, texts, owner)
    torch.testing.assert_close(margin, torch.tensor(margins(images, texts, owner)).double())


def test_scores_refuse_images_without_captions():
    features, texts = torch.eye(3), torch.eye(3)
    with pytest.raises(UserError, match="1 of 3 images have no caption"):
        contrastive_margin(features, texts, torch.tensor([0, 1, 1]))
    with pytest.raises(UserError, match="outside the 3 images"):
        contrastive_margin(features, texts, torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="one of another"):
        contrastive_margin(features[:1], texts, torch.zeros(3, dtype=torch.long))
