"""The contract of a loss. The training loop never asks which one it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from superclip.data.batch import Batch
from superclip.model.output import ClipOutput
from superclip.ops.world import World

Terms = dict[str, Tensor]
"""Weighted, differentiable parts of the objective, each a mean over this rank's rows; total = their
sum."""


@dataclass(frozen=True)
class LossContext:
    """What a loss may know of the run it is built for.

    Attributes:
        vocabulary: size of the tokenizer's vocabulary.
        special_ids: padding, start and end ids.
        vocab_ids: the ids behind the token head's columns, or None for all of them.
        images, captions: rows of the training data.
        steps_per_epoch, epochs: length of the run.
        width: dimensions of the joint space.
        lr_tau: learning rate of temperatures that the loss itself keeps.
        betas, optimizer_eps: of the model's optimizer.
    """

    vocabulary: int
    special_ids: tuple[int, ...]
    vocab_ids: Int[Tensor, " v"] | None = None
    images: int = 0
    captions: int = 0
    steps_per_epoch: int = 1
    epochs: int = 1
    width: int = 0
    lr_tau: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    optimizer_eps: float = 1e-6


class Loss(nn.Module, ABC):
    """Abstract, or final: nothing overrides half of another loss. State that must survive a restart
    is a buffer; what the model's optimizer shall train, a parameter."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What the model and the data must supply; checked when the run is built: "token_logits";
    "raw_features" (not brought to unit length); "ids" (rows that are the same in every pass)."""

    def observe(self, batch: Batch, world: World) -> None:
        """Called once an optimizer step, first, with all of this rank's rows."""

    def gauges(self) -> dict[str, Float[Tensor, ""]]:
        """Numbers of the last step worth a line in the log."""
        return {}

    @abstractmethod
    def pair_terms(
        self,
        image_features: Float[Tensor, "b d"],
        text_features: Float[Tensor, "b d"],
        scale: Float[Tensor, ""],
        batch: Batch,
        world: World,
    ) -> Terms:
        """Terms that couple samples; once a step, on all micro-batches' features. Tables change
        only here. Gradients reach the features, the scale and the loss's own parameters; averaged
        over ranks they are those of one process."""

    def row_terms(self, out: ClipOutput, batch: Batch) -> Terms:
        """Terms that are means over rows; once per micro-batch."""
        return {}
