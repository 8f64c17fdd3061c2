"""`metrics.jsonl` is the record; the screen and optional trackers are mirrors of it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from superclip.errors import UserError, replace_text
from superclip.ops.phases import phase

if TYPE_CHECKING:
    from superclip.training.state import Plan

T = TypeVar("T")
Mirror = Callable[[int, dict[str, float]], object]
PACE = ("samples_per_s", "data_wait", "peak_memory_gib", "mfu")
"""Metrics of the machine rather than of the model: they differ between equal runs."""


class Tracker:
    """Writes metrics on the main rank, and keeps time; on other ranks it does nothing.

    Args:
        path: `metrics.jsonl`, or None on other ranks.
        start: the step the run goes on from; later lines of an interrupted run are dropped.
        mirrors: called with every line, too.
        flops: that the device does in a second at best, and that one pair costs; None if unknown.
    """

    def __init__(
        self,
        path: Path | None,
        start: int = 0,
        mirrors: Iterable[Mirror] = (),
        flops: tuple[float, float] | None = None,
    ):
        self.path, self.mirrors, self.flops = path, tuple(mirrors), flops
        self._bar: Any = None
        self._global_batch = 0
        self._evaluated: set[int] = set()
        self._reset()
        if path is None:
            return
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start]
        self._evaluated = {int(_step_of(line)) for line in kept if '"loss"' not in line}
        replace_text(path, "".join(line + "\n" for line in kept))

    def watch(self, batches: Iterable[T], start: int, plan: Plan) -> Iterator[T]:
        """The batches, with the time one waits for them noted; a bar on a terminal."""
        self._global_batch = plan.global_batch
        if self.path is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=plan.total_steps, initial=start, unit="step", dynamic_ncols=True)
        source = iter(batches)
        while True:
            began = time.perf_counter()
            with phase("data"):
                batch = next(source, None)
            self._began = time.perf_counter()
            self._waited += self._began - began
            if batch is None:
                break
            yield batch
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def stepped(self, terms: dict[str, float]) -> None:
        """A step is done."""
        self._steps += 1
        self._worked += time.perf_counter() - self._began
        if self._bar is not None:
            told = self._pace()
            self._bar.set_postfix_str(
                f"loss {terms['loss']:.4f}, {told['samples_per_s']:.0f} samples/s, "
                f"{100 * told['data_wait']:.0f} % data wait",
                refresh=False,
            )
            self._bar.update()

    def pace(self) -> dict[str, float]:
        """Pairs a second over all ranks (saving and evaluating aside), the share of that time spent
        waiting for data, peak memory (of the device; of the process on a CPU), and the share of the
        device's best; since the last call."""
        told = self._pace()
        if self.flops is not None:
            told["mfu"] = told["samples_per_s"] * self.flops[1] / self.flops[0]
        self._reset()
        return told

    def _pace(self) -> dict[str, float]:
        spent = self._waited + self._worked
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "samples_per_s": self._steps * self._global_batch / spent,
            "data_wait": self._waited / spent,
            "peak_memory_gib": peak,
        }

    def _reset(self) -> None:
        self._steps, self._waited, self._worked, self._began = 0, 0.0, 0.0, 0.0

    def has_evaluation(self, step: int) -> bool:
        """Whether the record holds this step's evaluation."""
        return step in self._evaluated

    def recorded(self, name: str) -> list[float]:
        """A metric in all lines of the record that have it."""
        lines = [] if self.path is None else self.path.read_text().splitlines()
        return [values[name] for values in map(json.loads, lines) if name in values]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line in the record and one on the screen."""
        if self.path is None or not metrics:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        shown = {
            n: v for n, v in metrics.items() if not n.startswith(("param_norm", "update_norm"))
        }
        line = " ".join(f"{name}={value:.5g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.write(f"step={step} {line}", file=sys.stderr)
        else:
            print(f"{time.strftime('%H:%M:%S')} step={step} {line}", file=sys.stderr, flush=True)
        for mirror in self.mirrors:
            mirror(step, metrics)


def _step_of(line: str) -> float:
    """The step of a record line; a line cut by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def open_mirror(kind: str, directory: Path, config: dict[str, Any], start: int) -> Mirror:
    """TensorBoard or Weights & Biases behind one function. W&B goes on with the run whose id lies
    in the folder.

    Raises:
        UserError: if the tracker is not installed.
    """
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard.writer import SummaryWriter

            writer = SummaryWriter(str(directory), purge_step=start + 1)

            def add(step: int, metrics: dict[str, float]) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return add
        import wandb

        run = wandb.init(dir=str(directory), config=config, name=directory.name, resume="auto")
        return lambda step, metrics: run.log(metrics, step=step)
    except ImportError as error:
        raise UserError(f"--track {kind}: {error}; pip install '.[track]'") from None
