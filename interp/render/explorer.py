"""What the page's explorer draws from: every head's values, words and maps, as JSON values."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from PIL import Image

from interp.analysis import Baseline, Findings
from interp.heads import Head
from interp.render import figures, gallery
from interp.render.words import count, number, p_value, percent, span, subject
from interp.results import SweepResults
from interp.stats.intervals import Band, simultaneous_band

QUALITY = 90
"""Of the JPEG of a picture too large for a PNG."""

LARGEST_PNG = 100  # pixels a side
PLACES = 9  # of a value in the page, far behind the four that are shown

Rows = list[list[float | None]]


def explorer(
    results: SweepResults,
    findings: Findings,
    ablation: dict[str, Any] | None,
    largest_bytes: int = 3_000_000,
) -> dict[str, Any]:
    """One sweep as the explorer shows it.

    Args:
        largest_bytes: that pictures and maps together may take; pictures beyond are left out.

    Returns:
        `name`, `layers`, `heads`, `grid`, `champion`, `significant` (heads by name); `metrics`,
        each with values by split, the `chance` that its colours turn around and `levels` of
        baselines (kind, name, value on validation); `facts`, lines of words by head; `baselines`,
        lines of words; `kept`, how many pictures the sweep kept, and of them `pictures`, those that
        fit, with boxes as shares of the side; `maps`, the attention of every head on them in 255ths
        of the head's `tops`, the last colour of its scale in the gallery too.
    """
    layers, heads = results.shape
    every = [Head(layer, index) for layer in range(layers) for index in range(heads)]
    metrics = [*_scored(results, findings), *_causal(results, ablation)]
    marked = figures.significant(findings)
    pictures, room = [], largest_bytes
    for i in range(gallery.shown(results)):
        picture = _picture(results, i)
        room -= len(json.dumps(picture)) + layers * heads * results.maps.shape[-1] * 4 // 3
        if room < 0:
            break
        pictures.append(picture)
    maps = results.maps[results.gallery_rows[: len(pictures)]].astype(np.float64)
    tops = np.array([gallery.scale(results, [h]).vmax if pictures else 1.0 for h in every])
    tops = tops.reshape(results.shape)
    scaled = np.minimum(maps / np.where(tops > 0, tops, 1)[None, ..., None], 1)
    return {
        "name": subject(results),
        "layers": layers,
        "heads": heads,
        "grid": list(results.grid),
        "champion": str(findings.champion),
        "significant": [str(h) for h in every if marked[h.layer, h.index]],
        "metrics": metrics,
        "facts": {str(h): _facts(h, results, findings, ablation) for h in every},
        "baselines": _baselines(findings),
        "kept": len(results.gallery_rows),
        "pictures": pictures,
        "tops": tops.round(PLACES).tolist(),
        "maps": base64.b64encode(np.rint(255 * scaled).astype(np.uint8).tobytes()).decode(),
    }


def colours() -> dict[str, str]:
    """256 colours of each map, as base64 of RGB bytes: around chance, from 0, and of attention."""
    maps = {"signed": figures.MAP, "share": "cividis", "attention": gallery.MAP}
    shades = {name: matplotlib.colormaps[of](np.arange(256))[:, :3] for name, of in maps.items()}
    return {
        name: base64.b64encode(np.rint(255 * rgb).astype(np.uint8).tobytes()).decode()
        for name, rgb in shades.items()
    }


def _shown(findings: Findings) -> list[tuple[str, Baseline]]:
    """Names and rows of the fixed maps and the own prior, and of the strongest map made from pixels
    and the strongest untrained tower."""
    rows, strongest = findings.baselines, []
    for kind in ("pixels", "untrained"):
        own = [row for row in rows if row.kind == kind and row.excess]
        strongest += sorted(own, key=lambda row: -row.excess.estimate if row.excess else 0)[:1]
    kept = [row for row in rows if row.kind == "fixed" or row.name.startswith("own prior")]
    return [
        (row.name.partition(" (")[0] if row.kind != "pixels" else f"strongest: {row.name}", row)
        for row in [*kept, *strongest]
    ]


def _baselines(findings: Findings) -> list[list[str]]:
    """Name, in-box mass and excess of each baseline shown."""
    return [
        [name, span(row.mass), span(row.excess, 4) if row.excess else "0 by definition"]
        for name, row in _shown(findings)
    ]


def _scored(results: SweepResults, findings: Findings) -> list[dict[str, Any]]:
    """Means over pictures of each split; on validation with a band over all heads."""
    verdict, judged = findings.verdict, results.rows("validation")
    chosen, rows = results.rows("discovery"), _shown(findings)
    excess = [[row.kind, name, row.excess.estimate] for name, row in rows if row.excess]
    mass = [[row.kind, name, row.mass.estimate] for name, row in rows if name != "uniform"]
    found = [
        _metric("excess over own prior", 0.0, 4, verdict.discovery.mean, verdict.discovery.n)
        | _judged(verdict.band)
    ]
    found[0]["levels"] += excess
    scores = {
        "in-box mass": (results.metrics["in_box_mass"], findings.area.estimate),
        "patch AUROC": (results.metrics["patch_auroc"], 0.5),
        "pointing game": (results.metrics["pointing"], findings.pointing_chance),
        "class-token mass": (results.class_mass, None),
        "sink share": (results.sink_mass, None),
    }
    draws, seed = results.manifest["draws"], results.manifest["seed"]
    stratum = results.stratum[judged].astype(np.int64)
    for name, (values, chance) in scores.items():
        own = values[judged].astype(np.float64)
        whole = np.isfinite(values).all(axis=(1, 2))  # not a picture without a defined AUROC
        band = simultaneous_band(own, np.where(whole[judged], stratum, -1), 1, draws, seed)
        mean = np.nanmean(values[chosen].astype(np.float64), axis=0)
        found.append(_metric(name, chance, 3, mean, int(whole[chosen].sum())) | _judged(band))
    found[1]["levels"] += mass
    return found


def _metric(
    name: str, chance: float | None, digits: int, discovery: np.ndarray | None, n: int = 0
) -> dict[str, Any]:
    own = None if discovery is None else {"estimate": discovery.round(PLACES).tolist(), "n": n}
    levels = [] if chance is None else [["chance", "chance", chance]]
    facts = {"name": name, "chance": chance, "digits": digits, "levels": levels}
    return facts | {"discovery": own}


def _judged(band: Band) -> dict[str, Any]:
    values = {name: getattr(band, name).round(PLACES) for name in ("estimate", "low", "high")}
    return {
        "validation": {k: v.tolist() for k, v in values.items()}
        | {"n": band.n, "brackets": "band over all heads"}
    }


def _causal(results: SweepResults, ablation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What removal changed, and what heads write directly; on validation alone."""
    if ablation is None:
        return []
    found, n = [], ablation["n"]
    for kind in dict.fromkeys(row["kind"] for row in ablation["units"]):
        rows = {r["unit"]: r["margin"] for r in ablation["units"] if r["kind"] == kind}
        found.append((f"margin, {kind} ablation", "band over all removed heads", rows))
    for kind, estimates in ablation["estimates"].items():
        own = {head: of["direct"] for head, of in estimates.get("heads", {}).items()}
        found.append((f"direct effect, {kind}", "interval of this head alone", own))
    return [
        _metric(name, 0.0, 4, None)
        | {
            "validation": {
                key: _grid(results, {head: row[key] for head, row in rows.items()})
                for key in ("estimate", "low", "high")
            }
            | {"n": n, "brackets": brackets},
        }
        for name, brackets, rows in found
        if rows
    ]


def _grid(results: SweepResults, of: dict[str, float]) -> Rows:
    layers, heads = results.shape
    return [[of.get(str(Head(la, i))) for i in range(heads)] for la in range(layers)]


def _facts(
    head: Head, results: SweepResults, findings: Findings, ablation: dict[str, Any] | None
) -> list[list[str]]:
    """What is known of a head: a name, and the value with its interval, p and chance."""
    verdict, at = findings.verdict, (head.layer, head.index)
    row = findings.heads[head.layer * results.shape[1] + head.index]
    band = {name: float(getattr(verdict.band, name)[at]) for name in ("estimate", "low", "high")}
    facts = [
        ["excess, validation", f"{span(band, 4)} (band over all heads; chance 0)"],
        [
            "excess, discovery",
            f"{number(row['discovery_excess'], 4)}; max-T p {p_value(row['discovery_p_adjusted'])}",
        ],
    ]
    if head in verdict.top:
        k = verdict.top.index(head)
        own = f"{span(verdict.validation[k], 4)}; p {p_value(verdict.p[k])}"
        told = f"{own}, Holm {p_value(verdict.p_holm[k])} (interval and test of this head alone)"
        facts.append(["excess, validation, alone", told])
    facts += [
        ["in-box mass", f"{number(row['in_box_mass'])} (uniform {number(findings.area.estimate)})"],
        ["patch AUROC", f"{number(row['patch_auroc'])} (chance 0.5)"],
        ["pointing game", f"{number(row['pointing'])} (chance {number(findings.pointing_chance)})"],
        ["kept by the class token", f"{number(row['class_mass'])} of its attention"],
        ["falls on sinks", f"{number(row['sink_mass'])} of its attention to patches"],
        ["first on discovery", f"{percent(row['p_first'])} of resamples"],
    ]
    for unit in [] if ablation is None else ablation["units"]:
        if unit["unit"] == str(head):
            place = f"rank {unit['rank']} of {unit['of']} removed heads by loss of margin"
            told = (
                f"{place}: {span(unit['margin'], 4)} (band over all removed heads), adjusted p "
                f"{p_value(unit['p_adjusted'])}"
            )
            facts.append([f"margin, {unit['kind']} ablation", told])
    for kind, estimates in ({} if ablation is None else ablation["estimates"]).items():
        if str(head) in estimates.get("heads", {}):
            own = estimates["heads"][str(head)]
            told = f"{span(own['direct'], 4)} (interval of this head alone)"
            facts.append([f"direct effect, {kind}", told])
    for told in [] if ablation is None else ablation.get("words", {}).get(str(head), []):
        more = f"{span(told['difference'], 4)} more to the cosine in pictures that show it"
        facts.append(
            [f"writes towards “{told['word']}”", f"adds {more} (interval of this line alone)"]
        )
    n = f"{count(verdict.discovery.n)} discovery, {count(verdict.band.n)} validation"
    return [*facts, ["pictures", n]]


def _picture(results: SweepResults, i: int) -> dict[str, Any]:
    """A picture of the gallery as the tower saw it."""
    pixels: Float[np.ndarray, "3 s s"] = results.gallery_pixels[i]
    side = pixels.shape[-1]
    image, buffer = Image.fromarray(pixels.transpose(1, 2, 0)), io.BytesIO()
    small = side <= LARGEST_PNG
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": QUALITY}))
    kind = "png" if small else "jpeg"
    name, split = gallery.facts(results, i)
    row = results.gallery_rows[i]
    return {
        "name": name,
        "split": split,
        "src": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "boxes": (gallery.boxes(results, i) / side).round(4).tolist(),
        "area": number(gallery.box_area(results, i)),
        "mass": [[round(v, 3) for v in la] for la in results.metrics["in_box_mass"][row].tolist()],
    }
