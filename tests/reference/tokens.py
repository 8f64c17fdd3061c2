"""SuperCLIP's token losses with dense targets, as in the paper and its released code."""

import torch
from torch import Tensor


def multi_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    y = torch.zeros(len(tokens), vocabulary, dtype=torch.float64)
    for row, ids in enumerate(tokens.tolist()):
        for token in ids:
            y[row, token] = 1
    return y


def idf(batches: list[Tensor], vocabulary: int) -> Tensor:
    """Running mean form of the released code: log((N + 1/B) / (F + 1/B)), equal batch sizes."""
    frequency, steps = torch.zeros(vocabulary, dtype=torch.float64), 0
    for tokens in batches:
        frequency += multi_hot(tokens, vocabulary).mean(0)
        steps += 1
    size = len(batches[0])
    return torch.log((steps + 1 / size) / (frequency + 1 / size))


def soft_cross_entropy(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    y = weights * multi_hot(tokens, len(weights))
    y = y / y.abs().sum(1, keepdim=True).clamp_min(1e-12)
    return -(y * logits.log_softmax(1)).sum(1).mean()


def bce(logits: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
    """Mean over rows and over the counted columns."""
    y = multi_hot(tokens, logits.shape[1])
    p = logits.sigmoid()
    loss = -(y * p.log() + (1 - y) * (1 - p).log())
    return loss[:, columns].mean()
