"""Heat map over layers and heads, and the heads of each layer against the baselines."""

from __future__ import annotations

import textwrap

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from interp.analysis import Findings
from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.words import (
    ALPHA,
    attention_of,
    count,
    number,
    pixel_maps,
    plural,
    short,
    significant,
    subject,
    untrained,
)
from interp.results import SweepResults

MAP = "PuOr_r"
"""Purple below 0, orange above: told apart under every common colour blindness."""

CELLS_WITH_NUMBERS = 150
CHAMPION = "#d4006a"
BLIND = "own prior, uniform, any fixed map"
UNTRAINED = "untrained tower"


def heat_map(results: SweepResults, findings: Findings, theme: Theme = LIGHT) -> Figure:
    """Excess of every head on validation; the champion framed, discovery's significant heads
    dotted."""
    values = findings.verdict.band.estimate
    layers, heads = values.shape
    wide, high = float(np.clip(5.6 / heads, 0.36, 0.9)), float(np.clip(5.2 / layers, 0.3, 0.5))
    width, height = max(wide * heads + 1.6, 5.2), high * layers + 1.6
    with themed(theme):
        figure = Figure(figsize=(width, height))
        _title(figure, results, "Excess attention on the objects", theme)
        left = (width - wide * heads - 0.5) / 2
        axes = place(figure, left, 0.7, wide * heads, high * layers)
        limit = float(np.abs(values).max()) or 1.0
        image = axes.imshow(values, MAP, Normalize(-limit, limit), aspect="auto")
        axes.set_xticks(range(heads), [f"H{i}" for i in range(heads)])
        axes.set_yticks(range(layers), [f"L{i}" for i in range(layers)])
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(1, heads) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, layers) - 0.5, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color=theme.paper, linewidth=1.5)
        axes.spines[:].set_visible(False)
        for layer, index in np.argwhere(significant(findings)):
            dot_ink = _ink_on(float(values[layer, index]) / limit)
            axes.plot(index + 0.5 - 0.08 / wide, layer - 0.5 + 0.08 / high, ".", c=dot_ink, ms=5)
        if values.size <= CELLS_WITH_NUMBERS:
            size = 8 if wide > 0.5 else 6.5
            for (layer, index), value in np.ndenumerate(values):
                ink = _ink_on(value / limit)
                text = number(value, 3)
                axes.text(index, layer, text, ha="center", va="center", color=ink, size=size)
        champion = findings.champion
        axes.add_patch(
            Rectangle(
                (champion.index - 0.5, champion.layer - 0.5),
                1,
                1,
                fill=False,
                edgecolor=CHAMPION,
                linewidth=2.5,
                clip_on=False,
                zorder=3,
            )
        )
        bar = figure.colorbar(
            image, cax=place(figure, left + wide * heads + 0.12, 0.7, 0.12, high * layers)
        )
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(length=2, labelsize=7)
        write(figure, 0.15, height - 0.53, heat_map_marks(findings), size=7.5, linespacing=1.5)
    return figure


def heat_map_marks(findings: Findings) -> str:
    """What the marks mean, with the numbers of pictures."""
    chosen, judged = findings.verdict.discovery.n, findings.verdict.band.n
    found = plural(int(significant(findings).sum()), "head")
    return (
        f"Cells: validation excess over the head's own prior, n = {count(judged)}; 0 is chance.\n"
        f"Frame: champion {findings.champion}. Dot: significant on discovery ({found}; max-T p ≤ "
        f"{ALPHA}, n = {count(chosen)})."
    )


def layers_plot(results: SweepResults, findings: Findings, theme: Theme = LIGHT) -> Figure:
    """Every head's excess on validation with the simultaneous band, layer by layer; baselines are
    lines, and those beyond the scale are named in the figure."""
    band, marked = findings.verdict.band, significant(findings)
    layers, heads = band.estimate.shape
    width = float(np.clip(0.12 * layers * heads + 3.2, 5.6, 10))
    lines = _lines(findings)
    top = max(float(band.high.max()), *(value for value, _, far in lines if not far))
    bottom = min(float(band.low.min()), 0.0)
    inside = [(v, name) for v, name, far in lines if not far or bottom <= v <= 1.6 * top]
    beyond = [(v, name) for v, name, far in lines if far and not bottom <= v <= 1.6 * top]
    top, pad = max(top, *(v for v, _ in inside)), 0.05 * (top - bottom)
    marks = _layers_marks(findings, beyond, round(13 * width))
    height = 3.65 + 0.17 * marks.count("\n")
    with themed(theme):
        figure = Figure(figsize=(width, height))
        _title(figure, results, "Heads of each layer against the baselines", theme)
        axes = place(figure, 0.75, 0.7, width - 2.95, 2.4)
        axes.set_xlim(-0.5, layers - 0.5)
        axes.set_ylim(bottom - pad, top + pad)
        for value, name in inside:
            axes.axhline(value, color=_line_colour(name, theme), linewidth=0.7, zorder=1)
        _label_lines(axes, width - 2.95, inside, theme)
        for layer in range(layers):
            x = layer + (np.arange(heads) + 0.5) / heads * 0.8 - 0.4
            mean = band.estimate[layer]
            axes.vlines(x, band.low[layer], band.high[layer], color=theme.muted, linewidth=0.8)
            for at, value, full in zip(x, mean, marked[layer]):
                face = theme.ink if full else theme.paper
                axes.plot(at, value, "o", ms=4.5, mfc=face, mec=theme.ink, mew=0.9, zorder=3)
        champion = findings.champion
        x = champion.layer + (champion.index + 0.5) / heads * 0.8 - 0.4
        axes.plot(
            x, band.estimate[champion.layer, champion.index], "o", ms=9, mfc="none", mec=CHAMPION
        )
        axes.set_xticks(range(layers), [f"L{i}" for i in range(layers)])
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", length=2)
        axes.set_ylabel("validation excess")
        axes.spines[["top", "right"]].set_visible(False)
        write(figure, 0.15, 3.35, marks, size=7.5, linespacing=1.5)
    return figure


def _layers_marks(findings: Findings, beyond: list[tuple[float, str]], letters: int) -> str:
    line = (
        f"Bars: simultaneous 95 % band, n = {count(findings.verdict.band.n)}. Filled: significant "
        f"on discovery. Ring: champion {findings.champion}."
    )
    if beyond:
        named = ", ".join(f"{name} {number(v)}" for v, name in sorted(beyond, reverse=True))
        line += f" Off the scale: {named}."
    return textwrap.fill(line, letters)


def _lines(findings: Findings) -> list[tuple[float, str, bool]]:
    """Height, name, and whether the line may fall off the scale."""
    lines = [(0.0, BLIND, False)]
    lines += [
        (row.excess.estimate, UNTRAINED, False)
        for row in untrained(findings)
        if row.excess is not None
    ]
    return lines + [
        (row.excess.estimate, row.name.partition(" (")[0], True)
        for row in pixel_maps(findings)
        if row.excess is not None
    ]


def _line_colour(name: str, theme: Theme) -> str:
    return {BLIND: theme.ink, UNTRAINED: theme.towers}.get(name, theme.pixels)


def _label_lines(axes: Axes, width: float, lines: list[tuple[float, str]], theme: Theme) -> None:
    """Names right of axes `width` inches wide, pushed apart where lines lie close; untrained towers
    share one."""
    towers = [value for value, name in lines if name == UNTRAINED]
    labels = [(value, name) for value, name in lines if name != UNTRAINED]
    if towers:
        labels.append((float(np.mean(towers)), UNTRAINED))
    labels.sort()
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    heights = spread(np.array([value for value, _ in labels]), 0.075 * (high - low))
    leader = 0.12 / width * (right - left)
    for (value, name), height in zip(labels, heights):
        many = f"{plural(len(towers), UNTRAINED)}, best head each"
        text = many if name == UNTRAINED else name
        colour = _line_colour(name, theme)
        axes.plot([right, right + leader], [value, height], color=colour, lw=0.7, clip_on=False)
        axes.text(right + 1.3 * leader, height, text, color=colour, size=7, va="center")


def spread(values: Float[np.ndarray, " k"], step: float) -> Float[np.ndarray, " k"]:
    """Ascending values moved up as little as leaves `step` between neighbours, then recentred.

    >>> spread(np.array([0.0, 0.1, 5.0]), 1.0).round(2).tolist()
    [-0.3, 0.7, 4.7]
    """
    offsets = step * np.arange(len(values))
    moved = np.maximum.accumulate(values - offsets) + offsets
    return moved - (moved - values).mean()


def _title(figure: Figure, results: SweepResults, title: str, theme: Theme) -> None:
    write(figure, 0.15, 0.12, title, size=10.5, weight="bold")
    data = short(results.manifest["data"]["name"])
    below = f"{subject(results)}, {data}, {attention_of(results)}"
    write(figure, 0.15, 0.36, below, size=8, color=theme.muted)


def _ink_on(relative: float) -> str:
    """Black or white, whichever reads better on the map at this share of its limit."""
    return "#ffffff" if abs(relative) > 0.72 else "#1b1d21"
