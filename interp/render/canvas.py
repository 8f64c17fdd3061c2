"""What all figures share: ink and paper, layout in inches, bytes of a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unicodedata import category

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure's text, lines and background, and of two kinds of baselines (Okabe and
    Ito's palette, told apart under every common colour blindness)."""

    ink: str
    muted: str
    rule: str
    paper: str
    towers: str
    pixels: str


LIGHT = Theme("#1b1d21", "#5a6069", "#c5c9cf", "#ffffff", "#0072b2", "#c25400")
DARK = Theme("#e9e7e2", "#a6abb5", "#454b54", "#17191d", "#56b4e9", "#e69f00")
DPI = 160


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Within the block, new figures take the theme; the user's own settings are not read."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 8,
                "text.color": theme.ink,
                "axes.labelcolor": theme.ink,
                "axes.edgecolor": theme.rule,
                "axes.linewidth": 0.8,
                "axes.facecolor": theme.paper,
                "figure.facecolor": theme.paper,
                "savefig.facecolor": theme.paper,
                "xtick.color": theme.rule,
                "ytick.color": theme.rule,
                "xtick.labelcolor": theme.ink,
                "ytick.labelcolor": theme.ink,
            }
        )
        yield


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down)
    )


def write(figure: Figure, left: float, top: float, text: str, **style: object) -> None:
    """Text with its upper left corner at a place in inches; no dollar sign starts a formula."""
    across, down = figure.get_size_inches()
    style = {"va": "top", "parse_math": False} | style
    figure.text(left / across, 1 - top / down, printable(text), **style)  # pyright: ignore[reportArgumentType]


def printable(text: str) -> str:
    """The text with a box for each letter that the font lacks and for marks that turn the writing
    around; words written from right to left keep to themselves, so that numbers beside them stand
    in their order."""
    known, right_to_left = _letters(), "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]"
    kept = "".join(
        c if c == "\n" or (ord(c) in known and category(c) != "Cf") else "\u25a1" for c in text
    )
    if not re.search(right_to_left, kept):
        return kept
    mark = "\u200e"  # left to right, without width
    return mark + re.sub(rf"{right_to_left}(?:\s*{right_to_left})*", rf"\g<0>{mark}", kept)


@cache
def _letters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
