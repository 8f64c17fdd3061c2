"""The table of losses. A new one is one file here, one options class, and a row in each of the two
tables."""

from typing import Any

from superclip.loss_options import LOSS_OPTIONS, LossOptions
from superclip.losses.base import Loss, LossContext, Terms
from superclip.losses.clip import ClipLoss
from superclip.losses.cyclip import CyClipLoss
from superclip.losses.fastclip import FastClipLoss, FastClipV2Loss
from superclip.losses.isogclr import ISogClrLoss
from superclip.losses.neuclip import NeuClipLoss
from superclip.losses.onlineclr import OnlineClrLoss
from superclip.losses.siglip import SigLipLoss
from superclip.losses.sogclr import SogClrLoss
from superclip.losses.superclip import SuperClipLoss
from superclip.losses.vicreg import VicRegLoss

__all__ = ["LOSSES", "Loss", "LossContext", "Terms", "build_loss"]

LOSSES: dict[str, Any] = {
    "clip": ClipLoss,
    "superclip": SuperClipLoss,
    "sogclr": SogClrLoss,
    "isogclr": ISogClrLoss,
    "fastclip-v0": FastClipLoss,
    "fastclip-v1": FastClipLoss,
    "fastclip-v2": FastClipV2Loss,
    "fastclip-v3": FastClipLoss,
    "neuclip": NeuClipLoss,
    "cyclip": CyClipLoss,
    "vicreg": VicRegLoss,
    "onlineclr": OnlineClrLoss,
    "siglip": SigLipLoss,
}
assert LOSSES.keys() == LOSS_OPTIONS.keys()


def build_loss(name: str, options: LossOptions, context: LossContext) -> Loss:
    """The loss of a checked configuration."""
    return LOSSES[name](options, context)
