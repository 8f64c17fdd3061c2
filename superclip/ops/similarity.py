"""The contrastive objective on unit vectors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from superclip.ops.world import World


def info_nce(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    world: World,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al. 2021) over the global batch, mean over this rank's anchors.

    Each rank scores its own rows against everybody's; averaging the ranks' gradients gives exactly
    the gradient of one process on the whole batch. Similarities are computed in at least fp32.
    """
    image_features, text_features = at_least_fp32(image_features), at_least_fp32(text_features)
    to_text = scale * image_features @ world.gather(text_features).T
    to_image = scale * text_features @ world.gather(image_features).T
    return pair_cross_entropy(to_text, to_image, world)


def pair_cross_entropy(
    to_text: Float[Tensor, "b B"], to_image: Float[Tensor, "b B"], world: World
) -> Float[Tensor, ""]:
    """InfoNCE of the logits of this rank's pictures with all captions, and the other way round."""
    targets = partners(to_text, world)
    return (F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)) / 2


def partners(rows: Float[Tensor, "b k"], world: World) -> Int[Tensor, " b"]:
    """Where the partner of each of this rank's rows stands among the rows of all ranks."""
    return torch.arange(len(rows), device=rows.device) + world.rank * len(rows)


def at_least_fp32(features: Tensor) -> Tensor:
    """Half precision is too coarse to be divided by a temperature of 0.01."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
