"""The grid of positions that a vision tower ends in, and the mean over it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from superclip.errors import UserError


def pooled_and_mean(
    visual: nn.Module, pixels: Float[Tensor, "b 3 s s"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b w"]]:
    """The projected feature of pictures, and the mean over the positions of the last grid: patch
    tokens of a transformer (its own ones without the class token, after the final norm), places of
    the last feature map of a convolutional tower.

    Raises:
        UserError: if the tower has no such grid.
    """
    if isinstance(visual, VisionTransformer):
        out = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        return out["image_features"], out["image_intermediates"][-1].mean(1)  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
    if not isinstance(visual, TimmModel):
        raise UserError(f"{type(visual).__name__} has no grid of patch tokens")
    trunk: Any = visual.trunk
    last = trunk.forward_features(pixels)
    return visual.head(trunk.forward_head(last)), _mean(trunk, last)


def grid_width(visual: nn.Module) -> int:
    """Width of the positions that `pooled_and_mean` averages; 0 where the tower has no grid.

    Of a timm tower that is known only once it has seen a picture: it is shown a black one.
    """
    if isinstance(visual, VisionTransformer):
        return len(visual.class_embedding)
    if not isinstance(visual, TimmModel):
        return 0
    trunk: Any = visual.trunk
    training, sides = trunk.training, cast(tuple[int, int], visual.image_size)
    black = next(visual.parameters()).new_zeros(1, 3, *sides)
    try:
        with torch.no_grad():
            _mean(trunk, trunk.eval().forward_features(black))
    except UserError:
        return 0
    finally:
        trunk.train(training)
    return trunk.num_features


def _mean(trunk: Any, last: Any) -> Tensor:
    """Mean over positions of what `forward_features` gives: NCHW, NHWC, or a sequence of tokens
    whose number, prefix tokens aside, must be a square's (a class token that the tower does not
    declare would pass for a patch)."""
    width = trunk.num_features
    if isinstance(last, Tensor) and last.ndim == 4 and last.shape[1] == width:
        return last.mean((2, 3))
    if isinstance(last, Tensor) and last.ndim == 4 and last.shape[3] == width:
        return last.mean((1, 2))
    if isinstance(last, Tensor) and last.ndim == 3 and last.shape[2] == width:
        patches = last[:, getattr(trunk, "num_prefix_tokens", 0) :]
        count = patches.shape[1]
        if count > 1 and math.isqrt(count) ** 2 == count:
            return patches.mean(1)
    raise UserError(f"{type(trunk).__name__} ends in no feature grid")
