"""iSogCLR (Qiu et al., "Not All Semantics are Created Equal", ICML 2023): SogCLR with a temperature
of every sample, by a robust objective."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from superclip.loss_options import ISogClrOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.losses.robust import Columns, robust_term
from superclip.losses.sample_table import PairTables


@final
class ISogClrLoss(Loss):
    """`robust_term` with a constant weight of the moving average and momentum steps of tau."""

    needs: ClassVar[frozenset[str]] = frozenset({"ids"})

    def __init__(self, options: ISogClrOptions, context: LossContext):
        super().__init__()
        self.options, self.lr_tau = options, context.lr_tau
        unseen = {"log_u": -math.inf, "tau": 0.0, "slope": 0.0}
        samples = context.images, context.captions
        self.tables = PairTables(*samples, unseen, options.loss_state_device)
        self._tau = torch.zeros(2)

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        step = image_features, text_features, scale, batch, world
        options = self.options
        term, self._tau = robust_term(*step, self.tables, options, options.gamma, self._move)
        return {"global": term}

    def _move(self, known: Columns, tau: Tensor, slope: Tensor) -> Columns:
        slope = known["slope"].lerp(slope, self.options.tau_momentum)
        return {
            "tau": (tau - self.lr_tau * slope).clamp(*self.options.tau_range),
            "slope": slope,
        }

    def gauges(self) -> dict[str, Tensor]:
        """Mean temperature of this rank's last samples."""
        return {"tau_image": self._tau[0], "tau_text": self._tau[1]}
