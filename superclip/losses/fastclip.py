"""FastCLIP v0 to v3 (Wei et al., "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP
Training with Limited Resources", 2024): SogCLR and iSogCLR with a falling weight of the moving
average, a communication-saving gradient, and four ways to a temperature.

Ours: the log domain, since exp((s_ij - s_ii) / tau) leaves single precision at tau = .01 where a
negative beats its positive; and v2's standard Adam by row, whose released form corrects for a bias
that its first steps do not have.
"""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from superclip.data.batch import Batch
from superclip.loss_options import FastClipOptions, FastClipV2Options, FastClipV3Options
from superclip.losses.base import Loss, LossContext, Terms
from superclip.losses.robust import Columns, robust_term
from superclip.losses.sample_table import PairTables
from superclip.ops.normalizers import (
    moving_average,
    objective,
    similarity_blocks,
    with_tau_gradient,
)
from superclip.ops.world import World


class Passes:
    """Which pass over the data a step belongs to, counted by the steps themselves."""

    def __init__(self, context: LossContext):
        self.steps, self.per_epoch, self.epochs = 0, context.steps_per_epoch, context.epochs

    @property
    def epoch(self) -> int:
        """Counted from 0, of the step that `steps` began."""
        return max(0, self.steps - 1) // self.per_epoch


@final
class FastClipLoss(Loss):
    """One temperature. With L = mean log u^I + mean log u^T over the data:

    v0: L / 2, learnable temperature. v1: L / 2, constant temperature. v3: tau L / 2 + rho tau,
    learnable temperature (half of the paper's RGCL-g, as in the released code).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ids"})

    def __init__(self, options: FastClipOptions, context: LossContext):
        super().__init__()
        self.options, self.passes = options, Passes(context)
        unseen = {"log_u": -math.inf}
        samples = context.images, context.captions
        self.tables = PairTables(*samples, unseen, options.loss_state_device)

    def observe(self, batch: Batch, world: World) -> None:
        self.passes.steps += 1

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        options, two_sided = self.options, self.options.communication == "reduction"
        blocks = similarity_blocks(image_features, text_features, world, two_sided)
        tau = blocks.spread(1 / scale.detach())
        exponents = blocks.exponents(tau)
        fresh = blocks.log_normalizers(exponents, options.normalizer_eps)
        gamma = options.gamma_at(self.passes.epoch, self.passes.epochs)
        logs = moving_average(self.tables.gather(batch)["log_u"], fresh, gamma)
        self.tables.update(batch, {"log_u": logs}, world)
        robust = isinstance(options, FastClipV3Options)
        outer = tau if robust else torch.ones_like(tau)
        surrogate, moments = blocks.surrogate(exponents, logs, tau, outer / 2, world)
        value = (logs * outer).mean(1).sum() / 2
        terms = {"global": objective(value, surrogate)}
        if robust:
            terms["rho"] = options.rho / scale
        if options.temperature == "constant":
            return terms
        # d/dtau of log g is -sum_j q a / tau^2: the moments over tau, with the other sign
        twice = 2 if getattr(options, "published_tau_gradient", False) else 1
        slope = -twice * (moments / tau * outer).mean(1).sum() / 2
        if robust:
            slope = slope + logs.mean(1).sum() / 2
        terms["global"] = with_tau_gradient(terms["global"], slope, scale)
        return terms

    def gauges(self) -> dict[str, Tensor]:
        """The weight of a batch in the moving average."""
        gamma = self.options.gamma_at(self.passes.epoch, self.passes.epochs)
        return {"gamma": torch.tensor(gamma)}

    def get_extra_state(self) -> int:
        return self.passes.steps

    def set_extra_state(self, state: int) -> None:
        self.passes.steps = state


@final
class FastClipV2Loss(Loss):
    """Half of `robust_term` (as v0, v1 and v3 are halved); tau by Adam's steps, counted by a
    sample's own visits.

    The released code leaves out the factor tau_i before the gradient of log u_i; here it is in.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ids"})

    def __init__(self, options: FastClipV2Options, context: LossContext):
        super().__init__()
        self.options, self.passes = options, Passes(context)
        self.lr_tau, self.betas, self.eps = context.lr_tau, context.betas, context.optimizer_eps
        unseen = {"log_u": -math.inf, "tau": 0.0, "first": 0.0, "second": 0.0}
        samples = context.images, context.captions
        place = options.loss_state_device
        self.tables = PairTables(*samples, unseen | {"visits": 0.0}, place)
        self._tau = torch.zeros(2)

    def observe(self, batch: Batch, world: World) -> None:
        self.passes.steps += 1

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        step = image_features, text_features, scale, batch, world
        gamma = self.options.gamma_at(self.passes.epoch, self.passes.epochs)
        term, self._tau = robust_term(*step, self.tables, self.options, gamma, self._adam)
        return {"global": term / 2}

    def _adam(self, known: Columns, tau: Tensor, slope: Tensor) -> Columns:
        (beta1, beta2), visits = self.betas, known["visits"] + 1
        first = known["first"].lerp(slope, 1 - beta1)
        second = known["second"].lerp(slope.square(), 1 - beta2)
        step = first / (1 - beta1**visits) / ((second / (1 - beta2**visits)).sqrt() + self.eps)
        moved = (tau - self.lr_tau * step).clamp(*self.options.tau_range)
        return {"tau": moved, "first": first, "second": second, "visits": visits}

    def gauges(self) -> dict[str, Tensor]:
        """Mean temperature of this rank's last samples."""
        return {"tau_image": self._tau[0], "tau_text": self._tau[1]}

    def get_extra_state(self) -> int:
        return self.passes.steps

    def set_extra_state(self, state: int) -> None:
        self.passes.steps = state
