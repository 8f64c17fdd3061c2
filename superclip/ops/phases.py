"""Names for the parts of a step, seen by the profiler and free without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch.profiler import record_function

Phase = Literal["data", "forward", "loss", "communication", "backward", "optimizer"]

_profiling = False


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Mark what runs inside. While a profile is taken on CUDA the block waits for its kernels, so
    that its time is its own."""
    if not _profiling:
        yield
        return
    with record_function(name):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@contextlib.contextmanager
def phases_recorded() -> Iterator[None]:
    """Phases inside are recorded."""
    global _profiling
    _profiling = True
    try:
        yield
    finally:
        _profiling = False
