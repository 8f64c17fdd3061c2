"""NeuCLIP on one process: the network's gradient by autograd of the conjugate objective, AdaGrad
number by number."""

import math

import torch
from torch import Tensor

from reference.global_contrastive import normaliser_of


def alpha(anchor: Tensor, positive: Tensor, prototypes: Tensor, tau: Tensor, eps: float) -> Tensor:
    terms = [torch.exp((anchor @ w / w.square().sum().sqrt() - positive) / tau) for w in prototypes]
    return torch.log(eps + torch.stack(terms).mean())


class Naive:
    def __init__(self, options):
        self.options, self.seen = options, ([], [])
        self.steps = 0

    def step(self, x, z, scale):
        """Value and gradients at x, z, scale."""
        o, m = self.options, self.options.npn_num_protos
        restart = self.steps % o.npn_restart_iter == 0
        for side, others in enumerate((z, x)):
            rows = [row.clone() for row in others]
            if self.steps == 0:
                self.seen[side].extend((rows * m)[:m])
                source = self.seen[side][-m:]
            else:
                before = self.seen[side][-m:]
                self.seen[side].extend(rows[:m])
                source = self.seen[side][-m:] if o.npn_own_partner else before
            if restart:
                if side == 0:
                    self.w = [None, None]
                self.w[side] = torch.stack(source)
        if self.steps == 0 or (restart and o.npn_reset):
            self.squares = [torch.full_like(w, o.npn_accumulator) for w in self.w]
            self.norms = [o.npn_accumulator] * 2
        self.steps += 1
        tau = (1 / scale).detach()
        sides = ((x, z), (z, x))
        for side, (anchors, others) in enumerate(sides):
            g = [normaliser_of(anchors, others, i, tau, False) for i in range(len(x))]
            for _ in range(o.npn_repetition):
                w = self.w[side].clone().requires_grad_()
                loss = 0.0
                for i in range(len(x)):
                    a = alpha(anchors[i], x[i] @ z[i], w, tau, o.normalizer_eps)
                    loss = loss + (torch.exp(-a) * (o.normalizer_eps + g[i]) + a - 1) / len(x)
                (grad,) = torch.autograd.grad(loss, w)
                if o.npn_adagrad == "norm":
                    self.norms[side] += grad.square().sum().item()
                    step = grad / (math.sqrt(self.norms[side]) + 1e-10)
                else:
                    self.squares[side] += grad.square()
                    step = grad / (self.squares[side].sqrt() + 1e-10)
                self.w[side] = self.w[side] - o.npn_lr * step
        x, z, scale = (t.clone().requires_grad_() for t in (x, z, scale))
        total = o.rho / scale
        for side, (anchors, others) in enumerate(((x, z), (z, x))):
            for i in range(len(x)):
                positive = (x[i] @ z[i]).detach()
                a = alpha(anchors[i].detach(), positive, self.w[side], tau, o.normalizer_eps)
                g = normaliser_of(anchors, others, i, 1 / scale, False)
                inner = torch.exp(-a) * (o.normalizer_eps + g) + a - 1
                total = total + 0.5 / scale * inner / len(x)
        return total.item(), torch.autograd.grad(total, (x, z, scale))
