"""Running statistics of batch norm over ranks."""

from __future__ import annotations

from torch import nn

from superclip.ops.world import World


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
