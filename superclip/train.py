"""`python -m superclip.train`: train CLIP, SuperCLIP and their rivals on one process or many."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from superclip.config import DataConfig, TrainConfig
from superclip.errors import check_writable, run_command, told_of
from superclip.flags import all_stages, command_line
from superclip.training.preemption import StopRequest


def main(argv: list[str]) -> None:
    """Parse, build, run."""
    stages = all_stages(argv)
    if len(stages) > 1 and stages[0].model.image_tower is None:
        from superclip.training.build import check_stage

        for k, (before, later) in enumerate(pairwise(stages), 2):  # a mistake there shows now
            with told_of(f"stage {k} ({before.stage_two})"):
                check_stage(later, before)
    with StopRequest() as stop:  # from here on, a request costs no more than one step
        for k, config in enumerate(stages, 1):
            name = f"stage {k} of {len(stages)}" if len(stages) > 1 else ""
            with told_of(name):
                if not _train(config, stop, name):
                    break


def _reduced(config: TrainConfig[Any], stage: str) -> str:
    """Which stage this is, what it begins with, and how pictures and texts are shortened."""
    model, told = config.model, [stage] if stage else []
    if model.init_from is not None:
        told.append(f"begins with {model.init_from}")
    if model.image_reduction is not None:
        told.append(f"pictures: {model.image_reduction}")
    if config.data.text_reduction != DataConfig.text_reduction or model.context_length is not None:
        length = model.context_length or "all"
        told.append(f"texts: {length} tokens ({config.data.text_reduction})")
    return "; ".join(told)


def _train(config: TrainConfig[Any], stop: StopRequest, stage: str = "") -> bool:
    """Whether the run came to its end, now or earlier."""
    import torch

    from superclip.data.stream import Stream
    from superclip.ops.world import World
    from superclip.training.build import build_run, open_tracker, settled
    from superclip.training.checkpoint import resume, save_final
    from superclip.training.folder import claim_directory
    from superclip.training.loop import fit, remaining_batches
    from superclip.training.profile import profiled

    check_writable(config.out, "--out")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with World.joined(config.device, config.timeout_minutes) as world:
        config = settled(config, world)
        if world.on_main(lambda: claim_directory(config)):
            if world.is_main:
                print(f"{config.out} holds this run, finished: {config.out}/final_epoch.pt")
            return True
        run, state = build_run(config, world, command_line(), stop)
        resumed = resume(run, state)
        run = open_tracker(run, state)
        plan = run.plan
        if world.is_main:
            what = f"resuming from {resumed.name}" if resumed else "starting"
            dealt = f" x {plan.accum_freq} micro-steps" if plan.accum_freq > 1 else ""
            print(
                f"{what}: {config.loss} {config.model.name} on {run.rows.source.name}, "
                f"{run.order.num_rows} pictures, {plan.total_steps} steps of {plan.global_batch}, "
                f"{run.precision}, {world.size} process(es) of {plan.micro_batch}{dealt} on "
                f"{world.device.type}",
                flush=True,
            )
            if shortened := _reduced(config, stage):
                print(shortened, flush=True)
            if plan.total_steps < (warmup := config.optim.warmup):
                print(
                    f"note: the run ends within its warm-up of {warmup} steps; the learning rate "
                    f"never reaches {config.lr:g} (--warmup N)",
                    flush=True,
                )
            for evaluator in run.evaluators:
                print(evaluator.described, flush=True)
            if isinstance(run.rows.source, Stream):
                print(f"note: {Stream.promises}", flush=True)
        began = time.perf_counter(), time.process_time()
        state.model.train()
        batches = remaining_batches(run, state)
        if world.is_main:
            batches = profiled(batches, config.profile, run.directory)
        finished = fit(run, state, batches)
        if finished:
            save_final(run, state)
        if world.is_main:
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            took = f"({wall:.0f} s wall, {cpu:.0f} s CPU of this process)"
            skipped = ", ".join(f"{n} {cause}" for cause, n in state.substituted.most_common())
            if skipped:
                print(f"pictures replaced because they can't be read: {skipped}")
            if finished:
                print(f"done: {run.directory / 'final_epoch.pt'} {took}", flush=True)
            else:
                print(
                    f"stopped on request after step {state.step} of {plan.total_steps}, saved "
                    f"{took}; resubmit to continue",
                    flush=True,
                )
        return finished


if __name__ == "__main__":
    run_command(main)
