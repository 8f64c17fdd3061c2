"""The table of losses. A new one is one file here, one options class, and a row in each of the two
tables."""

from typing import Any

from superclip.config import LOSS_OPTIONS, LossOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.losses.clip import ClipLoss
from superclip.losses.superclip import SuperClipLoss

__all__ = ["LOSSES", "Loss", "LossContext", "Terms", "build_loss"]

LOSSES: dict[str, Any] = {"clip": ClipLoss, "superclip": SuperClipLoss}
assert LOSSES.keys() == LOSS_OPTIONS.keys()


def build_loss(name: str, options: LossOptions, context: LossContext) -> Loss:
    """The loss of a checked configuration."""
    return LOSSES[name](options, context)
