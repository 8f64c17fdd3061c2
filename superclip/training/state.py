"""What changes during a run, and what does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superclip.config import Precision, TrainConfig
from superclip.data.loader import Preprocess, TrainRows
from superclip.data.order import Order
from superclip.losses import Loss
from superclip.model.superclip import SuperCLIP
from superclip.ops.world import World
from superclip.training.evaluators import Evaluator
from superclip.training.tracking import Tracker


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps counted from 1."""

    steps_per_epoch: int
    epochs: int
    log_every: int
    save_every: int | None
    save_frequency: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def logs_at(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps

    def evaluates_at(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def saves_at(self, step: int) -> bool:
        epoch_end = (
            step % (self.steps_per_epoch * self.save_frequency) == 0 or step == self.total_steps
        )
        return epoch_end or (self.save_every is not None and step % self.save_every == 0)


@dataclass
class TrainState:
    """Everything a checkpoint must hold.

    Attributes:
        forward: the model, or its DistributedDataParallel.
        step: optimizer steps done.
        substituted: unreadable pictures replaced so far, by cause.
    """

    model: SuperCLIP
    forward: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    substituted: Counter[str] = field(default_factory=Counter)
    grad_norms: dict[str, torch.Tensor] = field(default_factory=dict)

    def gauges(self) -> dict[str, float]:
        """Plain numbers worth a line in the log."""
        values = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "scale": self.model.clip.logit_scale.exp().item(),
        }
        values |= {f"grad_norm_{name}": float(norm) for name, norm in self.grad_norms.items()}
        return values | {f"substituted_{cause}": float(n) for cause, n in self.substituted.items()}


@dataclass(frozen=True)
class Run:
    """What stays fixed: configuration, peers, data, plan, outputs."""

    config: TrainConfig[Any]
    world: World
    precision: Precision
    plan: Plan
    order: Order
    rows: TrainRows
    preprocess: Preprocess
    model_config: dict[str, Any]
    facts: dict[str, Any]
    directory: Path
    tracker: Tracker
    evaluators: tuple[Evaluator, ...]
