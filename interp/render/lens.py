"""Curves of a lens over the layers, with their bands."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interp.render.canvas import LIGHT, Theme, place, printable, themed, write
from interp.render.words import count, plural, short

ACROSS, WIDTH, HEIGHT, GAP = 4, 1.85, 1.2, 0.45


def lens_figure(report: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """R^2, mean AUC and the AUC of each word, in small panels."""
    panels = [("R²", None, report["r2"]), ("AUC, mean over words", 0.5, report["mean"]["auc"])]
    panels += [
        (f"{short(row['concept'], 14)} ({row['with']} / {row['without']})", 0.5, row["auc"])
        for row in report["concepts"]
    ]
    down = -(-len(panels) // ACROSS)
    height = 1.1 + down * (HEIGHT + GAP)
    with themed(theme):
        figure = Figure(figsize=(ACROSS * (WIDTH + GAP) + 0.4, height))
        title = f"What each layer's reading says of words (lens: {report['lens']})"
        write(figure, 0.15, 0.12, title, size=10.5, weight="bold")
        write(figure, 3.25, 0.4, short(report["model"]), size=8, color=theme.muted)
        colours = (theme.pixels, theme.muted, theme.towers)
        for k, (form, style) in enumerate(zip(report["forms"], ("-", ":", "--"))):
            text = f"{'─' if style == '-' else '┄'} {form}"
            write(figure, 0.15 + 0.95 * k, 0.4, text, size=8, color=colours[k])
        for k, (name, chance, curves) in enumerate(panels):
            row, column = divmod(k, ACROSS)
            left, top = 0.45 + column * (WIDTH + GAP), 0.9 + row * (HEIGHT + GAP)
            axes = place(figure, left, top, WIDTH, HEIGHT)
            axes.set_title(printable(name), size=8, loc="left", pad=3, parse_math=False)
            for form, style, colour in zip(report["forms"], ("-", ":", "--"), colours):
                _curve(axes, curves[form], style, colour)
            if chance is not None:
                axes.axhline(chance, color=theme.rule, linewidth=0.8, zorder=0)
            axes.set_ylim(-0.1 if chance is None else 0, 1.03)
            every = range(0, len(report["layers"]), 1 + len(report["layers"]) // 7)
            axes.set_xticks(list(every), [report["layers"][layer] for layer in every], size=6.5)
            axes.tick_params(length=2, labelsize=6.5)
            axes.spines[["top", "right"]].set_visible(False)
        words = plural(len(report["concepts"]), "word")
        write(
            figure,
            0.15,
            height - 0.3,
            f"{words}: pictures with / without it in a caption; n = {count(report['n'])} of "
            "validation; simultaneous 95 % bands; line: chance .5. R² is cut off below −.1.",
            size=7,
        )
    return figure


def _curve(axes: Axes, curve: dict[str, list[float]], style: str, colour: str) -> None:
    x = np.arange(len(curve["estimate"]))
    axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, curve["estimate"], style, color=colour, linewidth=1.3)
