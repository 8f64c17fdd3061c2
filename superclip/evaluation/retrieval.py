"""Retrieval of captions by pictures and of pictures by captions, as the field reports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from superclip.data.batch import Source
from superclip.errors import UserError, nearest
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import (
    Mean,
    Measure,
    Median,
    Result,
    Statistic,
    Values,
    Weights,
)
from superclip.model.superclip import SuperCLIP
from superclip.ops.retrieval import TOP, Ranks, ranks

DIRECTIONS = "image-to-text", "text-to-image"
KS = 1, 5, 10
METRICS = (*(f"R@{k}" for k in KS), "median rank", "mean rank", f"mAP@{TOP}")
NAMES = tuple(f"{direction} {metric}" for direction in DIRECTIONS for metric in METRICS)
"""Rows of a result, in their order."""


@dataclass(frozen=True)
class Protocol:
    """Which pictures and captions are ranked against each other.

    Attributes:
        captions: of each picture, the first so many; None: all.
        pictures: how many the data must have, for numbers that others can compare; None: any.
        pool: pictures ranked at a time, in consecutive folds; None: all.
    """

    captions: int | None = None
    pictures: int | None = None
    pool: int | None = None


PROTOCOLS = {
    "all-captions": Protocol(),
    "first-caption": Protocol(captions=1),
    "coco-5k": Protocol(captions=5, pictures=5000),
    "coco-1k": Protocol(captions=5, pictures=5000, pool=1000),
    "flickr": Protocol(captions=5, pictures=1000),
}


def find_protocol(name: str, pictures: int, pool: int | None = None) -> Protocol:
    """The protocol with its pool filled in.

    Args:
        pictures: how many the data have. pool: pictures ranked at a time, where the protocol
            leaves that open.

    Raises:
        UserError: if the name is unknown, or the data or the pool don't fit the protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name} is unknown; {nearest(name, PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if protocol.pictures is not None:
        if pictures != protocol.pictures:
            raise UserError(
                f"--protocol {name} needs {protocol.pictures} pictures, five captions each; here "
                f"are {pictures} readable ones: use --protocol all-captions"
            )
        if pool is not None:
            raise UserError(
                f"--protocol {name} ranks {protocol.pool or pictures} pictures at a time; --pool "
                f"{pool} goes with --protocol all-captions"
            )
    pool = pool or protocol.pool or pictures
    if not 0 < pool <= pictures:
        raise UserError(f"--pool {pool}: there are {pictures} readable pictures; use fewer or none")
    return dataclasses.replace(protocol, pool=pool)


@dataclass(frozen=True, eq=False)
class FoldMean(Statistic):
    """Mean over consecutive folds of the pictures; one that a draw leaves empty is left out.

    Attributes:
        folds: a statistic of each fold's own pictures.
    """

    folds: Sequence[Statistic]

    @property
    def pictures(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(fold.pictures for fold in self.folds)

    @property
    def queries(self) -> int:
        return sum(fold.queries for fold in self.folds)

    def __call__(self, weights: Weights) -> Values:
        parts = np.split(weights, np.cumsum([f.pictures for f in self.folds])[:-1], axis=1)
        return np.nanmean([fold(part) for fold, part in zip(self.folds, parts)], axis=0)


def retrieve(
    model: SuperCLIP,
    encoder: Encoder,
    source: Source,
    protocol: str = "all-captions",
    pool: int | None = None,
    rows: Sequence[int] | None = None,
) -> Result:
    """Retrieval on a source's pictures and captions, or on some rows of it.

    Pictures that can't be read are left out with their captions, and listed.

    Raises:
        UserError: if the data don't fit the protocol, before anything is encoded where possible;
            if no picture has a caption; and as `Encoder` does.
    """
    find_protocol(protocol, source.num_images if rows is None else len(rows), pool)
    pictures = encoder.pictures(model, source, rows)
    chosen = find_protocol(protocol, len(pictures.records), pool)
    captions = [record.captions[: chosen.captions] for record in pictures.records]
    owner = [i for i, texts in enumerate(captions) for _ in texts]
    if not owner:
        raise UserError(f"{source.name}: no picture has a caption; retrieval needs some")
    text = encoder.texts(model, [text for texts in captions for text in texts])
    pairs = torch.tensor([owner, range(len(owner))]).T
    data = {
        "name": source.name,
        "sha256": source.digest,
        "protocol": protocol,
        "pool": chosen.pool,
        "pictures": len(captions),
        "captions": len(owner),
        "without_caption": sum(not texts for texts in captions),
        "missing": pictures.missing,
    }
    return Result("retrieval", data, retrieval(pictures.features, text, pairs, protocol, pool))


def retrieval(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    pairs: Int[Tensor, "p 2"],
    protocol: str = "all-captions",
    pool: int | None = None,
) -> list[Measure]:
    """R@1, R@5, R@10, median, mean rank and mAP@10 of both directions, named as in `NAMES`.

    Any right answer counts; wrong ones that tie stand before it; ranks are 1-based. A picture
    without a caption, or a caption without a picture, is no query, but ranked among the others'
    answers (captions without a picture in every fold). A last partial pool is left out. Means are
    over the queries of all folds, as many as pictures or captions (the mean over folds wherever
    these hold equally many, as COCO's do); the median is the mean of the folds' medians. In a
    bootstrap a caption stays with its first picture.

    Args:
        pairs: rows (picture, caption) that belong together, a picture's captions in their order.

    Raises:
        UserError: if the data don't fit the protocol, a fold has no caption, or a feature is not
            finite.
    """
    chosen = find_protocol(protocol, len(image_features), pool)
    assert chosen.pool is not None
    pairs = pairs.to(image_features.device)
    free = torch.ones(len(text_features), dtype=torch.bool, device=pairs.device)
    free.scatter_(0, pairs[:, 1], False)  # captions of no picture, before some lose theirs
    pairs, folds = _first_captions(pairs, chosen.captions), []
    for start in range(0, len(image_features) - chosen.pool + 1, chosen.pool):
        end = start + chosen.pool
        mine = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < end)]
        if not len(mine):
            raise UserError(
                f"no picture from {start} to {end - 1} has a caption, so that there is nothing to "
                "rank; with --pool, use a larger one or none"
            )
        mine = mine - torch.tensor([start, 0], device=mine.device)
        folds.append(_fold(image_features[start:end], text_features, mine, free))
    return [
        measure
        for direction, answers in zip(DIRECTIONS, zip(*folds))
        for measure in _measures(direction, answers, chosen.pool)
    ]


def _first_captions(pairs: Int[Tensor, "p 2"], count: int | None) -> Int[Tensor, "k 2"]:
    """The first so many pairs of each picture; all for None."""
    if count is None:
        return pairs
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    sizes = pairs[:, 0].unique_consecutive(return_counts=True)[1]
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return pairs[torch.arange(len(pairs), device=pairs.device) - start < count]


def _fold(
    images: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    pairs: Int[Tensor, "p 2"],
    free: Bool[Tensor, " m"],
) -> tuple[_Answers, _Answers]:
    """Both directions, for the captions of these pictures and the free ones."""
    chosen = free.scatter(0, pairs[:, 1], True).nonzero()[:, 0]
    caption = torch.searchsorted(chosen, pairs[:, 1].contiguous())
    # No copy where all take part: they may fill most of the memory.
    texts = text_features if len(chosen) == len(text_features) else text_features[chosen]
    to_text, to_image = ranks(images, texts, torch.stack([pairs[:, 0], caption], 1))
    first = caption.new_full((len(texts),), len(images))
    first.scatter_reduce_(0, caption, pairs[:, 0], "amin")
    return (
        _Answers(to_text, to_text.query, len(texts)),
        _Answers(to_image, first[to_image.query], len(images)),
    )


class _Answers:
    """One direction in one fold, on the CPU: values of each query, and its picture."""

    def __init__(self, found: Ranks, picture: Int[Tensor, " q"], candidates: int):
        rank = found.rank.cpu().numpy().astype(float)
        self.picture, self.candidates = picture.cpu().numpy(), candidates
        self.values = {f"R@{k}": (rank < k).astype(float) for k in KS} | {
            "median rank": rank + 1,
            "mean rank": rank + 1,
            f"mAP@{TOP}": found.precision.cpu().numpy(),
        }
        self.chance = random_order(found.right.cpu().numpy(), candidates)


def _measures(direction: str, folds: Sequence[_Answers], pool: int) -> list[Measure]:
    picture = np.concatenate([fold.picture + k * pool for k, fold in enumerate(folds)])
    sizes = {fold.candidates for fold in folds}
    measures = []
    for metric in METRICS:
        chance, queries = [f.chance[metric] for f in folds], [len(f.picture) for f in folds]
        if metric == "median rank":
            parts = [Median(fold.values[metric], fold.picture, pool) for fold in folds]
            statistic, queries = parts[0] if len(parts) == 1 else FoldMean(parts), None
        else:
            values = np.concatenate([fold.values[metric] for fold in folds])
            statistic = Mean(values, picture, pool * len(folds))
        measure = Measure(
            f"{direction} {metric}",
            statistic,
            float(np.average(chance, weights=queries)),
            percent=not metric.endswith("rank"),
            higher_is_better=not metric.endswith("rank"),
            hits=metric.startswith("R@"),
            candidates=min(sizes) if len(sizes) == 1 else None,
        )
        measures.append(measure)
    return measures


def random_order(right: Int[np.ndarray, " q"], candidates: int) -> dict[str, float]:
    """What each metric is expected to be where every query orders the candidates at random.

    The best of o right answers among c candidates lies behind the first r with probability
    (c-o choose r) / (c choose r), and has the expected rank (c + 1) / (o + 1). The answer at place
    p is right with probability o/c, and then a share (1 + (p-1) (o-1)/(c-1)) / p of the first p
    are. The k-th smallest rank of all queries lies behind r if fewer than k of them lie up to r: a
    binomial number, exactly where all queries have equally many right answers.

    Args:
        right: number of right answers of each query.

    >>> chance = random_order(np.array([5] * 5000), 25_000)
    >>> [round(chance[name], 4) for name in ("R@1", "R@10", "median rank", "mean rank")]
    [0.0002, 0.002, 3236.8252, 4166.8333]
    """
    from scipy.special import bdtr

    sizes, counts = np.unique(right, return_counts=True)
    share, q, c = counts / len(right), len(right), candidates
    r, p = np.arange(c), np.arange(1, min(TOP, c) + 1)
    behind = np.ones(c + 1)  # probability that the best right answer lies behind the first r
    behind[1:] = sum(
        s * np.cumprod(np.maximum(c - o - r, 0) / (c - r)) for s, o in zip(share, sizes)
    )
    middle = {(q + 1) // 2, q // 2 + 1}
    precision = [
        o / c * ((1 + (p - 1) * (o - 1) / max(c - 1, 1)) / p).sum() / min(o, TOP) for o in sizes
    ]
    return {f"R@{k}": float(1 - behind[min(k, c)]) for k in KS} | {
        "median rank": float(np.mean([bdtr(k - 1, q, 1 - behind[:-1]).sum() for k in middle])),
        "mean rank": float(share @ ((c + 1) / (sizes + 1))),
        f"mAP@{TOP}": float(share @ precision),
    }
