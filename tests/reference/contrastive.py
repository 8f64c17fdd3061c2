"""Symmetric InfoNCE, pair by pair."""

import torch
from torch import Tensor


def info_nce(x: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        to_text = torch.stack([scale * x[i] @ z[j] for j in range(len(z))])
        to_image = torch.stack([scale * z[i] @ x[j] for j in range(len(x))])
        total = total - to_text.log_softmax(0)[i] - to_image.log_softmax(0)[i]
    return total / (2 * len(x))
