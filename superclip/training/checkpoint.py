"""Saving a run and going on with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from superclip.config import to_dict
from superclip.errors import UserError
from superclip.model.weights import SCHEMA, load_into, read_tensors, resumable, token_head_state
from superclip.training.state import Run, TrainState


def save_checkpoint(run: Run, state: TrainState) -> None:
    """Write `epoch_K.pt` or `step_N.pt`; the main rank alone writes.

    Raises:
        UserError: on every rank, if a weight is not finite; nothing is written then.
    """
    if not all(bool(p.isfinite().all()) for p in state.model.parameters()):
        raise UserError(f"weights are not finite at step {state.step}; lower --lr")
    if run.world.is_main:
        epoch, within = divmod(state.step, run.plan.steps_per_epoch)
        name = f"epoch_{epoch}.pt" if within == 0 else f"step_{state.step}.pt"
        content = _weights(run, state) | {"training": _training(state)}
        write_atomically(content, run.directory / name)
    run.world.barrier()


def save_final(run: Run, state: TrainState) -> Path:
    """Write `final_epoch.pt`, weights and facts alone, after the last step."""
    path = run.directory / "final_epoch.pt"
    if run.world.is_main:
        write_atomically(_weights(run, state), path)
    run.world.barrier()
    return path


def _weights(run: Run, state: TrainState) -> dict[str, Any]:
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
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "loss": state.loss.state_dict(),
        "substituted": dict(state.substituted),
    }


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """A reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def resume(run: Run, state: TrainState) -> Path | None:
    """Load the newest checkpoint of the run's folder into the state; None where there is none.

    Raises:
        UserError: if it was trained on other data.
    """
    found = resumable(run.directory)
    if not found:
        return None
    path = found[-1]
    try:
        content = read_tensors(path)
    except UserError as error:
        raise UserError(f"{error}; delete it to go on from the checkpoint before") from None
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has checkpoint schema {content.get('schema')}; this version reads schema "
            f"{SCHEMA}"
        )
    if content["facts"]["data_sha256"] != run.facts["data_sha256"]:
        raise UserError(
            f"{path} was trained on other data than {run.config.data.train_data} holds now; use "
            "another --out"
        )
    training = content.get("training")
    if training is None:
        raise UserError(f"{path} holds no training state; delete it, or use another --out")
    load_into(state.model.clip, content["state_dict"], path)
    if state.model.token_head is not None:
        load_into(state.model.token_head, content["token_head"]["state_dict"], path)
    state.loss.load_state_dict(training["loss"])
    state.optimizer.load_state_dict(training["optimizer"])
    state.scaler.load_state_dict(training["scaler"])
    state.step = training["step"]
    state.substituted.update(training["substituted"])
    return path
