"""A decided claim in words and as a figure: every seed's value, the value with its interval, and
the course behind it."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.stats.seeds import least_told, share_told
from superclip.evaluation.tables import shown

WIDTH, HEIGHT = 3.0, 1.9


def figure(report: dict[str, Any], theme: Theme = LIGHT) -> Figure | None:
    """Left every seed's value, a row a side; below it the value that is decided, its 95 % interval
    and the margin (dashed). Right, where the measure has one, the course of every seed (thin) and
    their mean. None where nothing was measured."""
    if "values" not in report:
        return None
    two, course = len(report["values"]) == 2, report["courses"][0][0] is not None
    colours = (theme.towers, theme.pixels)[: len(report["values"])]
    names = [models[0]["loss"] for models in report["models"]]
    if len(set(names)) < len(names):
        names = ["first", "second"]
    with themed(theme):
        across = 8.4 if course else 5.4
        wide, spare = (WIDTH if course else across - 1.1), (0.0 if course or two else 0.45)
        result = Figure(figsize=(across, HEIGHT + 1.8 - spare))
        title = textwrap.fill(report["hypothesis"]["claim"], int(12 * across))
        write(result, 0.15, 0.1, title, size=9, weight="bold")
        top, high = 0.65, HEIGHT * (0.55 if two else 0.8)
        axes = place(result, 0.85, top, wide, high)
        _seeds(axes, report, names, colours, theme)
        if two:
            below = place(result, 0.85, top + high + 0.36, wide, HEIGHT - high - 0.2)
            below.set_yticks([0], ["difference"])
            below.set_ylim(-1, 1)
            _decided(below, report, 0.0, 0.0, theme)
            below.set_xlabel(report["unit"])
        else:
            axes.set_xlabel(report["unit"])
        if course:
            right = place(result, across - WIDTH - 0.2, top, WIDTH, HEIGHT + 0.16)
            _courses(right, report, names, colours, theme)
        told = textwrap.fill(_caption(report), int(15.5 * across))
        write(result, 0.15, HEIGHT + 1.27 - spare, told, size=7.5)
    return result


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=2)
    axes.tick_params(axis="y", length=0)


def _seeds(
    axes: Axes, report: dict[str, Any], names: list[str], colours: tuple[str, ...], theme: Theme
) -> None:
    two = len(names) == 2
    rows = [np.array(values) for values in report["values"]]
    for k, (values, colour) in enumerate(zip(rows, colours)):
        axes.plot(values, np.full(len(values), -k), "o", ms=5, mfc="none", mec=colour, mew=1.2)
    if two and report["paired"]:
        for pair in zip(*rows):
            axes.plot(pair, (0, -1), color=theme.rule, linewidth=0.7, zorder=0)
    if not two:
        _decided(axes, report, report["level"], -1.0, theme)
    labels = names if two else [*names, "mean"]
    axes.set_yticks([-k for k in range(len(labels))], labels)
    axes.set_ylim(-1.6, 0.6)
    _bare(axes)


def _decided(axes: Axes, report: dict[str, Any], level: float, row: float, theme: Theme) -> None:
    low, value, high = (level + report[key] for key in ("low", "value", "high"))
    axes.plot([low, high], [row, row], color=theme.ink, linewidth=1.4)
    axes.plot(value, row, "s", ms=5, color=theme.ink)
    margin, test = report["hypothesis"]["margin"], report["hypothesis"]["test"]
    axes.axvline(level, color=theme.rule, linewidth=0.8, zorder=0)
    for edge in {margin, -margin} if test == "within" else {margin}:
        if edge:
            axes.axvline(level + edge, color=theme.muted, linewidth=0.8, linestyle="--", zorder=0)
    _bare(axes)


def _courses(
    axes: Axes, report: dict[str, Any], names: list[str], colours: tuple[str, ...], theme: Theme
) -> None:
    what, at, _ = report["courses"][0][0]
    rates = what == "learning rate"
    if not rates:
        axes.axhline(0, color=theme.rule, linewidth=0.8, zorder=0)
    for arm, name, colour in zip(report["courses"], names, colours):
        lines = np.array([values for _, _, values in arm])
        axes.plot(at, lines.T, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(at, lines.mean(axis=0), "o-", ms=3, color=colour, linewidth=1.8, label=name)
    axes.set_xlabel(what)
    axes.set_ylabel("image-to-text R@1" if rates else "mean excess of all heads")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2)
    if rates:
        axes.set_xscale("log")
        axes.minorticks_off()
    if rates or what == "layer":
        axes.set_xticks(at, [f"{place:g}" for place in at])
    axes.legend(frameon=False, fontsize=7.5)


def _caption(report: dict[str, Any]) -> str:
    seeds = " and ".join(map(str, report["seeds"]))
    return (
        f"{report['decision']}: claimed {report['rule']}. Circles: seeds ({seeds}); square: "
        f"value with 95 % interval; n = {report['pictures']['n']} confirm pictures; grey line: "
        f"chance or no difference; dashed: the margin."
    )


def said(report: dict[str, Any], code: str) -> list[str]:
    """A result as text. `code`: the hash of the code that is run now."""
    held, unit = report["hypothesis"], report["unit"]
    told = [held["claim"], f"  claimed: {report['rule']} (chance: {report['chance']})"]
    if nothing := report.get("nothing"):
        told.append(f"NOT DECIDED ({nothing})")
        return [*told, *_last_lines(report, code)]
    digits = 0 if unit == "steps" else 4
    number = f".{digits}f"
    for name, models, values, what in zip(
        ("first", "second"), report["models"], report["values"], report["of"]
    ):
        rates = sorted({m["lr"] for m in models})
        recipe = f"{models[0]['loss']} {models[0]['model']} lr {', '.join(f'{r:g}' for r in rates)}"
        told.append(f"  {name}: {recipe}" if len(report["models"]) > 1 else f"  {recipe}")
        told += [f"    {v:{number}} ({w})" for v, w in zip(values, what)]
    pictures, seeds = report["pictures"], report["seeds"]
    band = f"{report['value']:{number}} [{report['low']:{number}}, {report['high']:{number}}]"
    told.append(
        f"  {band} {unit}, n = {pictures['n']} confirm pictures of {pictures['data']}, "
        f"{' and '.join(map(str, seeds))} seed(s), {report['test']}"
    )
    if report["flips"] is not None:
        told.append(f"  exact test over seeds: p {shown(report['flips'])}, and .05 is needed, too")
    detectable, chance = _told_by_all_tests(report)
    if detectable and held["test"] != "within":
        told.append(
            f"  a true value {detectable:.{max(digits, 1)}f} {unit} beyond the margin would be "
            "told in 8 of 10 such studies"
        )
    if chance is not None:
        told.append(f"  a true value of 0 would be {report['power'][1]} with chance {chance:.2f}")
    why = ""
    if report["too_few_seeds"]:
        least = report["least_seeds"]
        why = f" ({min(seeds)} seed(s) a side; {least} are the least that decide: descriptive)"
    elif report["no_spread"]:
        why = " (nothing varies, so that nothing is known of the error)"
    elif seeds == [1]:
        why = " (of this checkpoint; nothing is said of its recipe)"
    return [*told, f"{report['decision'].upper()}{why}", *_last_lines(report, code)]


def _told_by_all_tests(report: dict[str, Any]) -> tuple[float | None, float | None]:
    """The value beyond the margin that is told in 8 of 10 studies, and the chance of a verdict if
    the true value is 0. A report holds those of t alone; where the exact test must agree, less is
    told."""
    detectable, power = report["detectable"], report["power"]
    chance = None if power is None else power[0]
    if report["flips"] is None or report["no_spread"]:
        return detectable, chance
    seeds = tuple(report["seeds"] if not report["paired"] else report["seeds"][:1])
    error = (report["high"] - report["low"]) / 2 / float(t(report["freedom"]).ppf(0.975))
    if (least := least_told(seeds)) is not None and detectable:
        detectable = max(detectable, least * error)
    if chance is not None:
        margin = report["hypothesis"]["margin"]
        edges = {margin, -margin} if report["hypothesis"]["test"] == "within" else {margin}
        both = share_told(seeds, [-edge / error for edge in edges])
        chance = chance if both is None else min(chance, both)
    return detectable, chance


def _last_lines(report: dict[str, Any], code: str) -> list[str]:
    told = []
    if report["exploratory"]:
        told.append("EXPLORATORY: the claim may have followed a look at the answer")
    if before := "; ".join(", ".join(look) for look in report["before"]):
        whose = "these models'" if report["exploratory"] else "the second side's"
        told.append(f"{whose} confirm pictures answered this before: {before}")
    if report["code"] != code:
        told.append(f"decided by other code than this, of commit {report['commit'][:12]}")
    number = report["claim_number"]
    told.append(f"file sha256 {report['asked']['file_sha256'][:12]}")
    told.append(f"claim {number} on these models' confirm pictures, each at 5 %")
    return told
