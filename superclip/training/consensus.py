"""What every rank must know of the others before it goes on: one small message a step."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch

from superclip.errors import UserError
from superclip.losses import Terms
from superclip.training.checkpoint import save_checkpoint
from superclip.training.state import Run, TrainState

GRACE = 1000
"""Pictures before which a share of unreadable ones says little."""


@dataclass(frozen=True)
class News:
    """The same on every rank.

    Attributes:
        terms: means over ranks, and their sum as `loss`.
        broken_ranks: whose terms are not finite.
        stop: some rank was asked to stop.
        save: the main rank's clock asks for a checkpoint.
    """

    terms: dict[str, float]
    broken_ranks: list[int]
    stop: bool
    save: bool


class Consensus:
    """Makes ranks agree, step by step."""

    def __init__(self, run: Run):
        self.run, self._saved = run, time.monotonic()  # no step back of the clock delays a save

    def reach(self, state: TrainState, terms: Terms, causes: Counter[str]) -> News:
        """Tell the others of this rank's step, and hear of theirs.

        Raises:
            UserError: on every rank, if too many pictures can't be read; the step is saved first.
        """
        run, names = self.run, list(terms)
        due = run.world.is_main and self._is_due()
        flags = [float(run.stop.received is not None), float(due), float(causes.total())]
        mine = torch.stack([terms[name].double() for name in names]).cpu()
        told = run.world.exchange(torch.cat([torch.tensor(flags, dtype=torch.float64), mine]))
        if told[:, 2].any():
            for found in run.world.gather_objects(dict(causes)):
                state.substituted += Counter(found)
            self._check_skips(state)
        values = told[:, 3:]
        metrics = dict(zip(names, values.mean(0).tolist()))
        metrics["loss"] = sum(metrics.values())
        broken = (~values.isfinite().all(1)).nonzero().flatten().tolist()
        return News(metrics, broken, bool(told[:, 0].any()), bool(told[:, 1].any()))

    def _is_due(self) -> bool:
        minutes = self.run.config.save_every_minutes
        if minutes is None or time.monotonic() - self._saved < 60 * minutes:
            return False
        self._saved = time.monotonic()
        return True

    def _check_skips(self, state: TrainState) -> None:
        run, bad = self.run, state.substituted.total()
        seen = state.step * run.plan.global_batch
        if bad <= run.config.data.max_skip_rate * max(seen, GRACE):
            return
        save_checkpoint(run, state)
        causes = ", ".join(f"{cause} {n}" for cause, n in state.substituted.most_common())
        raise UserError(
            f"{bad} of {seen} pictures can't be read ({causes}), above --max-skip-rate "
            f"{run.config.data.max_skip_rate:g}; mend {run.rows.source.name} or raise it (saved at "
            f"step {state.step})"
        )
