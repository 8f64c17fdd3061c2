"""`python -m superclip.train`: train CLIP, SuperCLIP and their rivals on one process or many."""

from __future__ import annotations

import logging
import time

from superclip.errors import check_writable, run_command
from superclip.flags import command_line, parse_train


def main(argv: list[str]) -> None:
    """Parse, build, run."""
    config = parse_train(argv)
    import dataclasses

    import torch

    from superclip.ops.world import World
    from superclip.training.build import build_run, claim_directory, open_tracker
    from superclip.training.checkpoint import resume, save_final
    from superclip.training.loop import fit, remaining_batches
    from superclip.training.optim import concrete_precision

    logging.getLogger().setLevel(
        logging.ERROR
    )  # open_clip reports every construction on the root logger
    check_writable(config.out, "--out")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    world = World.from_env()
    try:
        config = dataclasses.replace(
            config, precision=concrete_precision(config.precision, world.device)
        )
        if claim_directory(config, world):
            print(f"{config.out} holds this run, finished: {config.out}/final_epoch.pt")
            return
        run, state = build_run(config, world, command_line())
        resumed = resume(run, state)
        run = open_tracker(run, state)
        if world.is_main:
            what = f"resuming from {resumed.name}" if resumed else "starting"
            print(
                f"{what}: {config.loss} {config.model.model} on {run.rows.source.name}, "
                f"{run.order.num_rows} pictures, "
                f"{run.plan.total_steps} steps of "
                f"{config.optim.batch_size * config.optim.accum_freq * world.size}, "
                f"{run.precision}, {world.size} process(es) on {world.device.type}",
                flush=True,
            )
        began = time.perf_counter(), time.process_time()
        state.model.train()
        fit(run, state, remaining_batches(run, state))
        final = save_final(run, state)
        if world.is_main:
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            print(f"done: {final} ({wall:.0f} s wall, {cpu:.0f} s CPU of this process)")
    finally:
        world.close()


if __name__ == "__main__":
    run_command(main)
