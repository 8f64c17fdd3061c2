"""OnlineCLR, as the released code of iSogCLR (Qiu et al., ICML 2023) has it; there is no paper."""

import math
from typing import final

import torch
from torch import Tensor

from superclip.errors import UserError
from superclip.loss_options import OnlineClrOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.normalizers import moving_average, objective
from superclip.ops.similarity import at_least_fp32, partners


@final
class OnlineClrLoss(Loss):
    """One distribution over all negative pairs of the data and one over all positive ones:

        T log E_{i != j} exp(s_ij / T) + T' log E_i exp(-s_ii / T'),    T' = `positive_tau_ratio` T

    T is the logit scale's, constant. The two expectations u are moving averages over batches, and
    the gradient is the objective's with u in the denominators: hard negatives and hard positives
    weigh most, wherever in the batch they stand.

    From the released code: this gradient, the weight gamma, T' = 10 T. Ours: the log domain; means
    where it sums (the same for batches of one size); an average that begins with the first batch's
    instead of gamma times that, which makes its first steps up to 1 / gamma as long; a value that
    is the objective's; one rank; state that is saved.

    The released code adds both directions; by row and by column all negative pairs are the same
    ones, so that one direction here is half of its sum.

    Buffer: `log_u` `[2]`, log of the averages of negatives and positives; minus infinity at first.
    """

    log_u: Tensor

    def __init__(self, options: OnlineClrOptions, context: LossContext):
        super().__init__()
        self.options = options
        self.register_buffer("log_u", torch.full((2,), -math.inf))

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        image, text = at_least_fp32(image_features), at_least_fp32(text_features)
        cosines = image @ world.gather(text).T
        rows, negatives = len(cosines), cosines.shape[1] - 1
        if not negatives:
            raise UserError("a global batch of 1 holds no negatives; raise --batch-size")
        own = partners(cosines, world)[:, None]
        positives = cosines.gather(1, own)
        tau = 1 / scale.detach()
        tau_positive = self.options.positive_tau_ratio * tau
        pushes = (cosines.detach() / tau).scatter_(1, own, -math.inf)
        pulls = -positives.detach() / tau_positive
        fresh = torch.stack(
            [pushes.logsumexp((0, 1)) - math.log(negatives), pulls.logsumexp((0, 1))]
        )
        fresh = world.gather(fresh[None]).logsumexp(0) - math.log(rows * world.size)
        logs = moving_average(self.log_u[:, None], fresh[:, None], self.options.gamma)[:, 0]
        self.log_u.copy_(torch.where(logs.isfinite(), logs, self.log_u))
        push = ((pushes - logs[0]).exp() * cosines).sum() / negatives
        pull = ((pulls - logs[1]).exp() * positives).sum()
        value = tau * logs[0] + tau_positive * logs[1]
        return {"global": objective(value, (push - pull) / rows)}
