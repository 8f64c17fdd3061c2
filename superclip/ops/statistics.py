"""Running statistics of batch norm over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from superclip.ops.world import World


@contextlib.contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes inside the block leave the running statistics of batch norm as they are; what
    is normalised by, does not change."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats]
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
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and world.size > 1:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    world.sum(statistic if world.is_main else statistic.zero_())
