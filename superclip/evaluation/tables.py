"""Results and differences as plain values for a file, and as lines for a screen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from superclip.errors import UserError
from superclip.evaluation.measures import Measure, Result
from superclip.evaluation.statistics import BOOTSTRAP, LEVEL, Interval, comparisons, intervals

SCHEMA = 2
DIFFERENT = re.compile("(this checkpoint is )?(better|worse)")


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
    """`unadjusted_differences` with p adjusted by Holm over all rows."""
    rows = unadjusted_differences(first, second, paired, effect, draws)
    adjust(rows)
    return rows


def unadjusted_differences(
    first: Sequence[list[Result]],
    second: Sequence[list[Result]],
    paired: bool,
    effect: float,
    draws: int,
) -> list[dict[str, Any]]:
    """One row a measure of every task.

    Args:
        first, second: for each model of an arm its results.
        effect: in points for shares, in ranks for ranks.

    Raises:
        UserError: if a task's data are not the same for all models.
    """
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
        measures = [r.measures for r in results]
        effects = [effect / (100 if m.percent else 1) for m in measures[0]]
        arms = measures[: len(first)], measures[len(first) :]
        for measure, found in zip(measures[0], comparisons(*arms, paired, effects, draws)):
            rows.append({"task": results[0].task, "percent": measure.percent, **asdict(found)})
    return rows


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p over all rows; take back what it does not leave."""
    from statsmodels.stats.multitest import multipletests

    adjusted: Any = multipletests([row["p"] for row in rows], method="holm")[1]
    for row, p in zip(rows, adjusted):
        row["p_holm"] = float(p)
        if p > 1 - LEVEL and DIFFERENT.search(row["verdict"]):
            few = row["test"] == BOOTSTRAP and row["p"] <= row["least_p"]
            said = "not told by so few --bootstrap draws" if few else "not after Holm"
            row["verdict"] = DIFFERENT.sub(said, row["verdict"])


def _kept(value: Any) -> Any:
    """Of what is missing the keys alone: causes are words, which may name an address."""
    return sorted(value) if isinstance(value, dict) else value


def result_lines(result: dict[str, Any]) -> list[str]:
    """One task of a report."""
    data = result["data"]
    told = [f"{data['name']}"] + [str(data[k]) for k in ("split", "protocol") if k in data]
    lines = [f"{result['task']}: {', '.join(told)}"]
    heads = ["measure", "value", "95 % interval", "chance", "queries", "pictures", "pool"]
    cells = []
    for row in result["rows"]:
        value, low, high, chance = (
            f"{row[k] * (100 if row['percent'] else 1):.1f}"
            for k in ("value", "low", "high", "chance")
        )
        sizes = row["queries"], row["pictures"], row["candidates"] or ""
        cells.append([row["measure"], value, f"[{low}, {high}]", chance, *map(str, sizes)])
    lines += [f"  {line}" for line in aligned([heads, *cells], "<><>>>>")]
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
    """The comparison as a table, and which test stands behind which p."""
    effect = rows[0]["effect"] * (100 if rows[0]["percent"] else 1)
    tests = list(dict.fromkeys(row["test"] for row in rows))
    heads = ["task", "measure", "first", "second", "diff", "95 % interval", "p", "Holm"]
    exact = any(row["exact"] is not None for row in rows)
    table = [[*heads, *["exact"] * exact, "80 % at", f"power({effect:g})", "verdict"]]
    for row in rows:
        s = 100 if row["percent"] else 1
        at, sure = row["detectable"], row["power"]
        mark = chr(ord("a") + tests.index(row["test"])) if len(tests) > 1 else ""
        table.append(
            [
                row["task"],
                row["name"],
                *(f"{row[k] * s:.1f}" for k in ("first", "second")),
                f"{row['value'] * s:+.1f}",
                f"[{row['low'] * s:+.1f}, {row['high'] * s:+.1f}]",
                shown(row["p"]) + mark,
                shown(row["p_holm"]),
                *["-" if row["exact"] is None else shown(row["exact"])] * exact,
                "-" if at is None else f"{at * s:.1f}",
                "-" if sure is None else f"{sure:.2f}",
                row["verdict"],
            ]
        )
    marks = [f"{chr(ord('a') + k)}: {test}" for k, test in enumerate(tests)]
    said = f"p: {tests[0]}" if len(tests) == 1 else f"p: {', '.join(marks)}"
    if exact:
        said += f"; exact: of relabelled seeds alone, {rows[0]['least_p']:.3g} at least"
    return [*aligned(table, "<<>>><" + ">" * (len(table[0]) - 7) + "<"), said]


def aligned(table: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns as wide as their widest cell, two blanks apart; `sides` has < or > for each."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    spec = list(zip(sides, widths, strict=True))
    return ["  ".join(f"{c:{s}{w}}" for c, (s, w) in zip(row, spec)).rstrip() for row in table]


def shown(value: float) -> str:
    """A p-value as the table has it."""
    return "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0")
