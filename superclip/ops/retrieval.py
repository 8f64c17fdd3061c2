"""Ranks of both directions of retrieval; no `[pictures, captions]` matrix ever stands whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from superclip.errors import UserError

TOP = 10
"""Places that average precision looks at."""
CPU_BLOCK, GPU_BLOCK = 1024, 8192
"""Side of a block of similarities: one stays in a cache, the other fills a GPU."""
UNIT = 64
"""Sides of blocks are multiples of it. Given such shapes, fp32 matmuls give equal vectors equal
bits wherever they stand (MKL's do not at 8 columns, nor in fp64)."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """How the queries of one direction were answered.

    Attributes:
        query: rows that have a right answer, ascending; the others are no queries.
        rank: 0-based, of the best right answer.
        precision: average precision at 10: for every right answer in the top ten the share of right
            ones down to it, summed and divided by how many could stand there, min(right, 10).
        right: number of right answers.
    """

    query: Int[Tensor, " q"]
    rank: Int[Tensor, " q"]
    precision: Float[Tensor, " q"]
    right: Int[Tensor, " q"]


@torch.no_grad()
def ranks(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    pairs: Int[Tensor, "p 2"],
    block: int | None = None,
) -> tuple[Ranks, Ranks]:
    """Image-to-text and text-to-image ranks in one pass; wrong answers that tie stand before right
    ones. Similarities are dot products in fp32. Memory beyond fp32 features: at most four blocks,
    the captions of one column of blocks, and some 200 bytes a query.

    Args:
        pairs: rows (image, text) that belong together: several texts an image, several images a
            text, or none; what has none is ranked among the others' answers all the same.
        block: side of a block; by default what suits the device.

    Raises:
        UserError: if a feature is not finite.
    """
    images, texts = _finite(image_features, "image"), _finite(text_features, "text")
    n, m = len(images), len(texts)
    assert len(pairs), "nothing belongs together"
    image, text = pairs.unique(dim=0).T
    assert 0 <= int(image.min()) <= int(image.max()) < n
    assert 0 <= int(text.min()) <= int(text.max()) < m
    # Captions in the order of their first pictures, so that few blocks hold right pairs.
    first = text.new_full((m,), n).scatter_reduce(0, text, image, "amin")
    order = first.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(m, device=order.device))
    side = block or (CPU_BLOCK if images.device.type == "cpu" else GPU_BLOCK)
    blocks = _Blocks(images, texts, order, side)
    row, column = image, place[text]
    key, by_block = (column // blocks.width * blocks.down + row // blocks.height).sort()
    row, column = row[by_block], column[by_block]
    keys, counts = key.unique_consecutive(return_counts=True)
    inside = torch.stack([row % blocks.height, column % blocks.width]).split(counts.tolist(), 1)
    held = dict(zip(keys.tolist(), inside))

    own = torch.cat([blocks.similarity(key)[tuple(where)] for key, where in held.items()])
    answers = (
        _Direction(row, own, blocks.down * blocks.height, candidates=1),
        _Direction(column, own, blocks.across * blocks.width, candidates=0),
    )
    for key in range(blocks.down * blocks.across):
        similarity = blocks.similarity(key)
        if key in held:
            similarity[tuple(held[key])] = -math.inf  # what is left are wrong answers
        answers[0].count(similarity, blocks.spare, key % blocks.down * blocks.height)
        answers[1].count(similarity, blocks.spare, key // blocks.down * blocks.width)
    return answers[0].ranks(torch.arange(n, device=order.device)), answers[1].ranks(place)


def image_to_text_ranks(
    image_features: Float[Tensor, "n d"],
    text_features: Float[Tensor, "m d"],
    owner: Int[Tensor, " m"],
) -> Int[Tensor, " n"]:
    """0-based rank of each picture's best own caption; a wrong caption that ties stands before it.

    Args:
        owner: for every caption the row of its picture, in [0, n); every picture has one.
    """
    pairs = torch.stack([owner, torch.arange(len(owner), device=owner.device)], 1)
    found, _ = ranks(image_features, text_features, pairs)
    assert len(found.query) == len(image_features), "a picture without a caption has no rank"
    return found.rank


class _Blocks:
    """The blocks of the similarity matrix, down its columns; one is alive at a time.

    Each is the same matmul on the same shapes (the last ones are filled up with zeros, whose
    similarity is then -inf), so that a pair's similarity is the same bits whenever it is asked for.

    Attributes:
        height, width: of a block. down, across: number of blocks.
        spare: a buffer of the shape of a block.
    """

    def __init__(
        self,
        images: Float[Tensor, "n d"],
        texts: Float[Tensor, "m d"],
        order: Int[Tensor, " m"],
        side: int,
    ):
        self.images, self.texts, self.order = images, texts, order
        self.height, self.width = (_fitting(len(x), side) for x in (images, texts))
        self.down = -(-len(images) // self.height)
        self.across = -(-len(texts) // self.width)
        self._similarity = images.new_empty(self.height, self.width)
        self.spare = torch.empty_like(self._similarity)
        self._column, self._texts = -1, texts

    def similarity(self, key: int) -> Float[Tensor, "height width"]:
        """Block `key % down` of column `key // down`; valid until the next one."""
        column, row = divmod(key, self.down)
        if column != self._column:
            taken = self.order[column * self.width : (column + 1) * self.width]
            self._texts = _filled(self.texts[taken], self.width)
            self._column = column
        images = self.images[row * self.height : (row + 1) * self.height]
        found = torch.mm(_filled(images, self.height), self._texts.T, out=self._similarity)
        found[len(self.images) - row * self.height :] = -math.inf
        found[:, len(self.texts) - column * self.width :] = -math.inf
        return found


class _Direction:
    """Queries of one direction, while the wrong answers go by.

    Their right answers are sorted, and only the best ten matter: those of place k are row k of
    `own`, +inf where a query has none. `ahead` counts wrong answers that score as much or more.

    Args:
        query: of each right answer. own: its similarity.
        total: queries, those included that only fill a block up.
        candidates: the axis of a block along which candidates lie.
    """

    def __init__(
        self, query: Int[Tensor, " p"], own: Float[Tensor, " p"], total: int, candidates: int
    ):
        self.candidates = candidates
        order = own.argsort(descending=True)
        order = order[query[order].argsort(stable=True)]
        query, own = query[order], own[order]
        self.right = torch.bincount(query, minlength=total)
        start = self.right.cumsum(0) - self.right
        place = torch.arange(len(query), device=query.device) - start[query]
        depth = min(TOP, int(self.right.max()))
        kept = place < depth
        self.own = own.new_full((depth, total), math.inf)
        self.own[place[kept], query[kept]] = own[kept]
        self.ahead = query.new_zeros((depth, total))
        self.lowest = self._lowest(slice(None))

    def _lowest(self, queries: Tensor | slice) -> Float[Tensor, " q"]:
        """Lowest similarity of a right answer, after the best, that can still be in the top."""
        behind = self.ahead[1:, queries] + self._places[1:] > TOP
        own = self.own[1:, queries].masked_fill(behind, math.inf)
        return own.amin(0) if len(own) else own.new_zeros(0)

    @property
    def _places(self) -> Int[Tensor, "depth 1"]:
        """1-based place of each row of `own` among the right answers."""
        return torch.arange(1, len(self.own) + 1, device=self.own.device)[:, None]

    def count(
        self, wrong: Float[Tensor, "height width"], spare: Float[Tensor, "height width"], start: int
    ) -> None:
        """Count a block of wrong answers; its first query is `start`."""
        axis = self.candidates
        queries = slice(start, start + wrong.shape[1 - axis])
        self.ahead[0, queries] += _reaching(wrong, self.own[0, queries], axis, spare)
        if len(self.own) == 1:
            return
        # Answers after the best matter in the top ten only, which few blocks still touch.
        near = (wrong.amax(axis) >= self.lowest[queries]).nonzero()[:, 0]
        if len(near):
            few, rows = wrong.index_select(1 - axis, near), near + start
            spare = torch.empty_like(few)
            for own, ahead in zip(self.own[1:], self.ahead[1:]):
                ahead[rows] += _reaching(few, own[rows], axis, spare)
            self.lowest[rows] = self._lowest(rows)

    def ranks(self, place: Int[Tensor, " n"]) -> Ranks:
        """What was counted, for the queries that stand at `place`."""
        query = self.right[place].nonzero()[:, 0]
        place = place[query]
        right, ahead = self.right[place], self.ahead[:, place]
        position = self._places + ahead
        counts = (position <= TOP) & self.own[:, place].isfinite()
        precision = (self._places / position.double() * counts).sum(0) / right.clamp(max=TOP)
        return Ranks(query, ahead[0], precision, right)


def _reaching(
    wrong: Float[Tensor, "height width"],
    own: Float[Tensor, " q"],
    axis: int,
    spare: Float[Tensor, "height width"],
) -> Int[Tensor, " q"]:
    """How many wrong answers of each query reach its own one."""
    # Ones and zeros in fp32 compare and add up several times faster than Booleans do, and exactly.
    return torch.ge(wrong, own.unsqueeze(axis), out=spare).sum(axis).long()


def _fitting(count: int, side: int) -> int:
    """Side of blocks for `count` rows.

    >>> _fitting(5, 1024), _fitting(70, 1024), _fitting(5000, 1024), _fitting(5000, 100)
    (64, 128, 1024, 128)
    """
    return -(-min(count, side) // UNIT) * UNIT


def _filled(rows: Float[Tensor, "k d"], count: int) -> Float[Tensor, "count d"]:
    """The rows, and zeros up to `count`."""
    return (
        torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows))) if len(rows) < count else rows
    )


def _finite(features: Float[Tensor, "n d"], what: str) -> Float[Tensor, "n d"]:
    """The features in fp32."""
    features = features.float().contiguous()
    # The extremes of a tensor with NaN are NaN; unlike isfinite this takes no memory.
    if not all(map(math.isfinite, torch.stack(features.aminmax()).tolist())):
        row = int((~features.isfinite().all(1)).nonzero()[0])
        raise UserError(
            f"{what} features are not finite (first in row {row}), so nothing can be ranked: the "
            "model has diverged (train at a lower --lr)"
        )
    return features
