"""CyCLIP (Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", NeurIPS 2022)."""

from typing import final

import torch

from superclip.loss_options import CyClipOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.similarity import at_least_fp32, pair_cross_entropy


@final
class CyClipLoss(Loss):
    """InfoNCE plus two penalties on cosines over the global batch of B pairs (section 3):

        in-modal     1/B sum_jk (x_j . x_k - z_j . z_k)^2
        cross-modal  1/B sum_jk (x_j . z_k - x_k . z_j)^2

    for unit vectors x of pictures and z of captions. They know no temperature. On several ranks the
    gradient is that of one process (the released code's is smaller by the number of ranks). With
    `--lr-tau 0` and `--init-scale` it is the variant of constant temperature in iSogCLR's code.
    """

    def __init__(self, options: CyClipOptions, context: LossContext):
        super().__init__()
        self.options = options

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        image, text = at_least_fp32(image_features), at_least_fp32(text_features)
        images, texts = world.gather(torch.cat([image, text], 1)).chunk(2, 1)
        to_text, to_image = image @ texts.T, text @ images.T
        in_modal = (image @ images.T - text @ texts.T).square().sum() / len(image)
        cross_modal = (to_text - to_image).square().sum() / len(image)
        return {
            "contrastive": pair_cross_entropy(scale * to_text, scale * to_image, world),
            "in_modal": self.options.lambda_in_modal * in_modal,
            "cross_modal": self.options.lambda_cross_modal * cross_modal,
        }
