"""Operations from the configuration against torch's counter; the table; what is refused."""

import pytest
import torch
from conftest import command, refused
from torch.utils.flop_counter import FlopCounterMode

from superclip import cost
from superclip.config import ImageReduction, ModelConfig
from superclip.cost import CostConfig, counted, lines, stages
from superclip.errors import UserError
from superclip.model.factory import build_clip, model_config, reduced
from superclip.model.masking import mask_patches
from superclip.ops.flops import text_flops, vision_flops


def counter_says(clip, size, length, backward):
    """Of one pair. Masks and dropouts are active, as in training."""
    images, tokens = torch.zeros(1, 3, size, size), torch.zeros(1, length, dtype=torch.long)
    clip.train()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = clip(images, tokens)
        if backward:
            (out["image_features"].sum() + out["text_features"].sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "model,reduction,length",
    [
        ("scenes-vit", None, None),
        ("scenes-vit", "random:0.5", 9),
        ("scenes-vit", "resize:48", 5),
        ("scenes-vit-gap", "block:0.4", None),
        ("small-vit", None, None),
        ("ViT-B-32", None, 16),
    ],
)
def test_the_count_is_torchs(model, reduction, length):
    """Forward to the operation; with the backward pass to the operation, too."""
    options = ModelConfig(model, image_reduction=reduction, context_length=length)
    config = reduced(model_config(model), options)
    clip, kept = build_clip(config), None
    size = config["vision_cfg"]["image_size"]
    if reduction is not None and not reduction.startswith("resize"):
        mask = mask_patches(clip, ImageReduction.parse(reduction), 0)
        kept = mask.kept
    image, text = vision_flops(config, kept), text_flops(config)
    length = config["text_cfg"]["context_length"]
    assert counter_says(clip, size, length, False) == image.forward + text.forward
    assert counter_says(clip, size, length, True) == image.training + text.training


def test_tokens_of_the_published_names():
    for name, told in (("clipa-b16-i50t16", (50, 16)), ("clipa-l16-i37t8", (37, 8))):
        first = stages(CostConfig(recipe=name))[0]
        assert (first.image_tokens, first.text_tokens) == told
    h14 = stages(CostConfig(recipe="clipa-h14-v2"))
    assert [s.samples for s in h14] == [12_811_670_000, 524_288_000, 131_072_000]
    assert [s.image_tokens for s in h14] == [37, 180, 346]


def test_the_command_prints_hours_beside_the_published_ones():
    words = "superclip.cost --model ViT-H-14 --image-reduction resize:84 --context-length 8"
    done = command(*words.split(), "--samples", "12.8e9", "--gpus", "8", "--gpu", "a100")
    assert done.returncode == 0, done.stderr
    stage = counted(
        "x", ModelConfig("ViT-H-14", image_reduction="resize:84", context_length=8), 12.8e9
    )
    assert f"{stage.hours(312 * 0.4):,.0f} GPU hours" in done.stdout
    assert "37 of 257" in done.stdout and "8,640" in done.stdout and "83.0" in done.stdout
    assert "published" not in command("superclip.cost", "--model", "ViT-B-32").stdout


def test_hours_scale_as_they_must():
    one = counted("x", ModelConfig("ViT-B-16"), 1e9)
    again = counted("x", ModelConfig("ViT-B-16", grad_checkpointing=True), 1e9)
    assert one.hours(100) == 2 * one.hours(200) == one.total / 3.6e17
    assert one.training < again.training < 4 / 3 * one.training
    assert one.training == one.full_training
    half = counted("x", ModelConfig("ViT-B-16", image_reduction="random:0.5"), 1e9)
    assert half.image_tokens == 99 and 0.4 < half.training / half.full_training < 0.65


@pytest.mark.parametrize(
    "words,told",
    [
        ("--gpu h101", "did you mean 'h100'"),
        ("--utilization 2", r"(0, 1]"),
        ("--model RN50", "vision transformers are counted"),
        ("--recipe openclip-cc3m", "vision transformers are counted"),
        ("--recipe clipa-h14-v2 --context-length 8", "leave those out"),
        ("--recipe small-batch-clip --samples 1e6", "towers of other libraries"),
        ("--image-reduction resize:100", "don't tile"),
        ("--samples 0", "at least 1"),
        ("--recipe nope", "--recipe list"),
    ],
)
def test_mistakes_are_one_line(words, told):
    with pytest.raises(UserError) as caught:
        cost.main(words.split())
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_has_status_2():
    assert "--gpus 0" in refused("superclip.cost", "--gpus", "0")


def test_every_stage_has_a_line():
    told = lines(CostConfig(), stages(CostConfig(recipe="clipa-h14-v2")))
    assert sum(line.startswith("stage ") for line in told) == 3
