"""From scores of classes to accuracy, average precision and the pairs that a model confuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from superclip.evaluation.measures import ClassMean, Mean, MeanAveragePrecision, Measure

TOP = 5
CONFUSIONS = 10
Guess = Literal["uniform", "constant"]
"""What chance is: any class alike, or the answer that is right most often."""


def judge(
    scores: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"] | Bool[np.ndarray, "n c"],
    keys: Sequence[str],
    names: Sequence[str],
    guess: Guess = "uniform",
    prefix: str = "",
) -> tuple[list[Measure], dict[str, object]]:
    """Measures and notes of one classifier.

    One class a picture: top-1, top-5 where there are more than five classes, and the mean over
    classes of their top-1. A wrong class that ties with the right one stands before it. Several
    classes a picture: mean average precision. Classes without a picture are left out of both means.

    Args:
        keys, names: of the classes, for the notes.
        prefix: before the name of every measure.

    Returns:
        Notes: `per_class` in the classes' order, `empty_classes`, and for one class a picture
        `confusions`, the pairs that happen most often.
    """
    assert not np.isnan(scores).any(), "scores are not numbers"
    if labels.ndim == 2:
        return _several(scores, labels, keys, names, prefix)
    n, c = scores.shape
    rank = ranks(scores, labels)
    sizes = np.bincount(labels, minlength=c)
    best = np.sort(sizes)[::-1].cumsum() / n if guess == "constant" else np.arange(1, c + 1) / c

    def top(k: int) -> Measure:
        hits = Mean((rank < k).astype(float), np.arange(n), n)
        return Measure(f"{prefix}top-{k}", hits, float(best[k - 1]), hits=True, candidates=c)

    rivals = c if guess == "uniform" else int((sizes > 0).sum())
    mean = ClassMean((rank < 1).astype(float), labels)
    measures = [top(1), *([top(TOP)] if c > TOP else [])]
    measures.append(Measure(f"{prefix}mean per class", mean, 1 / rivals, candidates=c))
    right = np.bincount(labels, rank < 1, c)
    table = [
        {"class": key, "name": name, "pictures": int(size), "top-1": float(hits / size)}
        for key, name, size, hits in zip(keys, names, sizes, right)
        if size
    ]
    confused = _confusions(scores, labels, rank, names)
    return measures, {"per_class": table, "confusions": confused} | _empty(sizes, keys)


def ranks(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many wrong classes score at least as much as the right one; 0 is a hit.

    >>> ranks(np.array([[0.1, 0.7, 0.7], [0.9, 0.7, 0.2]]), np.array([1, 0])).tolist()
    [1, 0]
    """
    own = np.take_along_axis(scores, labels[:, None], 1)
    return (scores >= own).sum(1) - 1


def _confusions(
    scores: np.ndarray, labels: np.ndarray, rank: np.ndarray, names: Sequence[str]
) -> list[dict[str, object]]:
    """The most frequent (true, predicted) pairs, with their share of the true class."""
    missed = np.flatnonzero(rank)
    true = labels[missed]
    others = scores[missed]
    np.put_along_axis(others, true[:, None], -np.inf, 1)
    pairs, counts = np.unique(np.stack([true, others.argmax(1)], 1), axis=0, return_counts=True)
    share = counts / np.bincount(labels)[pairs[:, 0]]
    order = np.lexsort((-share, -counts))[:CONFUSIONS]
    return [
        {
            "true": names[pairs[k, 0]],
            "predicted": names[pairs[k, 1]],
            "count": int(counts[k]),
            "share": float(share[k]),
        }
        for k in order
    ]


def _several(
    scores: np.ndarray,
    right: np.ndarray,
    keys: Sequence[str],
    names: Sequence[str],
    prefix: str,
) -> tuple[list[Measure], dict[str, object]]:
    n, sizes = len(right), right.sum(0)
    statistic = MeanAveragePrecision(scores, right)
    found = statistic.per_class(np.ones((1, n)))[0]
    table = [
        {
            "class": key,
            "name": name,
            "pictures": int(size),
            "AP": float(value),
            "chance": random_average_precision(int(size), n),
        }
        for key, name, size, value in zip(keys, names, sizes, found)
        if size
    ]
    chance = float(np.mean([row["chance"] for row in table]))
    prevalence = float(right[:, sizes > 0].mean())
    notes = {"per_class": table, "mean_prevalence": prevalence} | _empty(sizes, keys)
    return [Measure(f"{prefix}mAP", statistic, chance)], notes


def random_average_precision(right: int, of: int) -> float:
    """Expected average precision of a random order of `of` things, `right` of them right.

    At place k stands a right one with probability r/n; of the k - 1 before it (r - 1)/(n - 1) are
    right on average. So E = (1/r) sum_k (r/n) (1 + (k - 1)(r - 1)/(n - 1)) / k, which is
    H/n + (1 - H/n)(r - 1)/(n - 1) with H = 1 + 1/2 + ... + 1/n: above the prevalence r/n, and far
    above it where the right ones are few.

    >>> random_average_precision(1, 2), random_average_precision(2, 2)
    (0.75, 1.0)
    """
    assert 0 < right <= of
    first = float((1 / np.arange(1, of + 1)).sum()) / of
    return first + (1 - first) * (right - 1) / max(of - 1, 1)


def _empty(sizes: np.ndarray, keys: Sequence[str]) -> dict[str, object]:
    return {"empty_classes": [key for key, size in zip(keys, sizes) if not size]}
