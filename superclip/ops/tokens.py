"""Caption tokens as classification targets: document frequency, soft labels, and the losses on
them.

Targets stay sparse (`[b, l]` ids and weights); a dense `[b, vocabulary]` target never exists.
Sources: SuperCLIP (Zhao et al., NeurIPS 2025) and its released code for the online IDF.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROW_CHUNK_ELEMENTS = 2**24
"""Logits alive at once in fp32: 64 MiB, whatever the batch and the vocabulary."""


def distinct(tokens: Int[Tensor, "b l"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Each row's ids sorted, and a mask of the first occurrence of each id."""
    ids = tokens.sort(dim=1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ids, first


def document_counts(tokens: Int[Tensor, "b l"], vocabulary: int) -> Int[Tensor, " v"]:
    """How many rows contain each id."""
    ids, first = distinct(tokens)
    return torch.bincount(ids[first], minlength=vocabulary)


def idf(counts: Int[Tensor, " v"], samples: Int[Tensor, ""]) -> Float[Tensor, " v"]:
    """`log((S + 1) / (df + 1))`, computed in fp64: 0 for an id that every caption holds."""
    return torch.log((samples.double() + 1) / (counts.double() + 1)).float()


def soft_labels(
    tokens: Int[Tensor, "b l"], weights: Float[Tensor, " v"]
) -> tuple[Int[Tensor, "b l"], Float[Tensor, "b l"]]:
    """Ids and their L1-normalised weights; repeats weigh 0, and so does a row without any
    weight."""
    ids, first = distinct(tokens)
    raw = weights[ids] * first
    return ids, raw / raw.sum(1, keepdim=True).clamp_min(1e-12)


def multi_hot(
    tokens: Int[Tensor, "b l"], wanted: Float[Tensor, " v"]
) -> tuple[Int[Tensor, "b l"], Float[Tensor, "b l"]]:
    """Ids and 1 at the first occurrence of each wanted id, 0 elsewhere."""
    ids, first = distinct(tokens)
    return ids, wanted[ids] * first


def soft_cross_entropy(
    hidden: Float[Tensor, "b w"],
    weight: Float[Tensor, "v w"],
    bias: Float[Tensor, " v"],
    ids: Int[Tensor, "b l"],
    labels: Float[Tensor, "b l"],
) -> Float[Tensor, ""]:
    """Mean over rows of `-sum_c y_c log softmax(hidden W^T + b)_c`, with y sparse in (ids,
    labels)."""

    def rows(h: Tensor, i: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias).float()
        return (logits.logsumexp(1) * y.sum(1) - (logits.gather(1, i) * y).sum(1)).sum()

    return _by_row_chunks(rows, hidden, ids, labels, weight.shape[0]) / len(hidden)


def multi_hot_bce(
    hidden: Float[Tensor, "b w"],
    weight: Float[Tensor, "v w"],
    bias: Float[Tensor, " v"],
    ids: Int[Tensor, "b l"],
    labels: Float[Tensor, "b l"],
    counted: Float[Tensor, " v"],
) -> Float[Tensor, ""]:
    """Binary cross-entropy averaged over rows and counted columns; `labels` is 1 at each positive
    id once."""

    def rows(h: Tensor, i: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias).float()
        return (F.softplus(logits) @ counted).sum() - (logits.gather(1, i) * y).sum()

    return _by_row_chunks(rows, hidden, ids, labels, weight.shape[0]) / (
        len(hidden) * counted.sum()
    )


def _by_row_chunks(rows, hidden: Tensor, ids: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Sum of `rows` over row chunks; with several chunks each is recomputed in the backward
    pass."""
    size = max(1, ROW_CHUNK_ELEMENTS // vocabulary)
    if len(hidden) <= size:
        return rows(hidden, ids, labels)
    parts = zip(hidden.split(size), ids.split(size), labels.split(size))
    return torch.stack([checkpoint(rows, h, i, y, use_reentrant=False) for h, i, y in parts]).sum()
