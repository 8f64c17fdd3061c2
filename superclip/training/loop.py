"""The training loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from superclip.data.batch import Batch
from superclip.data.loader import StepSampler, train_batches
from superclip.errors import UserError
from superclip.losses import Terms
from superclip.ops.world import World
from superclip.training.checkpoint import save_checkpoint
from superclip.training.evaluators import run_evaluators
from superclip.training.state import Run, TrainState
from superclip.training.step import train_step


def fit(run: Run, state: TrainState, batches: Iterable[Batch]) -> None:
    """Train on `batches`, one optimizer step each, logging, saving and evaluating as planned."""
    for batch in run.tracker.progress(batches, state.step, run.plan.total_steps):
        terms = train_step(state, batch.to(run.world.device), run)
        if run.plan.logs_at(state.step):
            run.tracker.log(
                state.step, mean_over_ranks(terms, run.world, state.step) | state.gauges()
            )
        if run.plan.saves_at(state.step):
            save_checkpoint(run, state)
        if run.plan.evaluates_at(state.step) and run.world.is_main:
            run.tracker.log(state.step, dict(run_evaluators(run.evaluators, state.model)))


def remaining_batches(run: Run, state: TrainState) -> Iterator[Batch]:
    """Every batch from the state's step to the end of the run; unreadable pictures are counted in
    the state."""
    per_step = run.config.optim.batch_size * run.config.optim.accum_freq
    per_epoch = run.plan.steps_per_epoch
    for epoch in range(state.step // per_epoch, run.plan.epochs):
        start = state.step % per_epoch if epoch == state.step // per_epoch else 0
        sampler = StepSampler(run.order, epoch, start, per_step, run.world.rank, run.world.size)
        pin = run.world.device.type == "cuda"
        for batch, causes in train_batches(run.rows, sampler, run.config.data.workers, pin):
            state.substituted += Counter(causes)
            yield batch


def mean_over_ranks(terms: Terms, world: World, step: int) -> dict[str, float]:
    """Plain floats, averaged over ranks, and their sum as `loss`.

    Raises:
        UserError: if the loss is not finite.
    """
    values = world.sum(torch.stack([value.double() for value in terms.values()])) / world.size
    metrics = dict(zip(terms, values.tolist()))
    metrics["loss"] = sum(metrics.values())
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"the loss is {metrics['loss']} at step {step}; lower --lr or use --precision fp32"
        )
    return metrics
