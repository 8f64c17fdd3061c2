"""NeuCLIP (Wei et al., "NeuCLIP: Efficient Large-Scale CLIP Training with Neural Normalizer
Optimization", ICLR 2026): a small network predicts every anchor's log-normaliser.

By the convex conjugate, log(eps + g) = min_a exp(-a) (eps + g) + a - 1. The network's a stands
where FastCLIP has its moving average; it is trained on the same objective, in turns with the
towers. No code was published when this was written: what the texts leave open is an option.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from superclip.loss_options import NeuClipOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.ops.normalizers import objective, similarity_blocks, with_tau_gradient

LARGEST_GAP = 10.0
"""Bound on log(eps + g) - a in every gradient: after a restart a may be far off."""
ADAGRAD_EPS = 1e-10


@final
class NeuClipLoss(Loss):
    """tau / 2 times the conjugate objective of both modalities, plus rho tau (half of the paper's,
    as FastCLIP-v3 here).

    Each modality's anchors have m prototypes of the other: a_i = log(eps + mean_k exp((cos(anchor
    i, prototype k) - s_ii) / tau)). A step first fits the prototypes to the batch, `npn_repetition`
    times by AdaGrad, then hands a, held fixed, to the towers. Every `npn_restart_iter` steps the
    prototypes begin anew as recent features; a batch that is not finite is no step. All ranks hold
    the same prototypes: each fits them to the gathered batch, and nothing but the anchors'
    log-normalisers is sent beside the features.

    Buffers: `prototypes` and `recent` features `[2, m, d]`, text for the pictures' anchors first;
        AdaGrad's `squares`, the same or `[2, 1, 1]`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    prototypes: Tensor
    squares: Tensor
    recent: Tensor

    def __init__(self, options: NeuClipOptions, context: LossContext):
        super().__init__()
        self.options, self.steps = options, 0
        shape = 2, options.npn_num_protos, context.width
        self.register_buffer("prototypes", torch.zeros(shape))
        one_each = (2, 1, 1) if options.npn_adagrad == "norm" else shape
        self.register_buffer("squares", torch.zeros(one_each))
        self.register_buffer("recent", torch.zeros(shape))
        self._error = torch.zeros(())

    def pair_terms(self, image_features, text_features, scale, batch, world) -> Terms:
        options, two_sided = self.options, self.options.communication == "reduction"
        blocks = similarity_blocks(image_features, text_features, world, two_sided)
        tau = blocks.spread(1 / scale.detach())
        exponents = blocks.exponents(tau)
        fresh = blocks.log_normalizers(exponents, options.normalizer_eps)
        image, text = blocks.gathered
        every = world.gather(fresh.T.contiguous()).T
        anchors = torch.stack([image, text]), blocks.all_positives, tau[0, 0]
        if every.isfinite().all():  # else this batch is left out, and shall leave no trace
            self._renew(torch.stack([text, image]))
            for _ in range(options.npn_repetition):
                self._descend(*anchors, every)
        own = blocks.own.squeeze(1)
        logs = predicted(self.prototypes, *anchors, options.normalizer_eps)[0][:, own]
        logs = torch.maximum(logs, fresh - LARGEST_GAP)
        ratio = (fresh - logs).exp()
        self._error = (fresh - logs).abs().mean()
        surrogate, moments = blocks.surrogate(exponents, logs, tau, tau / 2, world)
        conjugate = (ratio + logs - 1).mean(1).sum() / 2
        term = objective(tau[0, 0] * conjugate, surrogate)
        slope = conjugate - moments.mean(1).sum() / 2
        return {"global": with_tau_gradient(term, slope, scale), "rho": options.rho / scale}

    def _renew(self, others: Float[Tensor, "2 B d"]) -> None:
        """Keep the batch among the recent features, oldest out; restart where it is time.

        A restart takes the features before this batch's, so that no anchor finds its own partner
        among the prototypes (unless `npn_own_partner`); the first step has no others.
        """
        kept, first = self.recent.shape[1], self.steps == 0
        incoming = others[:, torch.arange(kept) % others.shape[1]] if first else others[:, :kept]
        later = torch.cat([self.recent, incoming.to(self.recent.dtype)], 1)[:, -kept:]
        if self.steps % self.options.npn_restart_iter == 0:
            self.prototypes.copy_(later if first or self.options.npn_own_partner else self.recent)
            if first or self.options.npn_reset:
                self.squares.fill_(self.options.npn_accumulator)
        self.recent.copy_(later)
        self.steps += 1

    def _descend(self, anchors: Tensor, positives: Tensor, tau: Tensor, logs: Tensor) -> None:
        """One AdaGrad step on mean_i exp(-a_i) (eps + g_i) + a_i."""
        options, held = self.options, self.prototypes
        a, weights, units = predicted(held, anchors, positives, tau, options.normalizer_eps)
        residual = 1 - (logs - a).clamp(max=LARGEST_GAP).exp()
        pull = residual[..., None] * weights / (tau * logs.shape[1])
        grad = pull.transpose(1, 2) @ anchors.to(held.dtype)
        grad -= (grad * units).sum(2, keepdim=True) * units
        grad /= held.norm(dim=2, keepdim=True)
        squares = grad.square()
        if options.npn_adagrad == "norm":
            squares = squares.sum((1, 2), keepdim=True)
        self.squares += squares
        held.addcdiv_(grad, self.squares.sqrt() + ADAGRAD_EPS, value=-options.npn_lr)

    def gauges(self) -> dict[str, Tensor]:
        """How far the network's log-normalisers lie from this batch's, on average."""
        return {"npn_error": self._error}

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: Any) -> None:
        self.steps = state


def predicted(
    prototypes: Float[Tensor, "2 m d"],
    anchors: Float[Tensor, "2 B d"],
    positives: Float[Tensor, " B"],
    tau: Float[Tensor, ""],
    eps: float,
) -> tuple[Float[Tensor, "2 B"], Float[Tensor, "2 B m"], Float[Tensor, "2 m d"]]:
    """The network's log-normalisers, what each prototype contributes to exp(a) as a share of it,
    and the prototypes at unit length."""
    units = prototypes / prototypes.norm(dim=2, keepdim=True)
    margins = anchors.to(units.dtype) @ units.transpose(1, 2)
    exponents = margins.sub_(positives[:, None].to(units.dtype)).div_(tau)
    exponents -= math.log(prototypes.shape[1])
    logs = exponents.logsumexp(2)
    if eps:
        logs = torch.logaddexp(logs, torch.full_like(logs, eps).log())
    return logs, exponents.sub_(logs[..., None]).exp_(), units
