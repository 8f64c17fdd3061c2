"""Log-normalisers of the global contrastive losses, and the exact gradient for given ones.

For anchor i of one modality, a_ij = s_ij - s_ii is the margin of negative j, and

    g_i = 1 / (B - 1) sum_{j != i} exp(a_ij / tau_i)

its normaliser. SogCLR (Yuan et al. 2022), iSogCLR (Qiu et al. 2023), FastCLIP (Wei et al. 2024) and
NeuCLIP (Wei et al. 2026) all descend sum_i tau_i log g_i; they differ in the estimate lambda_i of
log g_i that stands in the gradient's denominator, and in where tau_i comes from. Everything is in
the log domain: nothing overflows at tau = 0.005, where a negative that beats its positive by 2 has
the exponent 400.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superclip.errors import UserError
from superclip.ops.similarity import at_least_fp32
from superclip.ops.world import World


@dataclass(frozen=True)
class Blocks:
    """Cosines of this rank's b pictures and captions with the B of all ranks; at least fp32.

    Attributes:
        cosines: picture i with caption j, and caption i with picture j.
        positives: cosine of each own pair.
        all_positives: the same of every rank, without gradient.
        own: column of each row's own partner.
        gathered: features of every rank's pictures and captions, without gradient.
        two_sided: whether other ranks' features carry no gradient here, so that own rows must stand
            for both anchors and negatives.
    """

    cosines: tuple[Float[Tensor, "b B"], Float[Tensor, "b B"]]
    positives: Float[Tensor, " b"]
    all_positives: Float[Tensor, " B"]
    own: Int[Tensor, "b 1"]
    gathered: tuple[Float[Tensor, "B d"], Float[Tensor, "B d"]]
    two_sided: bool

    @property
    def negatives(self) -> int:
        """Negatives of an anchor."""
        return len(self.all_positives) - 1

    def spread(self, value: Float[Tensor, ""]) -> Float[Tensor, "2 b"]:
        """One number for every own anchor."""
        return value.to(self.positives.dtype).expand(2, len(self.positives))

    def exponents(
        self, temperatures: Float[Tensor, "2 b"], positive: bool = False
    ) -> Float[Tensor, "2 b B"]:
        """a_ij / tau_i of both modalities' anchors, without gradient; minus infinity at the
        positive unless `positive`."""
        found = torch.stack([c.detach() for c in self.cosines])
        found = found.sub_(self.positives.detach()[:, None]).div_(temperatures[..., None])
        return found if positive else self._without_own(found)

    def _without_own(self, exponents: Tensor) -> Tensor:
        return exponents.scatter_(2, self.own.expand(2, -1, 1), -math.inf)

    def log_normalizers(self, exponents: Float[Tensor, "2 b B"], eps: float) -> Tensor:
        """log(eps + g_i) of this batch, `[2, b]`."""
        fresh = exponents.logsumexp(2) - math.log(self.negatives)
        return torch.logaddexp(fresh, torch.full_like(fresh, eps).log()) if eps else fresh

    def surrogate(
        self,
        exponents: Float[Tensor, "2 b B"],
        logs: Float[Tensor, "2 b"],
        temperatures: Float[Tensor, "2 b"],
        factors: Float[Tensor, "2 b"],
        world: World,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "2 b"]]:
        """What carries sum_i f_i grad log g_i to the features, for fixed lambda and tau.

        q_ij = exp(a_ij / tau_i - lambda_i) / (B - 1); averaged over ranks, the gradient is that of
        one process, (1 / B) sum_i f_i / tau_i sum_j q_ij grad a_ij over both modalities.

        Args:
            exponents, logs, temperatures, factors: a / tau, lambda, tau and f of this rank's
                anchors, pictures first.

        Returns:
            The surrogate (its value means nothing), and the moments sum_j q_ij a_ij / tau_i, from
            which tau's derivatives are made.
        """
        shares = (exponents - logs[..., None]).exp_().div_(self.negatives)
        shares.scatter_(2, self.own.expand(2, -1, 1), 0.0)  # its margin is 0 whatever the features
        moments = torch.where(shares > 0, exponents, 0.0).mul_(shares).sum(2)
        factors = factors / temperatures
        pull = (factors * shares.sum(2)).sum(0)
        weights = shares.mul_(factors[..., None])
        if self.two_sided:
            weights += self._as_negatives(logs, temperatures, factors, world)
        pushed = sum((w * c).sum() for w, c in zip(weights, self.cosines))
        return (pushed - pull @ self.positives) / len(self.positives), moments

    def _as_negatives(self, logs: Tensor, temperatures: Tensor, factors: Tensor, world: World):
        """Weights of this rank's rows as negatives of every rank's anchors of the other modality.

        The block that scores own captions against all pictures holds, read by column, what every
        picture as an anchor has from them: nothing is computed or sent twice (FastCLIP, section 4).
        """
        known = torch.cat([logs, temperatures, factors]).T.contiguous()
        logs, temperatures, factors = world.gather(known).T.unflatten(0, (3, 2)).flip(1)
        found = torch.stack([c.detach() for c in self.cosines]).sub_(self.all_positives)
        found = self._without_own(found.div_(temperatures[:, None]).sub_(logs[:, None]))
        return found.exp_().mul_(factors[:, None] / self.negatives)


def similarity_blocks(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    world: World,
    two_sided: bool = True,
) -> Blocks:
    """Both blocks. With `two_sided` features are gathered without gradient (FastCLIP's reduction:
    2 B d numbers sent, and per anchor its lambda, tau and factor); else by the differentiable
    gather, whose backward pass sends as much again.

    Raises:
        UserError: if there is no negative.
    """
    if len(image_features) * world.size < 2:
        raise UserError("a global batch of 1 holds no negatives; raise --batch-size")
    image, text = at_least_fp32(image_features), at_least_fp32(text_features)
    gathered = [world.gather(f.detach() if two_sided else f) for f in (image, text)]
    own = torch.arange(len(image), device=image.device)[:, None] + world.rank * len(image)
    positives = (image * text).sum(1)
    all_positives = (gathered[0] * gathered[1]).sum(1).detach()
    cosines = image @ gathered[1].T, text @ gathered[0].T
    known = gathered[0].detach(), gathered[1].detach()
    return Blocks(cosines, positives, all_positives, own, known, two_sided)


def moving_average(
    old: Float[Tensor, "2 b"], fresh: Float[Tensor, "2 b"], gamma: float
) -> Float[Tensor, "2 b"]:
    """log((1 - gamma) u + gamma g) from log u and log g; log g where u was never seen (minus
    infinity).

    >>> old, fresh = torch.tensor([[0.0], [-math.inf]]), torch.tensor([[1.0], [1.0]])
    >>> moving_average(old, fresh, 0.5).exp()
    tensor([[1.8591],
            [2.7183]])
    """
    if gamma == 1:
        return fresh
    mixed = torch.logaddexp(old + math.log1p(-gamma), fresh + math.log(gamma))
    return torch.where(old.isfinite(), mixed, fresh)


def objective(value: Float[Tensor, ""], surrogate: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The value of the one, the gradient of the other."""
    return value.detach() + surrogate - surrogate.detach()


def with_tau_gradient(
    term: Float[Tensor, ""], slope: Float[Tensor, ""], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """A term whose derivative by tau = 1 / scale is `slope` beside what it has already."""
    tau = 1 / scale
    return term + slope.detach() * (tau - tau.detach())
