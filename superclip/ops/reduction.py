"""Which patches of a training picture are kept (CLIPA, Li et al., NeurIPS 2023): a hash of (seed,
epoch, row) decides on the device, so that any number of ranks, micro-steps or readers keeps the
same ones."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Mask = Literal["random", "grid", "block"]
_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number


def mixed(x: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """SplitMix64's finaliser (Steele et al. 2014): 64 bits in, 64 well-mixed bits out, one to
    one."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical right shift of signed numbers."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def keys(seed: int, epoch: int, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A hash of each sample in an epoch."""
    salt = mixed(mixed(torch.tensor(seed) * _GOLDEN) + epoch)
    return mixed(rows + int(salt))


def kept_patches(
    keys: Int[Tensor, " b"], side: int, kind: Mask, kept: int
) -> Int[Tensor, "b kept"]:
    """Ascending indices, row by row, of the patches that stay.

    random: any `kept` of them, every set as likely as another. grid: one patch of each square
    window, in the same corner all over a picture, so that they form a regular grid (as the figure
    of the paper shows); which corner is drawn a picture and an epoch, so that every patch is as
    likely as another. block: a square; every place in the picture is as likely as another.

    Args:
        keys: of `keys`.
        side: patches a side of the whole grid.
        kept: how many stay: of a grid (side / window)^2, of a block a square number.
    """
    if kind == "random":
        place = torch.arange(1, side * side + 1, device=keys.device)
        scores = mixed(keys[:, None] + place * _GOLDEN)
        return scores.topk(kept, dim=1).indices.sort(dim=1).values
    short = int(kept**0.5 + 0.5)
    assert short * short == kept and (kind == "block" or side % short == 0)
    step, places = (side // short, side // short) if kind == "grid" else (1, side - short + 1)
    down, right = (_drawn(mixed(keys + which), places) for which in (1, 2))
    line = torch.arange(short, device=keys.device) * step
    rows, columns = down[:, None] + line, right[:, None] + line
    return (rows[:, :, None] * side + columns[:, None, :]).flatten(1)


def _drawn(bits: Tensor, below: int) -> Tensor:
    """Whole numbers from 0 on; the error of their equal chances is under 2^-40."""
    return _shifted(bits, 11) % below
