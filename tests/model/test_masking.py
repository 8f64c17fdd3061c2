"""Which patches a training picture keeps: counts, order, chances, ranks, and nothing in
evaluation."""

import itertools
import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare

from superclip.config import ImageReduction, ModelConfig
from superclip.errors import UserError
from superclip.model.factory import build_clip, model_config, reduced
from superclip.model.masking import mask_patches
from superclip.model.superclip import SuperCLIP
from superclip.ops.reduction import kept_patches, keys, mixed

KINDS = "random:0.5", "grid:0.25", "block:0.25"


def naive_splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python's whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64():
    numbers = [0, 1, 2**62 + 17, 2**63 - 1, -1, -(2**63)]
    found = [n % 2**64 for n in mixed(torch.tensor(numbers)).tolist()]
    assert found == [naive_splitmix(n % 2**64) for n in numbers]


@pytest.mark.parametrize(
    ("text", "side", "kept"),
    [
        ("random:0.5", 14, 98),
        ("random:0.7", 16, 179),
        ("random:0.6", 24, 345),
        ("random:0.001", 14, 1),
        ("grid:0.25", 14, 49),
        ("grid:0.111", 24, 64),
        ("block:0.25", 14, 49),
        ("block:0.5", 14, 100),
    ],
)
def test_counts(text, side, kept):
    assert ImageReduction.parse(text).kept(side) == kept
    kind = ImageReduction.parse(text).kind
    found = kept_patches(keys(0, 0, torch.arange(40)), side, kind, kept)
    assert found.shape == (40, kept) and found.min() >= 0 and found.max() < side * side
    assert (found.diff(dim=1) > 0).all()  # in their order, none twice
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize("kind", ["grid", "block"])
def test_the_shape_of_a_mask(kind):
    for row in kept_patches(keys(3, 1, torch.arange(30)), 6, kind, 9).tolist():
        ys, xs = ({v // 6 for v in row}, {v % 6 for v in row})
        assert {y * 6 + x for y, x in itertools.product(ys, xs)} == set(row)
        step = 2 if kind == "grid" else 1
        assert all(sorted(s) == list(range(min(s), min(s) + 3 * step, step)) for s in (ys, xs))


@pytest.mark.parametrize("seed,epoch", [(0, 0), (7, 3)])
def test_every_choice_is_as_likely_as_another(seed, epoch):
    """Chi-square over 10 000 draws: single patches and pairs of random masks, corners, places."""
    drawn = keys(seed, epoch, torch.arange(10_000))
    random = kept_patches(drawn, 4, "random", 4)
    alone = torch.bincount(random.flatten(), minlength=16)
    # Patches of a picture exclude each other: draws of 4 of 16 vary by 12/15 of chi-square.
    assert chisquare(alone).pvalue > 1e-3
    assert chisquare(alone).statistic / (12 / 15) < 37.7  # its 1e-3 quantile, 15 degrees
    pairs = torch.tensor(
        [[a * 16 + b for a, b in itertools.combinations(r, 2)] for r in random.tolist()]
    )
    _, counts = pairs.flatten().unique(return_counts=True)
    assert len(counts) == 120 and chisquare(counts).pvalue > 1e-3
    corners = kept_patches(drawn, 6, "grid", 9)[:, 0]
    _, counts = corners.unique(return_counts=True)
    assert len(counts) == 4 and chisquare(counts).pvalue > 1e-3
    places = kept_patches(drawn, 6, "block", 9)[:, 0]
    _, counts = places.unique(return_counts=True)
    assert len(counts) == 16 and chisquare(counts).pvalue > 1e-3


def test_seeds_epochs_and_rows_draw_anew_and_nothing_else_does():
    rows = torch.arange(64)
    base = kept_patches(keys(0, 0, rows), 8, "random", 16)
    for other in (keys(1, 0, rows), keys(0, 1, rows), keys(0, 0, rows + 64)):
        found = kept_patches(other, 8, "random", 16)
        overlap = sum(len({*a} & {*b}) for a, b in zip(base.tolist(), found.tolist())) / 64
        assert 3 < overlap < 5  # of 16 kept, 4 by chance
    order = torch.randperm(64)
    assert (kept_patches(keys(0, 0, rows[order]), 8, "random", 16) == base[order]).all()


@pytest.mark.parametrize("text", KINDS)
def test_evaluation_sees_everything_and_training_the_kept_ones(text):
    """Against a tower that is shown the kept positions alone; the state dict is the same."""
    config = model_config("scenes-vit")
    config["vision_cfg"]["image_size"] = 96  # 6 x 6 patches
    plain, masked = build_clip(config), build_clip(config)
    mask = mask_patches(masked, ImageReduction.parse(text), seed=5)
    assert plain.state_dict().keys() == masked.state_dict().keys()
    pixels, rows = torch.rand(4, 3, 96, 96), torch.tensor([3, 1, 4, 15])
    plain.eval(), masked.eval()
    mask.choose(rows, 2)
    assert torch.equal(plain.encode_image(pixels), masked.encode_image(pixels))

    masked.train()
    found = masked.encode_image(pixels)
    index = kept_patches(keys(5, 2, rows), 6, mask.kind, mask.kept)
    for picture, kept, feature in zip(pixels, index, found):
        visual = plain.visual
        tokens = visual.conv1(picture[None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([visual.class_embedding[None, None], tokens], 1)
        tokens = (tokens + visual.positional_embedding)[:, [0, *(kept + 1).tolist()]]
        pooled, _ = visual._pool(visual.transformer(visual.ln_pre(tokens)))
        torch.testing.assert_close((pooled @ visual.proj)[0], feature, atol=1e-6, rtol=1e-5)


def test_the_head_reads_the_mean_of_the_kept_patches():
    config = model_config("scenes-vit")
    clip = build_clip(config)
    mask_patches(clip, ImageReduction.parse("random:0.3"), seed=0)
    model = SuperCLIP(clip, (0.5,) * 3, (0.5,) * 3).train()
    images = torch.randint(0, 255, (2, 3, 80, 80), dtype=torch.uint8)
    model.choose_patches(torch.arange(2), 0)
    seen = []
    clip.visual.ln_post.register_forward_hook(lambda _, __, out: seen.append(out))
    _, means = model.encode_patches(images)
    assert all(out.shape[1] == 1 + 7 for out in seen if out.ndim == 3)
    torch.testing.assert_close(means, seen[0][:, 1:].mean(1))


COMPILED = """
import torch
from superclip.config import ImageReduction
from superclip.model.factory import build_clip, model_config
from superclip.model.masking import mask_patches
from superclip.model.superclip import SuperCLIP
config = model_config("scenes-vit")
config["vision_cfg"]["image_size"] = 96
images = torch.randint(0, 255, (2, 3, 96, 96), dtype=torch.uint8)
for text in ("random:0.5", "grid:0.25", "block:0.25"):
    grads = []
    for way in ("plain", "compiled", "checkpointed"):
        clip = build_clip(config)
        mask_patches(clip, ImageReduction.parse(text), seed=0)
        model = SuperCLIP(clip, (0.5,) * 3, (0.5,) * 3).train()
        if way == "compiled":
            model.compile_towers("aot_eager")
        clip.set_grad_checkpointing(way == "checkpointed")
        for epoch in (0, 1):  # another choice is no other graph
            model.choose_patches(torch.tensor([8, 9]), epoch)
            model(images, torch.ones(2, 20, dtype=int)).image_features[:, 0].sum().backward()
        grads.append(clip.visual.conv1.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-6, rtol=1e-5)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print("equal", graphs)
"""


def test_compiled_and_checkpointed_towers_agree():
    """One graph of the text tower and one a kind of mask, whatever the patches. Its own process:
    the tests' type checks would be graph breaks."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "equal 4\n", done.stdout + done.stderr


def test_smaller_pictures_and_shorter_texts_are_another_architecture():
    options = ModelConfig(image_reduction="resize:48", context_length=7)
    config = reduced(model_config("scenes-vit"), options)
    clip = build_clip(config)
    assert clip.visual.grid_size == (3, 3) and clip.positional_embedding.shape[0] == 7
    with pytest.raises(
        UserError, match=r"patches of 16 px don't tile it; use resize:32 or resize:48"
    ):
        reduced(model_config("scenes-vit"), ModelConfig(image_reduction="resize:40"))
    with pytest.raises(UserError, match=r"RN50 has no square patches"):
        reduced(model_config("RN50"), ModelConfig("RN50", image_reduction="resize:96"))
    with pytest.raises(UserError, match=r"no slot for masks"):
        mask_patches(build_clip(model_config("RN50")), ImageReduction.parse("random:0.5"), 0)


@pytest.mark.parametrize(
    "text,told",
    [
        ("random", "KEEP is a share"),
        ("random:1", "KEEP is a share"),
        ("half:0.5", "write resize:SIZE"),
        ("resize:0.5", "whole number of pixels"),
        ("random:nan", "KEEP is a share"),
        ("resize:inf", "whole number of pixels"),
    ],
)
def test_what_is_no_reduction(text, told):
    with pytest.raises(UserError, match=told):
        ModelConfig(image_reduction=text)


def test_a_grid_that_does_not_tile_names_those_that_do():
    with pytest.raises(UserError, match=r"tile the 14 x 14 patches: KEEP 0.25, 0.02041"):
        ImageReduction.parse("grid:0.111").kept(14)
    with pytest.raises(UserError, match=r"use random or block"):
        ImageReduction.parse("grid:0.25").kept(1)
