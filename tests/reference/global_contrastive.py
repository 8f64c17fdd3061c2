"""SogCLR, iSogCLR and FastCLIP anchor by anchor, in the linear domain, on one process in fp64.

Normalisers and temperatures are kept in dictionaries; gradients come from autograd through
g_i / u_i with u_i constant, which is the stated objective's gradient for given u.
"""

import math

import torch
from torch import Tensor


def normaliser(cosine: Tensor, i: int, tau: Tensor, include: bool) -> Tensor:
    """g_i over one row of cosines, whose i-th is the positive."""
    terms = [
        torch.exp((cosine[j] - cosine[i]) / tau) for j in range(len(cosine)) if include or j != i
    ]
    return torch.stack(terms).sum() / (len(cosine) - 1)


class Naive:
    """One loss with its memory.

    Args:
        kind: sogclr, isogclr, v0, v1, v2, v3.
        gammas: weight of the batch, step by step.
    """

    def __init__(
        self,
        kind,
        gammas,
        eps=0.0,
        rho=0.0,
        include=False,
        twice=False,
        lr_tau=0.0,
        tau_range=(0.0, 9.0),
        beta=0.9,
        betas=(0.9, 0.98),
        adam_eps=1e-6,
    ):
        self.kind, self.gammas, self.eps, self.rho = kind, list(gammas), eps, rho
        self.include, self.twice, self.lr_tau = include, twice, lr_tau
        self.tau_range, self.beta, self.betas, self.adam_eps = tau_range, beta, betas, adam_eps
        self.memory = ({}, {})

    def step(self, x, z, scale, ids):
        """Value and gradients at x, z, scale; `ids` are those of pictures and of captions."""
        x, z, scale = (t.clone().requires_grad_() for t in (x, z, scale))
        gamma, own = self.gammas.pop(0), self.kind in ("isogclr", "v2")
        tau, value, carrier, size = 1 / scale, 0.0, 0.0, len(x)
        for side, (anchors, others) in enumerate(((x, z), (z, x))):
            fresh_rows = []
            for i in range(size):
                row = self.memory[side].get(ids[side][i], {})
                kept = row.get("tau", self._start(1 / scale.item()))
                t = torch.tensor(kept, dtype=torch.float64) if own else tau
                cosine = torch.stack([anchors[i] @ others[j] for j in range(size)])
                g = normaliser(cosine, i, t, self.include)
                fresh = g.item() + self.eps
                u = (1 - gamma) * row["u"] + gamma * fresh if "u" in row else fresh
                new = {"u": u}
                if own:
                    value += t.item() * (math.log(u) + self.rho) / size
                    carrier = carrier + t * g / u / size
                    moved = t.clone().requires_grad_()
                    again = normaliser(cosine.detach(), i, moved, self.include)
                    (slope,) = torch.autograd.grad(moved * (again / u), moved)
                    slope = slope.item() - g.item() / u + math.log(u) + self.rho
                    new |= self._move(row, t.item(), max(-5.0, min(5.0, slope)))
                elif self.kind == "sogclr":
                    value += tau.item() * math.log(u) / size
                    ratio = self._ratio(anchors, others, i, tau, u)
                    carrier = carrier + tau.detach() * ratio / size
                else:
                    outer = tau if self.kind == "v3" else torch.tensor(1.0).double()
                    value += 0.5 * outer.item() * math.log(u) / size
                    ratio = self._ratio(anchors, others, i, tau, u)
                    carrier = carrier + 0.5 * (outer.detach() * ratio + outer * math.log(u)) / size
                fresh_rows.append((ids[side][i], new))
            self._write(side, fresh_rows)
        if self.kind == "v3":
            value, carrier = value + self.rho * tau.item(), carrier + self.rho * tau
        if self.kind in ("isogclr", "v2"):
            halves = 0.5 if self.kind == "v2" else 1.0
            value, carrier = value * halves, carrier * halves
        grads = torch.autograd.grad(
            carrier, (x, z, scale), materialize_grads=True, allow_unused=True
        )
        if self.kind in ("isogclr", "v2", "sogclr", "v1"):
            grads = (*grads[:2], torch.zeros(()).double())
        return value, grads

    def _ratio(self, anchors, others, i, tau, u):
        """g_i / u; with `twice` its derivative by tau counts double."""
        fixed = normaliser_of(anchors, others, i, tau.detach(), self.include) / u
        if not self.twice:
            return normaliser_of(anchors, others, i, tau, self.include) / u
        free = normaliser_of(anchors.detach(), others.detach(), i, tau, self.include) / u
        return fixed + 2 * (free - free.detach())

    def _start(self, tau):
        return min(max(tau, self.tau_range[0]), self.tau_range[1])

    def _move(self, row, tau, slope):
        if self.kind == "isogclr":
            v = (1 - self.beta) * row.get("slope", 0.0) + self.beta * slope
            return {"tau": self._start(tau - self.lr_tau * v), "slope": v}
        one, two = self.betas
        n = row.get("visits", 0.0) + 1
        m = one * row.get("first", 0.0) + (1 - one) * slope
        v = two * row.get("second", 0.0) + (1 - two) * slope**2
        step = (m / (1 - one**n)) / (math.sqrt(v / (1 - two**n)) + self.adam_eps)
        new = {"first": m, "second": v, "visits": n}
        return new | {"tau": self._start(tau - self.lr_tau * step)}

    def _write(self, side, rows):
        """A sample that comes twice gets the mean of its new rows; of u, of log u."""
        groups = {}
        for key, new in rows:
            groups.setdefault(key, []).append(new)
        for key, found in groups.items():
            mean = {n: sum(row[n] for row in found) / len(found) for n in found[0]}
            mean["u"] = math.exp(sum(math.log(row["u"]) for row in found) / len(found))
            self.memory[side][key] = mean


def normaliser_of(anchors, others, i, tau, include):
    cosine = torch.stack([anchors[i] @ others[j] for j in range(len(others))])
    return normaliser(cosine, i, tau, include)
