"""Running statistics of batch norm over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from superclip.ops.world import World


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Its layers of batch norm."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextlib.contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes inside the block leave the running statistics of batch norm as they are; what
    is normalised by, does not change."""
    norms = [m for m in batch_norms(model) if m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def share_statistics(model: nn.Module, world: World) -> None:
    """Give every rank the main rank's running statistics of batch norm.

    Training never reads them, so the ranks' drift apart; an evaluation that all ranks share, and
    the checkpoint that the main rank writes, must mean one model.
    """
    for norm in batch_norms(model) if world.size > 1 else ():
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                world.sum(statistic if world.is_main else statistic.zero_())
