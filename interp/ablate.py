"""`python -m interp.ablate`: what the model loses when heads, MLPs or layers are removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp.config import AblateConfig, is_pattern
from interp.heads import Head
from superclip.errors import UserError, run_command

SHOWN = 15

DESCRIPTION = """Remove every attention head in turn, exactly, and measure the loss on the sweep's
validation pictures, paired by picture: contrastive margin, retrieval both ways, zero-shot mAP of
the annotated categories, and the token head's precision. Attention in a box is no evidence of use;
this is. A quoted pattern, --ckpt 'logs/step_*.pt', asks when the model begins to depend on the
champion. Ablated embeddings are kept beside the sweep (bank-KIND-HASH/), so that an interrupted run
goes on; ablation.json holds every number, with direct effects and attribution beside the exact
ones."""


def main(argv: list[str]) -> None:
    """Parse, ablate, print, write."""
    from superclip.flags import parse

    config = parse(AblateConfig, argv, "python -m interp.ablate", DESCRIPTION)
    if is_pattern(config.ckpt):
        ablate_course(config)
        return
    report, path = ablate_one(config)
    print(render(report))
    print(f"\nwritten: {path}, ablation.npz")


def ablate_one(config: AblateConfig) -> tuple[dict[str, Any], Path]:
    """Ablate and write one checkpoint's report."""
    from interp.removal import ablate_units
    from interp.swept import claim, open_swept, write_arrays, write_report

    path = claim(config, "ablation.json")
    arrays = claim(config, "ablation.npz")
    report, changes = ablate_units(open_swept(config), config)
    write_arrays(arrays, changes)
    report["arrays_sha256"] = hashlib.sha256(arrays.read_bytes()).hexdigest()
    write_report(path, report)
    return report, path


def ablate_course(config: AblateConfig) -> None:
    """Ablate a run's checkpoints, swept before; the last one's champion in all of them."""
    from interp import timeline
    from interp.subject import default_folder
    from superclip.errors import replace_text

    if config.results is not None or config.model is not None:
        raise UserError("--results and --model go with one checkpoint; a pattern finds its sweeps")
    if config.sets is not None:
        raise UserError("--sets goes with one checkpoint; leave it out of a course")
    assert config.ckpt is not None
    checkpoints = timeline.numbered(config.ckpt)
    steps, folder = [step for step, _ in checkpoints], config.ckpt.parent
    courses = {kind: folder / f"course-{kind}-ablation.json" for kind in config.kinds}
    for path in courses.values():
        timeline.refuse_other_course(path, steps, config.overwrite)
    champion = None
    for step, path in reversed(checkpoints):
        also = "champion" if champion is None else champion
        every = "heads" in config.units.split(",")
        units = config.units if every else f"{config.units},{also}"
        given = replace(config, ckpt=path, units=units, sets=0)
        report = None if config.overwrite else standing(replace(given, units=config.units), also)
        if report is None:
            print(f"step {step}: {path}", flush=True)
            report, _ = ablate_one(given)
        champion = champion or report["champion"]
    assert champion is not None
    folders = [default_folder(path) for _, path in checkpoints]
    for kind, path in courses.items():
        told = Head.parse(champion), kind, config.draws, config.seed
        course = timeline.dependence(steps, folders, *told)
        replace_text(path, json.dumps(course, indent=1, sort_keys=True) + "\n")
        print("", timeline.render(course), f"written: {path}", sep="\n")


def standing(config: AblateConfig, head: str) -> dict[str, Any] | None:
    """A report of a course that stands beside a sweep and is what is asked for now; None if there
    is none. Whether the arrays beside it are its own, `load_effects` asks.

    Args:
        head: that it must hold, beside what `--units` asks for; "champion" for its own.

    Raises:
        UserError: if it is one of another sweep or of other options.
    """
    from interp.removal import SCHEMA, asked
    from interp.results import SweepResults
    from interp.subject import default_folder
    from interp.swept import tie

    path = default_folder(config.ckpt) / "ablation.json"
    if not path.exists():
        return None
    wanted = {"schema": SCHEMA} | tie(SweepResults.load(path.parent)) | asked(config)
    wanted.pop("units")
    try:
        report = json.loads(path.read_text())
        held = report | report["asked"]
        unlike = [name for name in wanted if held.get(name) != wanted[name]]
        named = {row["unit"] for row in report["units"]} | {"champion"}
        lacking = set(config.units.split(",")) - set(report["asked"]["units"].split(","))
        if lacking or head not in named:
            unlike.append("units")
        if report["champion"] not in named:
            unlike.append("champion")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        unlike, report = ["content"], {}
    if unlike:
        raise UserError(f"{path} is another report ({unlike[0]} differs); --overwrite replaces it")
    return report


def render(report: dict[str, Any]) -> str:
    """The report as text: the largest losses of each kind, and what they say of the champion."""
    from interp.causal.said import agreement_said, champion_said, sets_said
    from interp.stats.multiplicity import ALPHA
    from superclip.evaluation.tables import shown

    intact = _intact(report["intact"], report["chance"])
    lines = [f"intact, n = {report['n']} validation pictures: {intact}"]
    for kind, family in dict.fromkeys((r["kind"], r["family"]) for r in report["units"]):
        rows = [r for r in report["units"] if (r["kind"], r["family"]) == (kind, family)]
        rows.sort(key=lambda row: row["rank"])
        kept = [r for k, r in enumerate(rows) if k < SHOWN or r["role"] == "champion"]
        estimates = report["estimates"].get(kind, {}).get("heads", {}) if family == "head" else {}
        lines += ["", f"{kind} ablation, {family} by {family}, {report['tokens']} token(s):"]
        lines += _table(kept, estimates)
        if len(kept) < len(rows):
            lines.append(f"  and {len(rows) - len(kept)} more in ablation.json")
    lines += ["", *champion_said(report["units"], report["champion"])]
    if (agreed := agreement_said(report["units"], report["champion"])) is not None:
        lines.append(agreed)
    if report["sets"] is not None:
        lines.append(sets_said(report["sets"]))
    lines += _attribution_said(report["estimates"])
    for row in report.get("downstream", [])[:5]:
        sure = row["p_adjusted"] <= ALPHA
        lines.append(
            f"without {row['removed']} ({row['kind']} ablation), the in-box mass of {row['head']} "
            f"{'changes' if sure else 'is not shown to change'}: {_show(row['in_box_mass'])} "
            f"(interval of this pair alone, one of the surest of {row['pairs']}), "
            f"n = {row['in_box_mass']['n']}, p adjusted for all {shown(row['p_adjusted'])}"
        )
    lines += [
        "",
        "margin: cosine with own captions less that with the hardest wrong one, ablated minus "
        "intact, simultaneous 95 % band;",
        "other brackets: of one row alone; p: sign flips over pictures, max-T within the table. "
        "Any disturbance",
        "costs some margin: see the rank of a loss, and the loss per norm.",
        "frozen: margin against the caption that was hardest intact; direct: its change if nothing "
        "later saw the removal;",
        "repaired: share of the direct change that later layers make good (below 0: amplify).",
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], estimates: dict[str, Any]) -> list[str]:
    from superclip.evaluation.tables import aligned, shown

    extra = [name for name in ("token AP", "mAP") if name in rows[0]["measures"]]
    heads = ["unit", "role", "margin", "p adj.", "i2t R@1", "t2i R@1", *extra]
    heads += ["norm", "per norm"] + (["frozen", "direct", "repaired"] if estimates else [])
    table = [heads]
    for row in rows:
        measures = row["measures"]
        cells = [row["unit"], row["role"], _show(row["margin"]), shown(row["p_adjusted"])]
        cells += [f"{100 * measures[name]['estimate']:+.1f}" for name in ("i2t@1", "t2i@1", *extra)]
        cells.append(f"{row['removed_norm']:.2f}")
        cells.append("-" if row["per_norm"] is None else f"{row['per_norm']:+.4f}")
        if estimates:
            own = estimates[row["unit"]]
            cells.append(f"{measures['frozen']['estimate']:+.4f}")
            cells.append(f"{own['direct']['estimate']:+.4f}")
            cells.append("-" if own["repaired"] is None else f"{own['repaired']['estimate']:+.2f}")
        table.append(cells)
    return [f"  {line}" for line in aligned(table, "<<>>" + ">" * (len(heads) - 4))]


def _show(interval: dict[str, float], scale: float = 1, digits: int = 4) -> str:
    values = (interval[k] * scale for k in ("estimate", "low", "high"))
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*values, d=digits)


def _intact(base: dict[str, Any], chance: dict[str, float]) -> str:
    told = [f"margin {_show(base['margin'])}"]
    for name in ("i2t", "t2i"):
        of_chance = f"(chance {100 * chance[f'{name}@1']:.1f})"
        told.append(f"{name} R@1 {_show(base[f'{name}@1'], 100, 1)} {of_chance}")
    told += [f"{n} {100 * base[n]['estimate']:.1f}" for n in ("mAP", "token AP") if n in base]
    return ", ".join(told)


def _attribution_said(estimates: dict[str, Any]) -> list[str]:
    lines = []
    for kind, found in estimates.items():
        for name, fit in found.get("attribution", {}).items():
            several = len(fit["layers"]) > 1
            told = [fit["overall"], *(fit["layers"] if several else ())]
            whose = "all heads then layer by layer" if several else f"{told[0]['heads']} head(s)"
            pearson, spearman = (
                " ".join("-" if f[of] is None else f"{f[of]:.2f}" for f in told)
                for of in ("pearson", "spearman")
            )
            lines.append(
                f"{name} attribution against exact {kind} ablation, {fit['images']} pictures, "
                f"{whose}: Pearson {pearson}; Spearman {spearman}"
            )
    return lines


if __name__ == "__main__":
    run_command(main)
