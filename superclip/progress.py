"""How far long work has come."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, in logs and notebooks, a line every half minute."""

    def __init__(self, *args: Any, **options: Any):
        self._lines = not sys.stderr.isatty()
        if self._lines:
            options |= {"mininterval": EVERY, "maxinterval": EVERY, "file": sys.stderr}
            unit = options.get("unit", "it")  # in English: batches, pictures
            options["unit"] = unit + ("es" if unit.endswith("ch") else "s")
            spent = "{elapsed} so far, about {remaining} left"
            options["bar_format"] = "{desc}: {n_fmt} of {total_fmt} {unit}, " + spent
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write the line."""
        if not self._lines:
            super().display(msg, pos)
        elif self.n:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        """The line of work that is done is what follows it."""
        if self._lines:
            self.disable = True
            self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            super().close()
