"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch.profiler import ProfilerActivity, profile

from superclip.ops.phases import Phase, phases_recorded

T = TypeVar("T")
WARM = 3
"""Steps before the profile: allocations, compilation, first reads."""


def profiled(batches: Iterable[T], steps: int | None, directory: Path) -> Iterator[T]:
    """The same batches; the work on some of them is profiled, once the first few are done.

    Writes `profile_trace.json.gz` (for Perfetto, chrome://tracing or TensorBoard) and prints a
    table. On CUDA the phases wait for their kernels meanwhile, so their sum is above a step's usual
    time.
    """
    if steps is None:
        yield from batches
        return
    source = iter(batches)
    for _ in range(WARM):
        yield from _next(source)
    with phases_recorded(), profile(activities=list(_activities())) as recorder:
        began, done = time.perf_counter(), 0
        while done < steps and (found := _next(source)):
            yield from found
            done += 1
        wall = time.perf_counter() - began
    events = recorder.events()
    if done and events is not None:
        path = directory / "profile_trace.json.gz"
        recorder.export_chrome_trace(str(path))
        print(f"{_table(_exclusive(events), wall, done)}\ntrace: {path}", flush=True)
    else:
        print(f"no profile: the run ended within its first {WARM} steps, which warm up", flush=True)
    yield from source


def _next(source: Iterator[T]) -> list[T]:
    found = next(source, None)
    return [] if found is None else [found]


def _activities() -> Iterator[ProfilerActivity]:
    import torch

    yield ProfilerActivity.CPU
    if torch.cuda.is_available():
        yield ProfilerActivity.CUDA


def _exclusive(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each phase, without the phases that ran inside it."""
    spans = sorted(
        ((e.time_range.start, -e.time_range.end, e.name) for e in events if _is_phase(e)),
    )
    spent = dict.fromkeys(get_args(Phase), 0.0)
    inside: list[tuple[float, str]] = []
    for start, negative_end, name in spans:
        while inside and inside[-1][0] <= start:
            inside.pop()
        length = (-negative_end - start) / 1e6
        spent[name] += length
        if inside:
            spent[inside[-1][1]] -= length
        inside.append((-negative_end, name))
    return spent


def _is_phase(event: Any) -> bool:
    return event.name in get_args(Phase) and str(event.device_type).endswith("CPU")


def _table(spent: dict[str, float], wall: float, steps: int) -> str:
    rows = [*spent.items(), ("other", wall - sum(spent.values()))]
    lines = [f"{steps} steps, {1e3 * wall / steps:.1f} ms each:"]
    lines += [f"  {n:<14}{1e3 * t / steps:>9.2f} ms {100 * t / wall:>5.1f} %" for n, t in rows]
    return "\n".join(lines)
