"""`python -m interp.compare`: what one checkpoint looks at and depends on that another does not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from interp.config import CompareConfig, OfSweep
from superclip.errors import run_command

SHOWN = 15
MEASURES = {
    "excess": "excess over the head's own prior",
    "mass": "in-box mass",
    "direct": "margin under direct mean ablation",
    "removal": "margin under mean ablation",
}

DESCRIPTION = """Two swept checkpoints side by side, on the same validation pictures: python -m
interp.compare A.pt B.pt [--also C.pt]. Heads are matched by index where they started from the same
weights and still are most alike so, else by optimal assignment on discovery pictures. Differences
of grounding, in-box mass, direct effect and (where interp.ablate was run) mean ablation, with max-T
over heads; how far maps lie apart (Jensen-Shannon) and streams agree (CKA); retrieval (McNemar).
With several seeds a side, --against, differences are tested over seeds and pictures, and heads are
not matched. Writes compare-HASH.json into the first sweep's folder."""


def main(argv: list[str]) -> None:
    """Parse, compare, write, print."""
    from superclip.flags import parse

    config = parse(CompareConfig, argv, "python -m interp.compare", DESCRIPTION)
    logging.getLogger().setLevel(logging.ERROR)
    from interp.comparison import compare, open_sides, open_sweep, refuse_unlike
    from interp.swept import claim, write_report

    sides = open_sides(config)
    also = [(path.name, open_sweep(path, config)[1]) for path in config.also]
    for name, results in also:
        refuse_unlike(sides[0][0].results, results, f"--also {name}", towers=False)
    shas = [[s.header.sha256 for s in side] for side in sides]
    shas.append([results.manifest["checkpoint"]["sha256"] for _, results in also])
    asked = [shas, config.seed, config.draws]
    tag = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    place = OfSweep(results=sides[0][0].folder, overwrite=config.overwrite)
    path = claim(place, f"compare-{tag}.json")
    report = compare(sides, also, config)
    write_report(path, report)
    print(render(report))
    print(f"\nwritten: {path}")


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    from superclip.evaluation.tables import aligned, difference_lines

    lines = []
    for name in ("first", "second"):
        for facts in report[name]:
            lines.append(
                f"{name}: {facts['loss']} lr {facts['lr']:g}, {facts['model']}, seed "
                f"{facts['seed']}, {facts['file']}, sha256 {facts['sha256'][:12]}"
            )
    lines += [
        f"{report['data']}, n = {report['n']} validation pictures ({report['discovery']} of "
        f"discovery choose), attention of the {_query(report['kind'])}; first minus second, in "
        "points",
        "",
        *difference_lines(report["differences"]),
        "",
        *aligned(_towers(report["towers"]), "<<>" + ">" * (len(_towers(report["towers"])[0]) - 3)),
        "excess over the own prior, one 95 % band over the whole table; above: heads whose own band "
        "lies above 0",
    ]
    if "heads" in report:
        lines += ["", matching_said(report["matching"]), *_heads(report["heads"])]
        lines += ["", *said(report["heads"], report["n"])]
        if report["removal_missing"]:
            lines.append(f"effects of removal are not compared; run {report['removal_missing']}")
        lines += ["", *_cka(report["cka"], report["n"])]
    else:
        lines += ["", "heads of different seeds do not match: no table head by head"]
    return "\n".join(lines)


def _query(kind: str) -> str:
    return "class token" if kind == "class" else "patches (mean over patch queries)"


def _towers(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    depth = max(len(row["layers"]) for row in rows)
    table = [["tower", "best head", "above", "its excess", *(f"L{k} mean" for k in range(depth))]]
    for row in rows:
        above = f"{row['above']}/{row['of']}" if "above" in row else ""
        cells = [_show(cell, 3) for cell in row["layers"]]
        cells += [""] * (depth - len(cells))
        table.append([row["tower"], row["head"], above, _show(row["best"], 3), *cells])
    return table


def matching_said(found: dict[str, Any]) -> str:
    """How heads were matched, and why so."""
    start = "the same" if found["shared_initial_weights"] else "other"
    way = "index" if found["by_index"] else "optimal assignment within layers"
    return (
        f"heads matched by {way}: {start} initial weights, and the head of the same index has the "
        f"most similar maps for {found['same_index_best']} of {found['of']} heads (by chance "
        f"{found['by_chance']}; {found['on']} discovery pictures)"
    )


def _heads(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Two tables: what heads look at, and what the models depend on."""
    from superclip.evaluation.tables import aligned

    order = sorted(rows, key=lambda row: -abs(row["excess"]["estimate"]))[:SHOWN]
    table = [["first", "second", "r", "r other", "JSD", "JSD other", "moved"]]
    names = [name for name in MEASURES if name in rows[0]]
    for name in names[:2]:
        table[0] += [f"{name} 1st", "2nd", "difference", "p adj."]
    causal = [["first", "second"]]
    for name in names[2:]:
        causal[0] += [f"{name} 1st", "2nd", "difference", "p adj."]
    for row in order:
        other, moved = row["divergence_less_other_picture"], row.get("moved", {})
        cells = [row["first"], row["second"], f"{row['correlation']:.2f}"]
        cells += [f"{row['correlation_other_picture']:.2f}", _show(row["divergence"], 3)]
        cells += [f"{other['second']:.3f}", " ".join(f"{v:.2f}" for v in moved.values()) or "-"]
        uses = cells[:2]
        for name in names:
            own = row[name]
            digits = 3 if name in names[:2] else 4
            into = cells if name in names[:2] else uses
            into += [f"{own['first']:.{digits}f}", f"{own['second']:.{digits}f}"]
            into += [_show(own, digits), f"{own['p_adjusted']:.4f}"]
        table.append(cells)
        causal.append(uses)
    shown = [*aligned(table, "<<" + ">" * (len(table[0]) - 2)), ""]
    shown += aligned(causal, "<<" + ">" * (len(causal[0]) - 2))
    if len(rows) > len(order):
        shown.append(f"and {len(rows) - len(order)} more in the file")
    return [
        *shown,
        "r: correlation of the two heads' maps on validation; JSD: their divergence in bits (0 "
        "equal, 1 apart); other: the same with the",
        "map of another picture of the stratum; moved: JSD of each to its own start. Brackets: 95 % "
        "band over heads; p: sign flips, max-T over heads",
    ]


def said(rows: Sequence[dict[str, Any]], n: int) -> list[str]:
    """Of each measure, which differences band and p both show."""
    lines = []
    for name, what in MEASURES.items():
        if name not in rows[0]:
            continue
        found = {
            way: [f"{r['first']}/{r['second']}" for r in rows if r[name]["verdict"] == way]
            for way in ("higher", "lower")
        }
        told = [f"{way} in {', '.join(of)}" for way, of in found.items() if of]
        lines.append(
            f"{what} (n = {n}): first "
            + (" and ".join(told) or "neither higher nor lower in any head")
            + f"; of {len(rows) - sum(map(len, found.values()))} heads no difference is shown"
        )
    return lines


def _cka(found: dict[str, Any], n: int) -> list[str]:
    from superclip.evaluation.tables import aligned

    pairs = list(dict.fromkeys((r["pair"], r["stream"]) for r in found["rows"]))
    layers = list(dict.fromkeys(r["layer"] for r in found["rows"]))
    cell = {(r["pair"], r["stream"], r["layer"]): _show(r, 2) for r in found["rows"]}
    table = [[f"CKA (n = {n})", "stream", *layers]]
    table += [[pair, stream, *(cell[pair, stream, k] for k in layers)] for pair, stream in pairs]
    return [
        *aligned(table, "<<" + ">" * len(layers)),
        f"debiased linear CKA, 1 if equal up to rotation and scale; pictures paired at random reach "
        f"{found['shuffled_95']:.2f} in 5 % of {found['shuffles']} draws",
    ]


def _show(cell: dict[str, float], digits: int) -> str:
    values = (cell[k] for k in ("estimate", "low", "high"))
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


if __name__ == "__main__":
    run_command(main)
