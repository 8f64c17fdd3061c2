"""Which rows make which step: a pure function of (seed, epoch, step, global batch), and counted
draws.

Shards are shuffled, taken in blocks, and shuffled inside a block, so that reading stays nearly
sequential and any step's rows cost one block to compute. Ranks and workers only slice the answer.
A weight gives a shard several copies in a pass, or a part of its rows that is drawn anew each pass.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np

from superclip.errors import UserError


class Purpose(IntEnum):
    """What a random number is for; part of every Philox key, so that no draw depends on another."""

    SHARDS = 1
    BLOCK = 2
    CAPTION = 3
    CROP = 4
    SUBSTITUTE = 5
    SUBSET = 6
    TEXT = 7
    COLOUR = 8


def draw(seed: int, epoch: int, row: int, purpose: Purpose, copy: int = 0) -> np.random.Generator:
    """The generator of one decision: Philox keyed by (seed, purpose), counted by (row, epoch,
    copy)."""
    return np.random.Generator(
        np.random.Philox(key=[seed, int(purpose)], counter=[0, row, epoch, copy])
    )


class Order:
    """The order of a data set's rows under one seed.

    Args:
        shard_sizes: pictures per shard, in manifest order.
        seed: of the run.
        block_shards: shards mixed with one another.
        weights: how often each shard's pictures come in one pass (default: once). 2.5 is every
            picture twice, and a random half of the shard's (rounded to whole pictures, others in
            every pass) a third time. Weights beyond the last shard are ignored.

    Attributes:
        num_rows: rows of the manifest.
        per_epoch: pictures in one pass, the same in every pass.
    """

    def __init__(
        self,
        shard_sizes: tuple[int, ...],
        seed: int,
        block_shards: int = 8,
        weights: tuple[float, ...] | None = None,
    ):
        self._arguments = (shard_sizes, seed, block_shards, weights)
        self.seed, self.block_shards = seed, block_shards
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.num_rows = int(self.starts[-1])
        each = np.ones(len(self.sizes)) if weights is None else np.array(weights, float)
        self._copies, rest = np.divmod(each[: len(self.sizes)], 1)
        self._part = np.rint(rest * self.sizes).astype(np.int64)
        self._counts = self._copies.astype(np.int64) * self.sizes + self._part
        self.per_epoch = int(self._counts.sum())
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._block = lru_cache(maxsize=3)(self._block_of)

    def __reduce__(self):
        return Order, self._arguments

    def steps_per_epoch(self, global_batch: int) -> int:
        """Whole batches in one pass; the rest of the pass is left out.

        Raises:
            UserError: if one batch is larger than the data.
        """
        if global_batch > self.per_epoch:
            raise UserError(
                f"a global batch of {global_batch} pairs is larger than the data ({self.per_epoch} "
                "pictures a pass); lower --global-batch-size, where a recipe or a flag sets it, "
                "else --batch-size or --accum-freq, or use fewer processes"
            )
        return self.per_epoch // global_batch

    def rows(self, epoch: int, step: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Manifest rows of step `step` of epoch `epoch`, and which copy of its picture each is:
        int64 `[global_batch]` both."""
        start, stop = step * global_batch, (step + 1) * global_batch
        assert stop <= self.per_epoch, "step lies beyond the epoch"
        _, edges = self._plan(epoch)
        first = int(np.searchsorted(edges, start, side="right")) - 1
        pieces = []
        for block in range(first, len(edges) - 1):
            if edges[block] >= stop:
                break
            low, high = max(start - edges[block], 0), min(stop, edges[block + 1]) - edges[block]
            pieces.append(self._block(epoch, block)[low:high])
        copies, rows = np.divmod(np.concatenate(pieces), self.num_rows)
        return rows, copies

    def _plan_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and the positions where its blocks begin and end."""
        shards = draw(self.seed, epoch, 0, Purpose.SHARDS).permutation(len(self.sizes))
        edges = np.concatenate([[0], np.cumsum(self._counts[shards])])
        return shards, edges[np.unique([*range(0, len(shards), self.block_shards), len(shards)])]

    def _block_of(self, epoch: int, block: int) -> np.ndarray:
        """The block's pictures in order, each as row + copy * num_rows."""
        shards, _ = self._plan(epoch)
        mine = shards[block * self.block_shards : (block + 1) * self.block_shards]
        pictures = np.concatenate([self._shard(epoch, int(s)) for s in mine])
        return draw(self.seed, epoch, block, Purpose.BLOCK).permutation(pictures)

    def _shard(self, epoch: int, shard: int) -> np.ndarray:
        rows = np.arange(self.sizes[shard]) + self.starts[shard]
        copies = int(self._copies[shard])
        parts = [rows + copy * self.num_rows for copy in range(copies)]
        if part := int(self._part[shard]):
            rng = draw(self.seed, epoch, shard, Purpose.SUBSET)
            parts.append(rng.choice(rows, part, replace=False) + copies * self.num_rows)
        return np.concatenate(parts) if parts else rows[:0]
