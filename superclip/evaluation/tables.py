"""Results and differences as plain values for a file, and as lines for a screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from superclip.errors import UserError
from superclip.evaluation.measures import Measure, Result
from superclip.evaluation.statistics import Interval, compare, intervals

SCHEMA = 2


def rows_of(result: Result, draws: int) -> list[dict[str, Any]]:
    """One row a measure, with its interval."""
    found = intervals(result.measures, draws)
    return [_row(m, interval) for m, interval in zip(result.measures, found)]


def _row(measure: Measure, interval: Interval) -> dict[str, Any]:
    statistic = measure.statistic
    return {
        "measure": measure.name,
        **asdict(interval),
        "chance": measure.chance,
        "percent": measure.percent,
        "queries": statistic.queries,
        "pictures": statistic.pictures,
        "candidates": measure.candidates,
    }


def differences_of(
    first: Sequence[list[Result]],
    second: Sequence[list[Result]],
    paired: bool,
    effect: float,
    draws: int,
) -> list[dict[str, Any]]:
    """One row a measure of every task, with p adjusted by Holm over all rows.

    Args:
        first, second: for each model of an arm its results.
        effect: in points for shares, in ranks for ranks.

    Raises:
        UserError: if a task's data are not the same for all models.
    """
    from statsmodels.stats.multitest import multipletests

    rows: list[dict[str, Any]] = []
    for results in zip(*first, *second, strict=True):
        told = results[0].data
        for other in results[1:]:
            keys = [k for k in told if _kept(told[k]) != _kept(other.data.get(k))]
            if keys:
                raise UserError(
                    f"{told.get('name')}: the checkpoints saw different data in {results[0].task} "
                    f"({', '.join(keys)} differ); name one set for all with --val-data"
                )
        for measures in zip(*(r.measures for r in results), strict=True):
            scale = 100 if measures[0].percent else 1
            found = compare(
                measures[: len(first)], measures[len(first) :], paired, effect / scale, draws
            )
            row = {"task": results[0].task, "percent": measures[0].percent, **asdict(found)}
            rows.append(row)
    adjusted: Any = multipletests([row["p"] for row in rows], method="holm")[1]
    for row, p in zip(rows, adjusted):
        row["p_holm"] = float(p)
    return rows


def _kept(value: Any) -> Any:
    """Of what is missing the keys alone: causes are words, which may name an address."""
    return sorted(value) if isinstance(value, dict) else value


def result_lines(result: dict[str, Any]) -> list[str]:
    """One task of a report."""
    data = result["data"]
    told = [f"{data['name']}"] + [str(data[k]) for k in ("split", "protocol") if k in data]
    lines = [
        f"{result['task']}: {', '.join(told)}",
        f"  {'measure':<34}{'value':>8}  {'95 % interval':<18}{'chance':>8}{'queries':>9}"
        f"{'pictures':>10}{'pool':>7}",
    ]
    for row in result["rows"]:
        scale = 100 if row["percent"] else 1
        interval = f"[{row['low'] * scale:.1f}, {row['high'] * scale:.1f}]"
        lines.append(
            f"  {row['measure']:<34}{row['value'] * scale:>8.1f}  {interval:<18}"
            f"{row['chance'] * scale:>8.1f}{row['queries']:>9}{row['pictures']:>10}"
            f"{row['candidates'] or '':>7}"
        )
    lost = data["missing"]
    for missing in lost.values() if result["task"] == "probe" else [lost]:
        if missing:
            key, cause = next(iter(missing.items()))
            lines.append(f"  {len(missing)} picture(s) can't be read: {key}: {cause}")
    return lines + [f"  {line}" for line in note_lines(result["notes"])]


def note_lines(notes: dict[str, Any]) -> list[str]:
    """What a reader must know beside the rows; everything else stays in the file."""
    lines = []
    for name, values in notes.get("ceilings", {}).items():
        shown = "  ".join(f"{k} {100 * v:.1f}" for k, v in values.items())
        lines.append(f"ceiling, {name.replace('_', '-')} model, image-to-text: {shown}")
    if blind := notes.get("text_only"):
        shown = ", ".join(f"{name} {100 * v['value']:.1f}" for name, v in blind.items())
        lines.append(f"a model that sees no picture: {shown}")
    if ties := {name: n for name, n in notes.get("ties", {}).items() if n}:
        lines.append("ties: " + ", ".join(f"{name} {n}" for name, n in ties.items()))
    if confused := notes.get("confusions"):
        shown = (f"{c['true']} as {c['predicted']} {100 * c['share']:.0f} %" for c in confused[:5])
        lines.append("confused most: " + ", ".join(shown))
    for key, said in (
        ("empty_classes", "classes without a picture, left out"),
        ("same_name", "names of several classes, which tie"),
        ("no_verdict", "classes that can't be judged, left out"),
        ("C_at_edge", "the best C may lie beyond those tried"),
    ):
        if notes.get(key):
            lines.append(f"{said}: {', '.join(notes[key])}")
    if chosen := notes.get("C"):
        lines.append("C: " + ", ".join(f"{kind} {value:g}" for kind, value in chosen.items()))
    return lines


def difference_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The comparison as a table."""
    effect = rows[0]["effect"] * (100 if rows[0]["percent"] else 1)
    power = f"power({effect:g})"
    lines = [
        f"{'task':<15}{'measure':<34}{'first':>7}{'second':>8}{'diff':>7}  {'95 % interval':<17}"
        f"{'p':>7}{'Holm':>7}{'80 % at':>9}{power:>10}  verdict"
    ]
    for row in rows:
        s = 100 if row["percent"] else 1
        interval = f"[{row['low'] * s:+.1f}, {row['high'] * s:+.1f}]"
        lines.append(
            f"{row['task']:<15}{row['name']:<34}{row['first'] * s:>7.1f}{row['second'] * s:>8.1f}"
            f"{row['value'] * s:>+7.1f}  {interval:<17}{_p(row['p']):>7}{_p(row['p_holm']):>7}"
            f"{row['detectable'] * s:>9.1f}{row['power']:>10.2f}  {row['verdict']}"
        )
    return lines


def _p(value: float) -> str:
    return "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0")
