"""Retrieval ranks and recall, chunked: no `[pictures, captions]` matrix ever stands whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def image_to_text_ranks(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    owner: Int[Tensor, " m"],
    chunk: int = 1024,
) -> Int[Tensor, " n"]:
    """0-based rank of each picture's best own caption; a wrong caption that ties stands before it.

    Args:
        owner: for every caption the row of its picture, in [0, n).
    """
    ranks = []
    for start in range(0, len(image_features), chunk):
        similarity = image_features[start : start + chunk] @ text_features.T
        rows = torch.arange(start, start + len(similarity), device=owner.device)
        own = owner[None, :] == rows[:, None]
        best = similarity.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~own).sum(1))
    return torch.cat(ranks)


def text_to_image_ranks(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    owner: Int[Tensor, " m"],
    chunk: int = 1024,
) -> Int[Tensor, " m"]:
    """0-based rank of each caption's own picture; a wrong picture that ties stands before it."""
    ranks = []
    for start in range(0, len(text_features), chunk):
        similarity = text_features[start : start + chunk] @ image_features.T
        own = similarity.gather(1, owner[start : start + chunk, None])
        ranks.append((similarity >= own).sum(1) - 1)
    return torch.cat(ranks)


def chance_recall(own: Sequence[int], candidates: int, k: int) -> float:
    """Expected recall at k of a random order: mean over queries of P(one of `own` right answers is
    in the top k).

    >>> round(chance_recall([1], 500, 1), 6), round(chance_recall([5], 5000, 10), 6)
    (0.002, 0.009962)
    """
    counts = np.asarray(own)
    missed = {
        int(c): math.comb(candidates - int(c), k) / math.comb(candidates, k)
        if k < candidates
        else 0.0
        for c in np.unique(counts)
    }
    return float(np.mean([1 - missed[int(c)] for c in counts]))


def cluster_bootstrap(
    hits: np.ndarray, cluster: np.ndarray, clusters: int, draws: int, seed: int = 0
) -> tuple[float, float]:
    """Percentile 95 % interval of `mean(hits)` when whole pictures are drawn anew.

    Args:
        hits: `[q]` one value a query. cluster: `[q]` the picture of each query, so captions stay
            with theirs.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0xB007]))
    sums = np.bincount(cluster, weights=hits, minlength=clusters)
    sizes = np.bincount(cluster, minlength=clusters).astype(float)
    means = np.empty(draws)
    for start in range(0, draws, 256):
        stop = min(start + 256, draws)
        weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=stop - start)
        means[start:stop] = (weights @ sums) / (weights @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
