"""`metrics.jsonl` is the record; the screen and optional trackers are mirrors of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from superclip.errors import UserError

Mirror = Callable[[int, dict[str, float]], None]


class Tracker:
    """Writes metrics on the main rank; on the others every method does nothing.

    Args:
        path: `metrics.jsonl`, or None on other ranks.
        start: the step the run goes on from; later lines of an interrupted run are dropped.
    """

    def __init__(self, path: Path | None, start: int = 0, mirror: Mirror | None = None):
        self.path, self.mirror, self._bar = path, mirror, None
        if path is not None:
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= start]
            path.write_text("".join(line + "\n" for line in kept))

    def progress(self, items: Iterable[Any], start: int, total: int) -> Iterator[Any]:
        """A bar on a terminal; nothing elsewhere."""
        if self.path is None or not sys.stderr.isatty():
            yield from items
            return
        from tqdm import tqdm

        self._bar = tqdm(items, initial=start, total=total, unit="step", dynamic_ncols=True)
        yield from self._bar
        self._bar = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line in the record and one on the screen."""
        if self.path is None or not metrics:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        line = " ".join(f"{name}={value:.5g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.write(f"step={step} {line}", file=sys.stderr)
        else:
            print(f"{time.strftime('%H:%M:%S')} step={step} {line}", file=sys.stderr, flush=True)
        if self.mirror is not None:
            self.mirror(step, metrics)


def _step_of(line: str) -> float:
    """The step of a record line; a line cut by a crash counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def open_mirror(kind: str, directory: Path, config: dict[str, Any]) -> Mirror | None:
    """TensorBoard or Weights & Biases behind one function.

    Raises:
        UserError: if the tracker is not installed.
    """
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard.writer import SummaryWriter

            writer = SummaryWriter(str(directory))

            def add(step: int, metrics: dict[str, float]) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

            return add
        if kind == "wandb":
            import wandb

            run = wandb.init(dir=str(directory), config=config)
            return lambda step, metrics: run.log(metrics, step=step)
    except ImportError as error:
        raise UserError(f"--report-to {kind}: {error}; pip install '.[track]'") from None
    return None
