"""The course of grounding along training: every layer, and the champion, with their bands."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.figures import CHAMPION, spread
from interp.render.words import count

LAYERS = "viridis"
WIDTH, HEIGHT = 5.2, 2.9


def figure(course: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Excess over the steps: a line a layer from dark (first) to light (last), the last
    checkpoint's champion in red; filled from where its band stays above 0 on."""
    curves = {name: own for name, own in course["curves"].items() if name != "best"}
    steps = np.array(course["steps"])
    shades = matplotlib.colormaps[LAYERS](np.linspace(0, 0.85, len(curves) - 1))
    ends = []
    with themed(theme):
        result = Figure(figsize=(WIDTH + 2.2, HEIGHT + 1.6))
        write(result, 0.15, 0.12, "When grounding appears", size=10.5, weight="bold")
        axes = place(result, 0.75, 0.5, WIDTH, HEIGHT)
        axes.axhline(0, color=theme.rule, linewidth=0.8, zorder=0)
        for (name, own), shade in zip(curves.items(), [*shades, CHAMPION]):
            axes.fill_between(steps, own["low"], own["high"], color=shade, alpha=0.12, linewidth=0)
            axes.plot(steps, own["estimate"], color=shade, linewidth=1.3)
            there = steps >= (np.inf if own["appears"] is None else own["appears"])
            for at, value, full in zip(steps, own["estimate"], there):
                face = shade if full else theme.paper
                axes.plot(at, value, "o", ms=4, mfc=face, mec=shade, mew=0.9)
            ends.append((own["estimate"][-1], name, shade))
        ends.sort(key=lambda end: end[0])
        low, high = axes.get_ylim()
        at = spread(np.array([value for value, *_ in ends]), 0.06 * (high - low))
        beyond = steps[-1] + 0.02 * np.ptp(steps)
        for height, (value, name, shade) in zip(at, ends):
            axes.plot([steps[-1], beyond], [value, height], color=shade, lw=0.6, clip_on=False)
            axes.text(beyond, height, f" {name}", color=shade, size=7, va="center")
        axes.set_xlim(steps[0], steps[-1])
        axes.set_xticks(steps)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"validation {course['what']}")
        axes.tick_params(length=2)
        axes.spines[["top", "right"]].set_visible(False)
        write(result, 0.15, HEIGHT + 0.98, caption(course), size=7.5, linespacing=1.5)
    return result


def caption(course: dict[str, Any]) -> str:
    """What is drawn, on how many pictures, and when the champion's band leaves 0 for good."""
    own = course["curves"][f"champion {course['champion']}"]
    when = "at no step" if own["appears"] is None else f"from step {count(own['appears'])} on"
    return (
        f"Bands: simultaneous 95 % over curves and steps, n = {count(own['n'])} validation "
        f"pictures; 0 is chance.\nFilled: the band stays above 0 from here on; "
        f"{course['champion']}, the last checkpoint's champion, {when}."
    )
