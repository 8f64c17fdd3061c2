"""SogCLR (Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning", ICML
2022): a moving average of every sample's normaliser, one constant temperature."""

import math
from typing import ClassVar, final

from superclip.loss_options import SogClrOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.losses.sample_table import PairTables
from superclip.ops.normalizers import moving_average, objective, similarity_blocks


@final
class SogClrLoss(Loss):
    """tau (mean log u^I + mean log u^T) over the data, u updated by gamma at every visit."""

    needs: ClassVar[frozenset[str]] = frozenset({"ids"})

    def __init__(self, options: SogClrOptions, context: LossContext):
        super().__init__()
        self.options = options
        unseen = {"log_u": -math.inf}
        samples = context.images, context.captions
        self.tables = PairTables(*samples, unseen, options.loss_state_device)

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        options, two_sided = self.options, self.options.communication == "reduction"
        blocks = similarity_blocks(image_features, text_features, world, two_sided)
        tau = blocks.spread(1 / scale.detach())
        exponents = blocks.exponents(tau, options.include_positive)
        fresh = blocks.log_normalizers(exponents, options.normalizer_eps)
        logs = moving_average(self.tables.gather(batch)["log_u"], fresh, options.gamma)
        self.tables.update(batch, {"log_u": logs}, world)
        surrogate, _ = blocks.surrogate(exponents, logs, tau, tau, world)
        return {"global": objective((tau * logs).mean(1).sum(), surrogate)}
