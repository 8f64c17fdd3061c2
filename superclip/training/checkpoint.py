"""Saving a run and going on with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from superclip.config import to_dict
from superclip.errors import UserError
from superclip.model.weights import (
    SCHEMA,
    damage_of,
    load_into,
    read_tensors,
    resumable,
    token_head_state,
)
from superclip.ops.world import describe
from superclip.training.state import Run, TrainState

TRAINING_SCHEMA = 2
"""Of what a run needs to go on. 2: the optimizer has four groups (1 had two)."""


def save_checkpoint(run: Run, state: TrainState) -> None:
    """Write `epoch_K.pt` or `step_N.pt`, then delete what `--keep-last` does not keep; the main
    rank alone writes.

    Raises:
        UserError: on every rank, if a weight is not finite (nothing is written then) or the file
            can't be written.
    """
    if not all(bool(p.isfinite().all()) for p in state.model.parameters()):
        raise UserError(f"weights are not finite at step {state.step}; lower --lr")

    def write() -> None:
        epoch, within = divmod(state.step, run.plan.steps_per_epoch)
        name = f"epoch_{epoch}.pt" if within == 0 else f"step_{state.step}.pt"
        content = weights_and_facts(run, state) | {"training": _training(state)}
        write_atomically(content, run.directory / name)
        if run.config.keep_last is not None:
            for old in resumable(run.directory)[: -run.config.keep_last]:
                old.unlink()

    run.world.on_main(write)


def save_final(run: Run, state: TrainState) -> Path:
    """Write `final_epoch.pt`, weights and facts alone, after the last step."""
    path = run.directory / "final_epoch.pt"
    run.world.on_main(lambda: write_atomically(weights_and_facts(run, state), path))
    return path


def save_best(run: Run, state: TrainState, metrics: dict[str, float]) -> None:
    """Write `best.pt`, weights and facts alone, if `--keep-best` is better than in every evaluation
    on record."""
    name = run.config.keep_best
    assert name is not None
    sign = -1 if name.endswith("rank") else 1

    def write() -> None:
        if all(sign * metrics[name] > sign * seen for seen in run.tracker.recorded(name)):
            best = {"metric": name, "value": metrics[name], "step": state.step}
            write_atomically(weights_and_facts(run, state) | {"best": best}, path)

    path = run.directory / "best.pt"
    run.world.on_main(write)


def weights_and_facts(run: Run, state: TrainState) -> dict[str, Any]:
    """What `final_epoch.pt` holds, and every other checkpoint too."""
    return {
        "schema": SCHEMA,
        "epoch": state.step // run.plan.steps_per_epoch,
        "state_dict": state.model.clip.state_dict(),
        "token_head": token_head_state(state.model.token_head),
        "model_config": run.model_config,
        "preprocess": run.preprocess.to_dict(),
        "config": to_dict(run.config),
        "facts": run.facts,
    }


def _training(state: TrainState) -> dict[str, Any]:
    return {
        "schema": TRAINING_SCHEMA,
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "loss": state.loss.state_dict(),
        "substituted": dict(state.substituted),
        "nonfinite": state.nonfinite,
    }


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """A reader, now or after a crash at any moment, sees the old file or the whole new one.

    Raises:
        UserError: if the disk is full or otherwise fails; nothing half written stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, survives a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the one into the other
        partial.unlink(missing_ok=True)
        cause = describe(error.__context__ if isinstance(error.__context__, OSError) else error)
        raise UserError(
            f"{path.name} can't be written ({cause}); make room, then the same command goes on "
            "from the checkpoint before"
        ) from None


def resume(run: Run, state: TrainState) -> Path | None:
    """Load the newest whole checkpoint of the run's folder into the state; None where there is
    none.

    Raises:
        UserError: if it was trained on other data, none is whole, or ranks see different folders.
    """
    name = run.world.on_main(lambda: _newest_whole(run.directory))
    if name is not None:
        _load(run, state, run.directory / name)
    steps = run.world.gather_objects(state.step)
    if len(set(steps)) > 1:
        raise UserError(
            f"ranks see different checkpoints (steps {steps}); --out {run.directory} must lie on a "
            "file system that all nodes share"
        )
    return None if name is None else run.directory / name


def _newest_whole(directory: Path) -> str | None:
    """The name of the newest checkpoint whose checksums hold; says which ones it passes over."""
    found = resumable(directory)
    for path in reversed(found):
        damage = damage_of(path)
        if damage is None:
            return path.name
        print(f"warning: {path} is passed over: {damage}", file=sys.stderr, flush=True)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {directory} is whole; bring one back, or "
            "start anew with --overwrite"
        )
    return None


def _load(run: Run, state: TrainState, path: Path) -> None:
    content = read_tensors(path, check=False)  # the main rank has
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has checkpoint schema {content.get('schema')}; this version reads schema "
            f"{SCHEMA}"
        )
    if content["facts"]["data_sha256"] != run.facts["data_sha256"]:
        raise UserError(
            f"{path} was trained on {content['facts']['data_name']} as it was then; "
            f"{run.config.data.train_data} holds other data now; use another --out"
        )
    if content["model_config"] != run.model_config:
        raise UserError(
            f"{path} is of another architecture or tokenizer than {run.config.model.name} is now; "
            "bring the old one back, or use another --out"
        )
    training = content.get("training")
    if training is None:
        raise UserError(f"{path} holds no training state; delete it, or use another --out")
    if training.get("schema") != TRAINING_SCHEMA:
        raise UserError(
            f"{path} holds a training state of schema {training.get('schema', 1)}; this version "
            f"goes on from schema {TRAINING_SCHEMA}: finish the run with the version that began it"
        )
    load_into(state.model.clip, content["state_dict"], path)
    if state.model.token_head is not None:
        load_into(state.model.token_head, content["token_head"]["state_dict"], path)
    state.loss.load_state_dict(training["loss"])
    state.optimizer.load_state_dict(training["optimizer"])
    state.scaler.load_state_dict(training["scaler"])
    state.step = training["step"]
    state.substituted.update(training["substituted"])
    state.nonfinite = training.get("nonfinite", 0)
