"""CyCLIP, VICReg, OnlineCLR and SigLIP pair by pair and dimension by dimension, in the linear
domain, on one process in fp64."""

import math

import torch

from reference.contrastive import info_nce


def cyclip(x, z, scale, in_modal, cross_modal):
    value, size = info_nce(x, z, scale), len(x)
    for j in range(size):
        for k in range(size):
            value = value + in_modal * (x[j] @ x[k] - z[j] @ z[k]) ** 2 / size
            value = value + cross_modal * (x[j] @ z[k] - x[k] @ z[j]) ** 2 / size
    return value


def vicreg(x, z, sim, std, cov):
    size, width = x.shape
    value = sum(sim * (x[i, k] - z[i, k]) ** 2 for i in range(size) for k in range(width))
    value = value / (size * width)
    for side in (x, z):
        centred = [side[:, k] - sum(side[:, k]) / size for k in range(width)]
        for k in range(width):
            for other in range(width):
                entry = sum(a * b for a, b in zip(centred[k], centred[other])) / (size - 1)
                if k != other:
                    value = value + cov * entry**2 / width
                elif (deviation := torch.sqrt(entry + 1e-4)) < 1:
                    value = value + std * (1 - deviation) / (2 * width)
    return value


def siglip(x, z, scale, bias):
    value = 0.0
    for i in range(len(x)):
        for j in range(len(z)):
            sign = 1 if i == j else -1
            value = value + torch.log(1 + torch.exp(-sign * (scale * x[i] @ z[j] + bias)))
    return value / len(x)


class OnlineClr:
    """Both directions, as the released code; the averages begin with the first batch's."""

    def __init__(self, gamma, ratio):
        self.gamma, self.ratio, self.averages = gamma, ratio, None

    def step(self, x, z, scale):
        """The value, and what carries its gradient for the averages as they are."""
        tau, size = 1 / scale.item(), len(x)
        wide, wrong, right = self.ratio * tau, 0.0, 0.0
        for anchors, others in ((x, z), (z, x)):
            for i in range(size):
                right = right + torch.exp(-anchors[i] @ others[i] / wide) / (2 * size)
                for j in range(size):
                    if i != j:
                        term = torch.exp(anchors[i] @ others[j] / tau)
                        wrong = wrong + term / (2 * size * (size - 1))
        fresh = wrong.item(), right.item()
        old = self.averages or fresh
        mixed = zip(old, fresh)
        self.averages = tuple((1 - self.gamma) * a + self.gamma * b for a, b in mixed)
        u, v = self.averages
        return tau * math.log(u) + wide * math.log(v), tau * wrong / u + wide * right / v
