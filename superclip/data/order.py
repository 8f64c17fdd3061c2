"""Which rows make which step: a pure function of (seed, epoch, step, global batch), and counted
draws.

Shards are shuffled, taken in blocks, and shuffled inside a block, so that reading stays nearly
sequential and any step's rows cost one block to compute. Ranks and workers only slice the answer.
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


def draw(seed: int, epoch: int, row: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one decision: Philox keyed by (seed, purpose), counted by (row, epoch)."""
    return np.random.Generator(
        np.random.Philox(key=[seed, int(purpose)], counter=[0, row, epoch, 0])
    )


class Order:
    """The order of a data set's rows under one seed.

    Args:
        shard_sizes: pictures per shard, in manifest order.
        seed: of the run.
        block_shards: shards mixed with one another.
    """

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, block_shards: int = 8):
        self.seed, self.block_shards = seed, block_shards
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.num_rows = int(self.starts[-1])
        self._plan = lru_cache(maxsize=2)(self._plan_of)
        self._block = lru_cache(maxsize=3)(self._block_of)

    def __reduce__(self):
        return Order, (tuple(int(s) for s in self.sizes), self.seed, self.block_shards)

    def steps_per_epoch(self, global_batch: int) -> int:
        """Whole batches in one pass; the rest of the pass is left out.

        Raises:
            UserError: if one batch is larger than the data.
        """
        if global_batch > self.num_rows:
            raise UserError(
                f"a global batch of {global_batch} pairs is larger than the data ({self.num_rows} "
                "pictures); "
                "lower --batch-size or --accum-freq, or use fewer processes"
            )
        return self.num_rows // global_batch

    def rows(self, epoch: int, step: int, global_batch: int) -> np.ndarray:
        """int64 `[global_batch]` manifest rows of step `step` of epoch `epoch`."""
        start, stop = step * global_batch, (step + 1) * global_batch
        assert stop <= self.num_rows, "step lies beyond the epoch"
        _, edges = self._plan(epoch)
        first = int(np.searchsorted(edges, start, side="right")) - 1
        pieces = []
        for block in range(first, len(edges) - 1):
            if edges[block] >= stop:
                break
            low, high = max(start - edges[block], 0), min(stop, edges[block + 1]) - edges[block]
            pieces.append(self._block(epoch, block)[low:high])
        return np.concatenate(pieces)

    def _plan_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order, and the positions where its blocks begin and end."""
        shards = draw(self.seed, epoch, 0, Purpose.SHARDS).permutation(len(self.sizes))
        edges = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return shards, edges[np.unique([*range(0, len(shards), self.block_shards), len(shards)])]

    def _block_of(self, epoch: int, block: int) -> np.ndarray:
        shards, _ = self._plan(epoch)
        mine = shards[block * self.block_shards : (block + 1) * self.block_shards]
        rows = np.concatenate([np.arange(int(self.sizes[s])) + self.starts[s] for s in mine])
        return draw(self.seed, epoch, block, Purpose.BLOCK).permutation(rows)
