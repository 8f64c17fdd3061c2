"""One name for a head everywhere: 0-based, printed as `L11H5`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from superclip.errors import UserError


@dataclass(frozen=True, order=True)
class Head:
    """A head of the vision tower; layer and index count from 0.

    >>> str(Head(11, 5)), Head.parse("l2h3")
    ('L11H5', Head(layer=2, index=3))
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"

    @staticmethod
    def parse(text: str) -> Head:
        match = re.fullmatch(r"[lL](\d+)[hH](\d+)", text.strip())
        if match is None:
            raise UserError(f"{text!r} is not a head; heads count from 0 and look like L11H5")
        return Head(int(match[1]), int(match[2]))
