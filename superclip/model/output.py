"""What a model hands to a loss."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ClipOutput:
    """One micro-batch's forward pass.

    Attributes:
        image_features, text_features: unit vectors `[b, d]`; raw ones where the loss needs them so.
        scale: exponential of the logit scale, a scalar.
        token_hidden: input of the token head's last layer `[b, w]`, where the model has one. Token
            logits are `token_hidden @ token_weight.T + token_bias`; they are left to the loss,
            which takes them in chunks.
        token_weight, token_bias: that last layer, `[v, w]` and `[v]`.
    """

    image_features: Float[Tensor, "b d"]
    text_features: Float[Tensor, "b d"]
    scale: Float[Tensor, ""]
    token_hidden: Float[Tensor, "b w"] | None = None
    token_weight: Float[Tensor, "v w"] | None = None
    token_bias: Float[Tensor, " v"] | None = None
