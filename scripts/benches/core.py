"""Sides that take turns, and the table of what they took."""

from __future__ import annotations

import itertools
import operator
import os
import platform
import re
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from superclip.errors import UserError

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import numpy as np
    import torch


CLOCKS = "wall", "cpu"
"""Columns of a series: `[rounds, 2]` seconds, or anything derived from them."""


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Series in seconds of every side; the order of the sides turns around each round.

    Args:
        settle: waits for what a side has only queued, on a GPU.
    """
    import numpy as np

    print("one untimed pass of each side", file=sys.stderr, flush=True)
    for side in sides.values():  # allocations, caches, optimizer state
        side()
    settle()
    costs = {name: np.zeros((rounds, 2)) for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter(), time.process_time()
            sides[name]()
            settle()
            costs[name][number] = time.perf_counter() - began[0], time.process_time() - began[1]
        told = ", ".join(f"{name} {cost[number, 0]:.3g} s" for name, cost in costs.items())
        print(f"round {number + 1}/{rounds}: {told}", file=sys.stderr, flush=True)
    return costs


@dataclass(frozen=True)
class Row:
    """One line of a table: a series with its unit, and the target its median should meet."""

    label: str
    unit: str
    series: np.ndarray
    target: tuple[str, float] | None = None

    def spread(self, clock: str) -> tuple[float, float, float]:
        """Median, least and largest of `wall` or `cpu` over the rounds."""
        values = self.series[:, CLOCKS.index(clock)].tolist()
        return statistics.median(values), min(values), max(values)

    @property
    def verdict(self) -> str:
        """Target and what the medians say; empty without a target."""
        if self.target is None:
            return ""
        sign, limit = self.target
        meets = {"<=": operator.le, ">=": operator.ge}[sign]
        wall, cpu = ("met" if meets(self.spread(c)[0], limit) else "missed" for c in CLOCKS)
        return f"{sign} {limit:g} {wall if wall == cpu else f'{wall} by wall, {cpu} by CPU'}"

    def __str__(self) -> str:
        wall, cpu = ("{:>9.4g} [{:.4g}, {:.4g}]".format(*self.spread(c)) for c in CLOCKS)
        return f"{self.label:<44}{self.unit:<12}{wall:<31}{cpu:<31}{self.verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        told = {c: dict(zip(("median", "min", "max"), self.spread(c))) for c in CLOCKS}
        rounds = [dict(zip(CLOCKS, costs)) for costs in self.series.tolist()]
        return {
            "label": self.label,
            "unit": self.unit,
            "verdict": self.verdict,
            "rounds": rounds,
        } | told


class Findings(NamedTuple):
    """What a bench found: rows of the table, and lines that are no times."""

    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Bench(ABC):
    rounds: int = 5
    """Timed rounds of every side."""
    threads: int | None = 1
    """CPU threads; one makes a rate a rate per core. None: torch's choice, or OMP_NUM_THREADS."""
    out: Path | None = None
    """JSON file for everything printed and every round."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "workers" else 1
            if type(value) is int and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if self.out is not None and not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}")

    @abstractmethod
    def run(self) -> Findings: ...


def peak_of(side: Callable[[], object], peaks: list[float]) -> None:
    """Run a side; note its peak of GPU memory beyond what lived before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    peaks.append(torch.cuda.max_memory_allocated() - before)


def allocated(side: Callable[[], object], device: torch.device) -> float:
    """Bytes that live at a side's peak beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        peaks: list[float] = []
        peak_of(side, peaks)
        return peaks[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        side()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found: list[Any] = record.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return float(max(itertools.accumulate(event.nbytes() for event in events)))


def resident() -> float:
    """MB of memory of this process and its readers (Linux); what they share counts in each."""
    from multiprocessing import active_children

    pids = [os.getpid(), *(child.pid for child in active_children())]
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


def settle_on(device: torch.device) -> Callable[[], object]:
    """Waits for the device's queue; nothing to wait for on the CPU."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def machine() -> dict[str, Any]:
    """The hardware and versions behind a number."""
    import torch

    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.is_file() else "")
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("torch", "open_clip_torch", "numpy", "pillow")},
    }
