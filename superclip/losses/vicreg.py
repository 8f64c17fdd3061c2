"""VICReg (Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning", ICLR 2022) between pictures and captions."""

from typing import ClassVar, final

import torch
import torch.nn.functional as F

from superclip.errors import UserError
from superclip.loss_options import VicRegOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.similarity import at_least_fp32

EPS = 1e-4
"""Added to a variance before its root (equation 2)."""


@final
class VicRegLoss(Loss):
    """Mean squared difference of partners, a hinge on each dimension's standard deviation (mean of
    the two modalities), and squared covariances between dimensions over d (sum of the two).

    The invariance is a mean over dimensions too and the hinges are halved, as in the released code;
    the paper's equations 5 and 6 have neither. The moments are of the global batch: every rank
    computes them whole, from 2 B d numbers. The features are not brought to unit length, and the
    temperature plays no part.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"raw_features"})

    def __init__(self, options: VicRegOptions, context: LossContext):
        super().__init__()
        self.options = options

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        own = at_least_fp32(torch.cat([image_features, text_features], 1))
        images, texts = world.gather(own).chunk(2, 1)
        if len(images) < 2:
            raise UserError("a global batch of 1 has no variance; raise --batch-size")
        covariances = torch.stack([images.T.cov(), texts.T.cov()])
        variances = covariances.diagonal(dim1=1, dim2=2)
        hinges = F.relu(1 - (variances + EPS).sqrt())
        others = (covariances - variances.diag_embed()).square()
        return {
            "invariance": self.options.sim_coeff * F.mse_loss(images, texts),
            "variance": self.options.std_coeff * hinges.mean(),
            "covariance": self.options.cov_coeff * others.sum() / images.shape[1],
        }
