"""Counted chance: every draw is Philox of (seed, purpose, stream), so nothing carries a state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

DRAWS = 9999
"""Draws of a permutation test or bootstrap unless told."""


class Purpose(IntEnum):
    PAIRING = 1
    BOOTSTRAP = 2
    SIGN_FLIP = 3


def generator(seed: int, purpose: Purpose, stream: int = 0) -> np.random.Generator:
    """The numpy generator of one purpose; streams are 2^192 draws apart."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, stream]))
