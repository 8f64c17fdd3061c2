"""`python -m interp.relevance`: do relevance maps find the objects, and better than a head does?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import RelevanceConfig
from superclip.errors import UserError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from interp.results import SweepResults
    from interp.swept import Swept

SCHEMA = 1
RANKED = ("excess", "auroc")
Row = dict[str, Any]

DESCRIPTION = """Score relevance maps over patches by the very metrics of the heads, on the sweep's
validation pictures. A method that reads a text reads the picture's captions; for specificity it
reads the name of each category and is scored on that category's boxes against those of the others
in the picture. Writes relevance.json, and relevance.npz with the maps, beside the sweep's
results."""


def main(argv: list[str]) -> None:
    """Parse, draw the maps, score them, write, print."""
    from superclip.flags import parse

    config = parse(RelevanceConfig, argv, "python -m interp.relevance", DESCRIPTION)
    report, path = relevance_one(config)
    print(render(report))
    print(f"\nwritten: {path}, relevance.npz")


def relevance_one(config: RelevanceConfig) -> tuple[dict[str, Any], Path]:
    """Draw, score and write the maps and the report of one checkpoint."""
    from interp.swept import asked, claim, open_swept, write_arrays, write_report

    path, maps = claim(config, "relevance.json"), claim(config, "relevance.npz")
    swept = open_swept(config)
    found = collect(swept, config.methods)
    write_arrays(maps, found)
    facts = {"schema": SCHEMA, "asked": asked(config)} | swept.tie
    report = facts | league(swept.results, found, config.draws, config.seed)
    write_report(path, report)
    return report, path


def collect(swept: Swept, wanted: str) -> dict[str, np.ndarray]:
    """Draw all maps, float16, none below 0, sums of 1.

    Returns:
        `methods`; `discovery` and `validation`, `[picture, method, patch]`, for the captions;
        `untrained`, the same on validation by the model before training;
        `pair_rows` of the sweep's categories, in validation pictures that show several; `pairs`,
        `[row, method, patch]`, of `pair_methods` for their names, unless there are too few.

    Raises:
        UserError: for a method that does not exist, or not for this tower, or too few pictures.
    """
    import torch

    from interp.collect import FEWEST
    from interp.lenses.relevance import READ_NO_TEXT, methods_of

    methods, results = methods_of(swept.tower, wanted), swept.results
    reading = [name for name in methods if name not in READ_NO_TEXT]
    found = {"methods": np.array(methods), "pair_methods": np.array(reading)}
    for split in ("discovery", "validation"):
        if len(rows := swept.rows(split)) < FEWEST:
            raise UserError(f"only {len(rows)} {split} pictures, {FEWEST} are needed; sweep more")
        vectors, owner = swept.captions(split)
        texts = vectors.new_zeros(len(rows), vectors.shape[1]).index_add_(0, owner, vectors)
        found[split] = _maps(swept, methods, rows, texts, torch.arange(len(rows)), split)
    fresh, rows = untrained(swept), swept.rows("validation")
    vectors, owner = fresh.captions("validation")
    texts = vectors.new_zeros(len(rows), vectors.shape[1]).index_add_(0, owner, vectors)
    found["untrained"] = _maps(fresh, methods, rows, texts, torch.arange(len(rows)), "untrained")
    image, judged = results.category_image, results.rows("validation")
    several = np.bincount(image, minlength=len(results.split)) > 1
    found["pair_rows"] = pairs = np.flatnonzero(several[image] & np.isin(image, judged))
    pictures, owner = np.unique(image[pairs], return_inverse=True)
    if reading and len(pictures) >= FEWEST:
        rows = [swept.rows("validation")[k] for k in np.searchsorted(judged, pictures)]
        vectors = swept.class_vectors(results.manifest["categories"])
        texts = vectors[results.category_id[pairs].astype(np.int64)]
        places = torch.from_numpy(owner)
        found["pairs"] = _maps(swept, reading, rows, texts, places, "categories")
    return found


def untrained(swept: Swept) -> Swept:
    """The same pictures with the run's own initialisation, or one like it for foreign weights."""
    from interp.hooked import HookedVisionTransformer
    from superclip.model.factory import build_clip
    from superclip.model.superclip import SuperCLIP

    subject = swept.subject
    clip = build_clip(subject.model_config, subject.seed, subject.init_scale)
    model = SuperCLIP(clip, subject.preprocess.mean, subject.preprocess.std)
    fresh = replace(subject, captioned=model.to(swept.device).eval())
    return replace(swept, subject=fresh, tower=HookedVisionTransformer(clip.visual))


def _maps(
    swept: Swept, methods: list[str], rows: list[int], texts: Tensor, owner: Tensor, what: str
) -> np.ndarray:
    """Maps `[text, method, patch]`; a text is read in picture `rows[owner]`, owners ascending."""
    import torch

    from interp.lenses.relevance import relevance

    parts, start, owner = [], 0, owner.to(swept.device)
    for images in swept.batches(rows, what):
        mine = (owner >= start) & (owner < start + len(images))
        shown = images[owner[mine] - start]
        maps = [relevance(swept.tower, name, shown, texts[mine]) for name in methods]
        parts.append(torch.stack(maps, dim=1).half().cpu().numpy())
        start += len(images)
    return np.concatenate(parts)


def league(
    results: SweepResults, found: dict[str, np.ndarray], draws: int, seed: int
) -> dict[str, Any]:
    """The table as plain values, one row a map, judged on validation.

    Beside the methods stand the champion head, uniform attention, a centre Gaussian and the best
    fixed patch. Champion, patch, powers and the best method are chosen on discovery.
    """
    from interp.analysis import top_heads
    from interp.grounding import baselines, metrics
    from interp.grounding.metrics import PairScores
    from interp.lenses.emergence import unit_band
    from interp.stats.intervals import influence_values, simultaneous_band
    from interp.stats.pairing import pairing_test

    def on(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All maps, coverage, valid, stratum."""
        at = results.rows(split)
        beside = [results.maps[at, champion.layer, champion.index], *fixed.values()]
        beside = [np.broadcast_to(m, (len(at), m.shape[-1]))[:, None] for m in beside]
        maps = np.concatenate([found[split], *beside], axis=1, dtype=np.float64)
        return maps, results.coverage[at], results.valid[at], results.stratum[at].astype(np.int64)

    def bands(values: np.ndarray, labels: np.ndarray, lost: int = 1, share: bool = False):
        whole = np.isfinite(values).all(axis=1)  # an AUROC needs an object and something else
        labels = labels if whole.all() else np.where(whole, 0, -1)
        if share:  # never leaves [0, 1]
            kept = labels >= 0
            band = unit_band(values[kept], labels[kept], int(kept.sum()), draws, seed)
        else:
            band = simultaneous_band(values, labels, lost, draws, seed)
        ends = zip(band.estimate.tolist(), band.low.tolist(), band.high.tolist())
        return [{"estimate": e, "low": low, "high": high, "n": band.n} for e, low, high in ends]

    champion, chooses = top_heads(results, 1)[0], results.rows("discovery")
    known = results.coverage[chooses], results.valid[chooses]
    fixed = {
        "uniform": baselines.uniform(known[0].shape[1]),
        "centre Gaussian": baselines.centre_gaussian(results.grid),
        "best fixed patch": baselines.best_fixed_patch(*known),
    }
    methods = found["methods"].tolist()
    names = [*methods, f"champion {champion}", *fixed]
    drawn, *_, strata = on("discovery")
    maps, *boxes, stratum = on("validation")
    pairs, hits = PairScores(maps, *boxes), results.hits[results.rows("validation")] > 0
    powers = [baselines.best_power(own, *known, strata) for own in drawn.swapaxes(0, 1)]
    sharp = [baselines.sharpen(maps[:, k], power) for k, power in enumerate(powers)]
    sharp = PairScores(np.stack(sharp, axis=1), *boxes)
    excess, auroc = influence_values(pairs, stratum), metrics.patch_auroc(maps, *boxes)
    test = pairing_test(pairs, stratum, draws, seed)
    columns = {
        "map": names,
        "mass": bands(metrics.in_box_mass(maps, *boxes), stratum, share=True),
        "excess": bands(excess, stratum, lost=2),
        "p": test.p.tolist(),
        "p_adjusted": test.p_adjusted.tolist(),
        "auroc": bands(auroc, stratum, share=True),
        "pointing": bands(metrics.pointing(maps, hits, boxes[1]), stratum, share=True),
        "power": powers,
        "excess_at_power": bands(influence_values(sharp, stratum), stratum, lost=2),
        "discovery_excess": metrics.excess(PairScores(drawn, *known), strata).mean(0).tolist(),
        "flat": (np.ptp(maps, axis=-1) == 0).sum(axis=0).tolist(),
    }
    for name, k in (("attention", 0), ("champion", len(methods))):
        columns[f"excess_minus_{name}"] = bands(excess - excess[:, [k]], stratum, lost=2)
        columns[f"auroc_minus_{name}"] = bands(auroc - auroc[:, [k]], stratum)
    rows = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
    before = PairScores(found["untrained"].astype(np.float64), *boxes)
    gains = {
        "excess": excess[:, : len(methods)] - influence_values(before, stratum),
        "auroc": auroc[:, : len(methods)] - metrics.patch_auroc(before.maps, *boxes),
    }
    for name, values in gains.items():
        for row, band in zip(rows, bands(values, stratum, 2 if name == "excess" else 1)):
            row[f"{name}_minus_untrained"] = band
    if "pairs" in found:
        for name, values in specificity(results, found["pair_rows"], found["pairs"]).items():
            one = np.zeros(len(values), np.int64)
            own = bands(values, one, share=name == "category_auroc")
            for method, band in zip(found["pair_methods"], own):
                rows[methods.index(method)][name] = band
    return {
        "n": len(maps),
        "discovery_n": len(drawn),
        "several_categories_n": len(np.unique(results.category_image[found["pair_rows"]])),
        "champion": names[len(methods)],
        "kind": results.manifest["kind"],
        "best_of_discovery": max(rows[: len(methods)], key=lambda r: r["discovery_excess"])["map"],
        "draws": draws,
        "seed": seed,
        "methods": methods,
        "maps": rows,
    }


def specificity(results: SweepResults, rows: np.ndarray, maps: np.ndarray) -> dict[str, np.ndarray]:
    """Patch AUROC of the maps of categories' names, `[picture, method]`, means over categories.

    Returns:
        `category_auroc`, on the category's own boxes, and `specificity`, the same minus that on the
        boxes of the picture's other categories: exactly 0 for a map that is the same for all names.
    """
    from interp.grounding.metrics import patch_auroc

    image, masks = results.category_image[rows], results.category_coverage[rows]
    a, b = np.nonzero(image[:, None] == image)
    auroc = patch_auroc(maps[a], masks[b], results.valid[image[a]])
    at = [image[a] == i for i in np.unique(image)]
    own, other = (np.stack([auroc[m & k].mean(axis=0) for m in at]) for k in (a == b, a != b))
    return {"category_auroc": own, "specificity": own - other}


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    rows, head = report["maps"], report["champion"]
    moving = [row for row in rows if row["map"] in (*report["methods"], head)]
    named = [row for row in rows if "specificity" in row]
    best = next(row for row in rows if row["map"] == report["best_of_discovery"])
    gained = {f"{score}_minus_untrained": f"{score} minus untrained" for score in RANKED}
    gaps = {
        f"{score}_minus_{key}": f"{score} minus {name}"
        for key, name in (("attention", "attention"), ("champion", head.split()[1]))
        for score in RANKED
    }

    def table(shown: list[Row], **columns: str) -> list[str]:
        lines = ["", f"{'map':<18}" + "".join(f"{title:<25}" for title in columns.values())]
        lines += [f"{r['map']:<18}" + "".join(f"{_show(r[k]):<25}" for k in columns) for r in shown]
        return [line.rstrip() for line in lines]

    def off_zero(key: str, title: str, shown: list[Row]) -> str:
        above = [row["map"] for row in shown if row[key]["low"] > 0]
        below = [row["map"] for row in shown if row[key]["high"] < 0]
        return f"{title}, band above 0: {', '.join(above) or '-'}; below: {', '.join(below) or '-'}"

    ranked = {"auroc": f"AUROC (n = {best['auroc']['n']})", "pointing": "pointing"}
    power = {"power": "power", "excess_at_power": "excess at power"}
    lines = [
        f"n = {report['n']} validation pictures; texts: the pictures' own captions",
        *table(rows, mass="in-box mass", excess="excess", p_adjusted="p, max-T", **ranked),
        *table(moving, **power, **gaps),
        "",
        f"best method of discovery, by excess: {best['map']}, {best['discovery_excess']:.3f} there "
        f"(n = {report['discovery_n']}), on validation {_show(best['excess'])}",
        *(off_zero(key, title, moving) for key, title in gaps.items()),
        *table([r for r in moving if r["map"] != head], **gained),
        *(off_zero(key, title, moving[:-1]) for key, title in gained.items()),
    ]
    lines += ["", f"{report['several_categories_n']} pictures of several categories"]
    if not named:
        lines[-1] += ": too few, or no method that reads a text, for specificity"
    else:
        lines[-1] += f", n = {named[0]['specificity']['n']}; text: a category's name"
        own = {"category_auroc": "AUROC, own boxes", "specificity": "minus other boxes"}
        lines += [*table(named, **own)[1:], off_zero("specificity", "specificity", named)]
    lines += [
        "",
        "brackets: 95 % bands, for all maps of a column at once; p: one-sided pairing permutation, "
        "likewise",
        "excess: over the map's own prior; like mass it depends on how sharp a map is, AUROC and "
        "pointing do not; power: to it, a map has the best excess on discovery",
        f"chosen on discovery as well: {head} ({report['kind']} attention), the fixed patch",
        "untrained: the same method on the model before training; only what is above it was "
        "learned, and no map shows that the model uses what is there",
    ]
    if flat := [f"{row['map']} {row['flat']}" for row in moving if row["flat"]]:
        lines.append(f"pictures whose map has no mass and counts as uniform: {', '.join(flat)}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:.4g}"
    estimate, low, high = (round(value[k], 3) + 0.0 for k in ("estimate", "low", "high"))  # no -0
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    run_command(main)
