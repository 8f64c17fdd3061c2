"""Vanilla CLIP (Radford et al. 2021)."""

from typing import final

from superclip.loss_options import ClipOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.similarity import info_nce


@final
class ClipLoss(Loss):
    """Symmetric InfoNCE over the global batch."""

    def __init__(self, options: ClipOptions, context: LossContext):
        super().__init__()

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        return {"contrastive": info_nce(image_features, text_features, scale, world)}
