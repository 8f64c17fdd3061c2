"""`python -m interp.compare`: what one checkpoint looks at and depends on, and another does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from interp.config import CompareConfig
from superclip.errors import UserError, run_command
from superclip.evaluation.tables import shown

SHOWN = 15
MEASURES = {
    "excess": "excess over the head's own prior",
    "mass": "in-box mass",
    "direct": "change of margin under direct mean ablation",
    "removal": "change of margin under mean ablation",
}
SEEDS = "heads of different seeds do not match: no table head by head"
FEW = """descriptive: too few seeds for any seed-level test to reach p = .05 (6 pairs, or 4 a
side of unlike seeds); relabelling seeds allows less than t, which takes them for normal"""
Rows = Sequence[dict[str, Any]]

DESCRIPTION = """Two swept checkpoints on the same validation pictures: python -m interp.compare
A.pt B.pt [--also C.pt]. Heads are matched by index where the initial weights are the same and most
heads still are most alike so, else by optimal assignment on discovery pictures. Differences of
grounding, direct effect and (where interp.ablate was run on both) mean ablation, with max-T over
heads; how far maps lie apart (Jensen-Shannon) and streams agree (CKA); retrieval (McNemar). With
several seeds a side (A1 A2 ... --against B1 B2 ...) seeds are the outer level and heads are not
matched. Writes compare-HASH.json into the folder of the first sweep."""


def main(argv: list[str]) -> None:
    """Parse, compare, write, print."""
    from superclip.flags import parse

    hidden = ("Hidden", "Positional")
    known = [f.name for f in fields(CompareConfig) if not str(f.type).startswith(hidden)]
    config = parse(CompareConfig, argv, "python -m interp.compare", DESCRIPTION, known=known)
    report, path = compare_one(config)
    print(render(report))
    print(f"\nreport: {path}")


def compare_one(config: CompareConfig) -> tuple[dict[str, Any], Path]:
    """The report and its file: one that stands, or a new one.

    A file's name is a hash of all that decides its content, so what stands is what is asked for.

    Raises:
        UserError: see `open_sides` and `claim`; or if the file can't be read.
    """
    from interp.comparison import SCHEMA, compare, open_sides
    from interp.swept import claim, write_report

    sides = open_sides(config)
    towers = [[tower.identity for tower in side] for side in sides]
    asked = json.dumps([SCHEMA, towers, config.kind, config.seed, config.draws])
    tag = hashlib.sha256(asked.encode()).hexdigest()[:8]
    path = sides[0][0].folder / f"compare-{tag}.json"
    if path.exists() and not config.overwrite:
        try:
            return json.loads(path.read_text()), path
        except ValueError:
            raise UserError(f"{path} can't be read; --overwrite writes it again") from None
    claim(replace(config, results=path.parent), path.name)
    report = compare(*sides, config)
    write_report(path, report)
    return report, path


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    from interp.comparison import EFFECT
    from superclip.evaluation.tables import difference_lines

    lines = [
        f"{name}: {facts['loss']} lr {facts['lr']:g}, {facts['model']}, seed {facts['seed']}, "
        f"epoch {facts['epoch']}, sha256 {facts['sha256'][:12]}"
        for name in ("first", "second")
        for facts in report[name]
    ]
    query = "class token" if report["kind"] == "class" else "patches"
    lines += [
        f"{report['data']}, n = {report['n']} validation pictures; {report['discovery']} of "
        f"discovery choose; attention of the {query}; first minus second, in points:",
        "",
        *difference_lines(report["differences"]),
        "80 % at: the true difference that the test finds in 8 of 10 samples like this; "
        f"power({EFFECT:g}): how often it finds one of {EFFECT:g} points",
        "chance: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in report["chance"].items()),
        "",
        *_towers(report["towers"]),
        "",
    ]
    if "heads" not in report:
        few = any(row["verdict"] == "descriptive" for row in report["differences"])
        return "\n".join([*lines, SEEDS, *([FEW] if few else [])])
    lines += [matching_said(report), "", *_heads(report["heads"]), "", *said(report["heads"])]
    if side := report["no_removal"]:
        lines.append(
            f"python -m interp.ablate beside the {side}'s sweep adds ablation of every head"
        )
    return "\n".join([*lines, "", *_cka(report)])


def _towers(rows: Rows) -> list[str]:
    depth = max(len(row["layers"]) for row in rows)
    table = [["tower", "best", "above", "its excess", *(f"L{k} mean" for k in range(depth))]]
    for row in rows:
        above = f"{row['above']} of {row['of']}" if "above" in row else "-"
        cells = [_show(cell) for cell in (row["best"], *row["layers"])]
        table.append([row["tower"], row["head"], above, *cells])
        table[-1] += ["-"] * (depth - len(row["layers"]))
    told = "excess over the own prior, one 95 % band over the table; above: heads with a band above"
    return [*_aligned(table), f"{told} 0; best: chosen on discovery"]


def matching_said(report: dict[str, Any]) -> str:
    """How heads were matched, why so, and how well."""
    found, heads = report["matching"], len(report["heads"])
    layers = len({row["first"].partition("H")[0] for row in report["heads"]})
    return (
        f"heads matched by {'index' if found['by_index'] else 'optimal assignment'}: "
        f"{'the same' if found['shared_start'] else 'other'} initial weights, and the most similar "
        f"maps are of the same index for {found['same_index']} of {heads} (by chance {layers}; "
        f"discovery, n = {report['discovery']}); on validation {found['alike']} of {heads} pairs "
        "correlate above the maps of other pictures"
    )


def _heads(rows: Rows) -> list[str]:
    """Two tables of the same pairs, largest difference of excess first: how far maps lie apart,
    with the excess; and the effects on the margin."""
    order = sorted(rows, key=lambda row: -abs(row["excess"]["estimate"]))[:SHOWN]
    left = [f"and {len(rows) - SHOWN} more in the file"] if len(rows) > SHOWN else []
    maps = [["first", "second", "r", "JSD", "JSD other", "moved", *_tested_heads("excess")]]
    for row in order:
        moved = [f"{row[k]['estimate']:.2f}" for k in ("moved_first", "moved_second") if k in row]
        cells = [row["first"], row["second"], _show(row["r"], 2), _show(row["jsd"], 2)]
        cells += [f"{row['jsd_other']['estimate']:.2f}", " ".join(moved) or "-"]
        maps.append([*cells, *_tested(row["excess"], 3)])
    lines = [
        "maps and excess over the own prior, head by head:",
        *_aligned(maps),
        *left,
        "r: correlation of the maps; JSD: divergence in bits, 0 equal, 1 apart; JSD other: of a "
        "head's own maps of two pictures",
        "of a stratum; moved: JSD from the maps at the run's own start, first and second; "
        "brackets: 95 % bands",
        "over the heads; p: sign flips over pictures, max-T over the heads",
        "",
        "change of margin without the head, ablated minus intact:",
    ]
    names = [name for name in ("direct", "removal") if name in rows[0]]
    effects = [["first", "second", *(head for name in names for head in _tested_heads(name))]]
    for row in order:
        cells = [cell for name in names for cell in _tested(row[name], 4)]
        effects.append([row["first"], row["second"], *cells])
    return [
        *lines,
        *_aligned(effects),
        *left,
        "direct: mean ablation that nothing later sees; removal: mean ablation; brackets and p as "
        "above",
    ]


def _tested_heads(name: str) -> list[str]:
    return [f"{name} 1st", "2nd", "difference", "p adj."]


def _tested(cell: dict[str, Any], digits: int) -> list[str]:
    sides = [f"{cell[side]:.{digits}f}" for side in ("first", "second")]
    return [*sides, _show(cell, digits), shown(cell["p_adjusted"])]


def said(rows: Rows) -> list[str]:
    """Of each measure, the differences that band and p both show."""
    lines = []
    for name in (name for name in MEASURES if name in rows[0]):
        told = []
        for way in ("higher", "lower"):
            of = [f"{r['first']} ({r['second']})" for r in rows if r[name]["verdict"] == way]
            told += [f"{way} in {', '.join(of)}"] if of else []
        heads, n = "; ".join(told) or "no difference is shown in any head", rows[0][name]["n"]
        lines.append(f"{MEASURES[name]}, first against second (n = {n}): {heads}")
    return lines


def _cka(report: dict[str, Any]) -> list[str]:
    cells: dict[tuple[str, str], list[str]] = {}
    for row in report["cka"]["rows"]:
        cells.setdefault((row["pair"], row["stream"]), []).append(_show(row, 2))
    layers = [f"L{k}" for k in range(len(next(iter(cells.values()))))]
    return [
        *_aligned([["CKA", "stream", *layers], *([*key, *own] for key, own in cells.items())]),
        f"debiased linear CKA (n = {report['n']}), 1 if equal up to rotation and scale; pictures "
        f"paired at random stay below {report['cka']['shuffled_95']:.2f} in 95 % of draws",
    ]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    from superclip.evaluation.tables import aligned

    return aligned(table, "<<" + ">" * (len(table[0]) - 2))


def _show(cell: dict[str, float], digits: int = 3) -> str:
    values = (cell[k] for k in ("estimate", "low", "high"))
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


if __name__ == "__main__":
    run_command(main)
