"""SigLIP (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023)."""

from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from superclip.loss_options import SigLipOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.similarity import at_least_fp32, partners


@final
class SigLipLoss(Loss):
    """Every pair of the global batch by itself, right or wrong: a sum over its B x B pairs, over B.

    The checkpoint is a plain CLIP: no ranking of cosines depends on the bias, so it stays with the
    loss. Who wants probabilities finds it in `epoch_K.pt`.

    Parameter: `bias`, added to the logits.
    """

    def __init__(self, options: SigLipOptions, context: LossContext):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(options.init_bias))

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        image, text = at_least_fp32(image_features), at_least_fp32(text_features)
        logits = scale * image @ world.gather(text).T + self.bias
        signs = torch.full_like(logits, -1).scatter_(1, partners(logits, world)[:, None], 1)
        return {"sigmoid": -F.logsigmoid(signs * logits).sum() / len(logits)}
