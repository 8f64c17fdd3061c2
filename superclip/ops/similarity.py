"""The contrastive objective on unit vectors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
    targets = torch.arange(len(image_features), device=image_features.device) + world.rank * len(
        image_features
    )
    to_text = scale * image_features @ world.gather(text_features).T
    to_image = scale * text_features @ world.gather(image_features).T
    return (F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)) / 2


def at_least_fp32(features: Tensor) -> Tensor:
    """Half precision is too coarse to be divided by a temperature of 0.01."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
