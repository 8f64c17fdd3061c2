"""What changes during a run, and what does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from superclip.config import Precision, TrainConfig
from superclip.data.loader import Preprocess, TrainRows
from superclip.data.order import Order
from superclip.losses import Loss
from superclip.model.superclip import SuperCLIP
from superclip.ops.reducer import GradientReducer
from superclip.ops.world import World
from superclip.training.evaluators import Evaluator
from superclip.training.preemption import StopRequest
from superclip.training.tracking import Tracker


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps counted from 1.

    Attributes:
        global_batch: pairs of a step, over all ranks and micro-steps.
        micro_batch, accum_freq: how a rank takes its share of them.
    """

    steps_per_epoch: int
    epochs: int
    global_batch: int
    micro_batch: int
    accum_freq: int
    log_every: int
    save_every: int | None = None
    save_frequency: int = 1
    log_grad_share: int | None = None
    eval_every: int | None = None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def logs_at(self, step: int) -> bool:
        return step % self.log_every == 0 or step == self.total_steps

    def shares_at(self, step: int) -> bool:
        return self.log_grad_share is not None and step % self.log_grad_share == 0

    def evaluates_at(self, step: int) -> bool:
        between = self.eval_every is not None and step % self.eval_every == 0
        return step > 0 and (step % self.steps_per_epoch == 0 or between)

    def saves_at(self, step: int) -> bool:
        epoch_end = (
            step % (self.steps_per_epoch * self.save_frequency) == 0 or step == self.total_steps
        )
        return epoch_end or (self.save_every is not None and step % self.save_every == 0)


@dataclass
class TrainState:
    """Everything a checkpoint must hold.

    Attributes:
        step: optimizer steps done.
        substituted: unreadable pictures replaced so far, over all ranks, by cause.
        nonfinite: updates left out because a loss or a gradient was not finite.
        norms: 0-d tensors measured in the last step; not part of a checkpoint.
        finite: whether the last step's gradient was, or a loss scale above 1 sought; not part of a
            checkpoint.
    """

    model: SuperCLIP
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reducer: GradientReducer
    step: int = 0
    substituted: Counter[str] = field(default_factory=Counter)
    nonfinite: int = 0
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    finite: bool = True

    def gauges(self) -> dict[str, float]:
        """Plain numbers worth a line in the log."""
        values = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "scale": self.model.clip.logit_scale.exp().item(),
        }
        values |= {name: float(norm) for name, norm in self.norms.items()}
        values |= {name: float(value) for name, value in self.loss.gauges().items()}
        values |= {f"substituted_{cause}": float(n) for cause, n in self.substituted.items()}
        return values | ({"nonfinite_steps": float(self.nonfinite)} if self.nonfinite else {})


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
    stop: StopRequest = field(default_factory=StopRequest)
