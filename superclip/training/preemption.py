"""Being asked to stop: by a cluster that wants its machine back, or by a time limit."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """Notes SIGTERM and SIGUSR1 instead of dying of them, while it is entered.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
