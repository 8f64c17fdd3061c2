"""The training loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from superclip.data.batch import Batch
from superclip.data.loader import StepSampler, train_batches
from superclip.data.stream import Stream, stream_batches
from superclip.evaluation.encode import Interrupted
from superclip.ops.statistics import share_statistics
from superclip.training.checkpoint import save_best, save_checkpoint
from superclip.training.consensus import Consensus
from superclip.training.evaluators import run_evaluators
from superclip.training.nonfinite import handle_nonfinite
from superclip.training.state import Run, TrainState
from superclip.training.step import train_step

Batches = Iterable[tuple[Batch, Counter[str]]]


def fit(run: Run, state: TrainState, batches: Batches) -> bool:
    """Train on `batches`, one optimizer step each; False if it was asked to stop before the end."""
    if run.plan.evaluates_at(state.step) and not evaluate(run, state):  # a resumed run may owe it
        return False
    consensus = Consensus(run)
    for batch, causes in run.tracker.watch(batches, state.step, run.plan):
        terms = train_step(state, batch, run)
        news = consensus.reach(state, terms, causes)
        if news.broken_ranks or not state.finite:
            handle_nonfinite(run, state, batch, news)
        run.tracker.stepped(news.terms)
        if run.plan.logs_at(state.step):
            run.tracker.log(state.step, news.terms | state.gauges() | run.tracker.pace())
        if run.plan.saves_at(state.step) or news.save or news.stop:
            save_checkpoint(run, state)
        if news.stop or (run.plan.evaluates_at(state.step) and not evaluate(run, state)):
            return False
    return True


def evaluate(run: Run, state: TrainState) -> bool:
    """Log all evaluators' metrics of this step, unless they are in the record, and keep the best
    model; every rank encodes its share.

    False if a rank was asked to stop meanwhile; the run then makes up for it when it goes on.
    """
    if not run.evaluators or run.world.on_main(lambda: run.tracker.has_evaluation(state.step)):
        return True
    share_statistics(state.model, run.world)
    try:
        metrics = dict(run_evaluators(run.evaluators, state.model))
    except Interrupted:
        if not run.plan.saves_at(state.step):
            save_checkpoint(run, state)
        return False
    if run.config.keep_best is not None:
        save_best(run, state, metrics)
    run.tracker.log(state.step, metrics)
    return True


def remaining_batches(run: Run, state: TrainState) -> Iterator[tuple[Batch, Counter[str]]]:
    """Every batch from the state's step to the end of the run, with the causes for which pictures
    in it were replaced."""
    plan, world, data, rows = run.plan, run.world, run.config.data, run.rows
    mine = plan.micro_batch * plan.accum_freq, world.rank, world.size
    reading = data.workers, world.device.type == "cuda", data.reader_timeout
    if isinstance(rows.source, Stream):
        how = rows.make, rows.seed
        batches = stream_batches(rows.source, *how, *mine, state.step, plan.total_steps, *reading)
    else:
        sampler = StepSampler(run.order, state.step, plan.total_steps, *mine)
        batches = train_batches(rows, sampler, *reading)
    return on_device(batches, world.device)


def on_device(
    batches: Iterator[tuple[Batch, Counter[str]]], device: torch.device
) -> Iterator[tuple[Batch, Counter[str]]]:
    """Batches on the device; on CUDA the next one is copied, on a stream of its own, while this one
    computes."""
    if device.type != "cuda":
        for batch, causes in batches:
            yield batch.to(device), causes
        return
    side = torch.cuda.Stream(device)

    def fetch() -> tuple[Batch, Counter[str]] | None:
        found = next(batches, None)
        with torch.cuda.stream(side):
            return None if found is None else (found[0].to(device), found[1])

    ahead = fetch()
    while ahead is not None:
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in vars(ahead[0]).values():
            tensor.record_stream(main)
        now, ahead = ahead, fetch()
        yield now
