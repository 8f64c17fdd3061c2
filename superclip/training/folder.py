"""The folder of a run: whose it is, who may write there, and what it began with."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from superclip.config import TrainConfig, differences, to_dict, train_config
from superclip.data.sources import contents
from superclip.data.stream import Stream
from superclip.errors import UserError, replace_text
from superclip.model.weights import begun_from, damage_of, file_sha256
from superclip.training.state import Run

WRITTEN = re.compile(r"((epoch|step)_\d+|final_epoch|best|nonfinite_step_\d+_rank_\d+)\.pt")
"""Names of the files of weights that a run writes."""


def claim_directory(config: TrainConfig[Any]) -> bool:
    """Make `--out` this run's own; True if the run in it is already finished.

    Raises:
        UserError: if another run stands there.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    record = out / "run.json"
    if record.exists():
        if config.overwrite:
            _refuse_own_start(config)
            return False  # the old run goes once the new one is known to be buildable
        try:
            held = json.loads(record.read_text())
            old = train_config(held["config"], str(record))
            whole, _, _ = old.optim.dealt(held["world_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{record} can't be read ({error}); use another --out or --overwrite"
            ) from None
        optim = dataclasses.replace(old.optim, global_batch_size=whole)
        if (began := held.get("init_from_sha256")) and config.model.init_from is not None:
            now = file_sha256(begun_from(config.model.init_from))
            if began != now:
                raise UserError(
                    f"{out} began with other weights than {config.model.init_from} holds now; "
                    "--overwrite begins anew with these, another --out keeps both"
                )
            # The same weights under whatever name they have now.
            model = dataclasses.replace(old.model, init_from=config.model.init_from)
            old = dataclasses.replace(old, model=model)
        found = differences(dataclasses.replace(old, optim=optim), config)
        if found:
            kept = {"global_batch_size": whole, "precision": old.precision}
            ways = [
                f"; --{name.replace('_', '-')} {value} keeps it"
                for name, value in kept.items()
                if any(line.startswith(f"{name}:") for line in found)
            ]
            raise UserError(
                f"{out} holds another run ({'; '.join(found[:3])}){''.join(ways)}; use another "
                "--out, or --overwrite to delete it"
            )
        final = out / "final_epoch.pt"
        return final.exists() and damage_of(final) is None
    strangers = [p.name for pattern in ("*.pt", "metrics.jsonl") for p in out.glob(pattern)]
    if strangers:
        raise UserError(f"{out} holds {strangers[0]} but no run.json; use another --out")
    return False


def _refuse_own_start(config: TrainConfig[Any]) -> None:
    """Raises UserError if `--overwrite` would delete the weights that the new run begins with."""
    model = config.model
    for flag, start in (("--init-from", model.init_from), ("--pretrained", model.pretrained)):
        path = Path(start or "")
        path = begun_from(path) if flag == "--init-from" and start and path.exists() else path
        own = path.resolve().parent == config.out.resolve() and WRITTEN.fullmatch(path.name)
        if start and own:
            raise UserError(
                f"{flag} {start} lies in --out {config.out}, which --overwrite would clear; use "
                "another --out"
            )


_HELD: dict[Path, int] = {}
"""Locks of this process."""


def _lock(out: Path) -> None:
    """Keep other processes off this run until this one ends, however it ends.

    Raises:
        UserError: if another process trains here.
    """
    if (earlier := _HELD.pop(out.resolve(), None)) is not None:  # of a run that ended in here
        os.close(earlier)
    descriptor = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    _HELD[out.resolve()] = descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {out}; use another --out") from None
    except OSError as error:
        print(f"warning: {out} can't be locked ({error.strerror}): let no other run write there")


def _remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else that may lie in the folder."""
    if not (out / "run.json").exists():
        return
    for path in [
        *(p for p in out.glob("*.pt") if WRITTEN.fullmatch(p.name)),
        *out.glob("eval_*.json"),
        *(out / n for n in ("run.json", "metrics.jsonl")),
    ]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "sweep", ignore_errors=True)


def move_in(run: Run, argv: list[str]) -> None:
    """Lock the run's folder, clear it of what must not stay, and write `run.json`.

    Raises:
        UserError: if another process trains there, or the run began with other data.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    _lock(run.directory)
    for path in run.directory.glob(".*.pt.partial"):  # of a run that was killed
        path.unlink()
    if run.config.overwrite:
        _remove_run(run.directory)
    _write_record(run, argv)


def _write_record(run: Run, argv: list[str]) -> None:
    source = run.rows.source
    shards = {} if isinstance(source, Stream) else contents(source)
    record = {
        "command": argv,
        "config": to_dict(run.config),
        "data": shards,
        "steps_per_epoch": run.plan.steps_per_epoch,
        "total_steps": run.plan.total_steps,
        **run.facts,
    }
    path = run.directory / "run.json"
    if path.exists():
        old = json.loads(path.read_text())
        for name in (
            "world_size",
            "threads",
            "versions",
            "device",
            "compile",
            "tagger",
            "micro_batch",
        ):
            if name in old and old[name] != record.get(name):
                print(
                    f"warning: {name} was {old[name]}, is {record.get(name)}: not bit-equal to an "
                    "undisturbed run"
                )
        record["command"] = old["command"]
        if old["data_sha256"] != record["data_sha256"]:
            raise UserError(
                f"the training data is not what {run.directory} began with: "
                f"{_difference(old.get('data', {}), shards)}; bring it back, or use another --out"
            )
    replace_text(path, json.dumps(record, indent=1) + "\n")


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
    """What became of the files of the data."""
    found = {
        "missing": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "changed": [name for name in old if new.get(name, old[name]) != old[name]],
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in found.items()
        if names
    ]
    return ", ".join(told) or "another order"


def commit() -> str:
    """The commit of the source, with + where the tree differs from it; "unknown" outside a
    checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head, dirty = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
