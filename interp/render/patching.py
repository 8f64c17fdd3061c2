"""Heat maps of what every head carries: its output, where it looks, what it finds."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from interp.heads import Head
from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.figures import MAP
from interp.render.words import ALPHA, count, short, span

TITLES, DIRECTIONS = ("output", "where it looks", "what it finds"), ("denoise", "noise")


def figure(report: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Layer by head, a row a direction, on one colour scale; dots where max-T rejects 0."""
    rows = [row for name in DIRECTIONS for row in report[name]["heads"]]
    last = Head.parse(rows[-1]["at"])
    shape = (2, 3, last.layer + 1, last.index + 1)
    values, p = (np.array([row[c] for row in rows]).reshape(shape) for c in ("estimate", "p"))
    scale = Normalize(-np.abs(values).max(), np.abs(values).max())
    high, wide = (float(np.clip(0.28 * side, 1.1, 3.4)) for side in shape[2:])
    with themed(theme):
        width = max(3 * wide + 2.2, 6)
        result = Figure(figsize=(width, 2 * high + 1.9))
        write(result, 0.15, 0.12, "Share of the gap that a head carries", size=10.5, weight="bold")
        for k, m in np.ndindex(shape[:2]):
            axes = place(result, 0.8 + m * (wide + 0.2), 0.7 + k * (high + 0.15), wide, high)
            axes.imshow(values[k, m], MAP, scale, aspect="auto")
            for layer, head in np.argwhere(p[k, m] <= ALPHA):
                axes.plot(head + 0.32, layer - 0.32, ".", color=theme.ink, ms=3)
            axes.set_xticks(range(shape[3]), [f"H{i}" if k else "" for i in range(shape[3])])
            axes.set_yticks(range(shape[2]), ["" if m else f"L{i}" for i in range(shape[2])])
            axes.tick_params(length=0, labelsize=6)
            axes.spines[:].set_visible(False)
            axes.set_title("" if k else TITLES[m], size=8)
            axes.set_ylabel("" if m else DIRECTIONS[k])
        bar = place(result, 0.8 + 3 * (wide + 0.2), 0.7, 0.12, 2 * high + 0.15)
        result.colorbar(ScalarMappable(scale, MAP), cax=bar).outline.set_visible(False)
        write(
            result,
            0.15,
            2 * high + 1.25,
            caption(report, rows, round(13 * width)),
            size=7.5,
            linespacing=1.5,
        )
    return result


def caption(report: dict[str, Any], rows: list[dict[str, Any]], letters: int) -> str:
    """What was compared, on how many pairs, and the head that carries most."""
    best = max(rows[: len(rows) // 6], key=lambda row: row["estimate"])
    dots = sum(row["p"] <= ALPHA for row in rows)
    return textwrap.fill(
        f"Pairs: {short(report['pairs'])}, n = {count(report['n'])}. Denoised, the output of "
        f"{best['at']} brings back most: {span(best)}, simultaneous 95 % band. Dot: other than 0, "
        f"max-T over a row of maps, p ≤ {ALPHA} ({dots} of {len(rows)} cells).",
        letters,
    )
