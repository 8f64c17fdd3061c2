"""From a results file to findings: every number with its n, interval and chance level.

Discovery chooses, validation judges. A significant head means that its attention covaries with
where this picture's boxes are; "training made it so" needs the contrast with untrained towers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from interp.grounding import baselines, metrics
from interp.grounding.metrics import PairScores
from interp.heads import Head
from interp.results import SweepResults
from interp.stats.intervals import (
    Interval,
    excess_interval,
    head_blocks,
    interval_of,
    mean_interval,
    ratio_interval,
)
from interp.stats.selection import Verdict, judge


@dataclass(frozen=True)
class Baseline:
    """A map that knows nothing of the trained tower, on the validation pictures.

    Attributes:
        kind: fixed (one map for all pictures), prior (the head's own maps, paired otherwise),
            pixels (made from each picture's colours), or untrained (a tower before training).
        name: what it is, and how it was chosen.
        mass: in-box mass. enrichment: mean mass / mean area.
        excess: above its own prior; None for a map that is the same for every picture.
        difference: champion minus baseline, paired by picture, in `difference_in`.
        selectivity: object mass / (object + clutter mass), on scenes.
    """

    kind: Literal["fixed", "prior", "pixels", "untrained"]
    name: str
    mass: Interval
    enrichment: Interval
    excess: Interval | None
    difference: Interval
    difference_in: str
    selectivity: Interval | None
    selectivity_difference: Interval | None


@dataclass(frozen=True)
class Findings:
    """Everything a table, page or caption may say of one sweep.

    Attributes:
        verdict: discovery, finalists, band.
        mass, enrichment, auroc, pointing, selectivity: of the champion, on validation.
        class_mass, sink_mass: of the champion, on validation.
        baselines: as rows of one table.
        heads: one row per head, plain values.
        area: mean area of the objects on validation, which is the mass of uniform attention.
    """

    verdict: Verdict
    mass: Interval
    enrichment: Interval
    auroc: Interval
    pointing: Interval
    selectivity: Interval | None
    class_mass: Interval
    sink_mass: Interval
    baselines: tuple[Baseline, ...]
    heads: tuple[dict[str, Any], ...]
    area: Interval
    pointing_chance: float

    @property
    def champion(self) -> Head:
        return self.verdict.champion


def analyse(results: SweepResults) -> Findings:
    """Judge a sweep; deterministic, from the results file alone."""
    draws, seed = results.manifest["draws"], results.manifest["seed"]
    pairs = PairScores(results.maps, results.coverage, results.valid)
    names = np.array(["discovery", "validation"])[results.split]
    verdict = judge(pairs, names.tolist(), results.stratum.astype(np.int64), draws, seed)
    head = verdict.champion
    rows = results.rows("validation")
    view = _View(results, rows, results.stratum[rows].astype(np.int64), draws, seed)
    own = results.maps[rows, head.layer, head.index].astype(np.float64)

    def of_head(values: np.ndarray) -> Interval:
        return mean_interval(
            values[rows, head.layer, head.index].astype(np.float64), view.stratum, draws, seed
        )

    return Findings(
        verdict=verdict,
        mass=view.mean(view.mass(own)),
        enrichment=view.enrichment(own),
        auroc=of_head(results.metrics["patch_auroc"]),
        pointing=of_head(results.metrics["pointing"]),
        selectivity=view.selectivity(own),
        class_mass=of_head(results.class_mass),
        sink_mass=of_head(results.sink_mass),
        baselines=tuple(_baselines(view, own)),
        heads=tuple(_head_rows(results, verdict)),
        area=view.mean(view.area),
        pointing_chance=_pointing_chance(results.hits[rows], results.valid[rows]),
    )


class _View:
    """The validation pictures of a sweep, and intervals on them."""

    def __init__(
        self, results: SweepResults, rows: np.ndarray, stratum: np.ndarray, draws: int, seed: int
    ):
        self.results, self.rows, self.stratum = results, rows, stratum
        self.draws, self.seed = draws, seed
        self.coverage, self.valid = results.coverage[rows], results.valid[rows]
        self.clutter = results.clutter[rows]
        self.area = metrics.area(self.coverage, self.valid)

    def mass(self, maps: np.ndarray) -> np.ndarray:
        return metrics.in_box_mass(maps, self.coverage, self.valid)

    def clutter_mass(self, maps: np.ndarray) -> np.ndarray:
        return metrics.in_box_mass(maps, self.clutter, self.valid)

    def mean(self, values: np.ndarray) -> Interval:
        return mean_interval(values, self.stratum, self.draws, self.seed)

    def enrichment(self, maps: np.ndarray) -> Interval:
        return ratio_interval(self.mass(maps), self.area, self.stratum, self.draws, self.seed)

    def selectivity(self, maps: np.ndarray) -> Interval | None:
        if not self.results.manifest["data"]["clutter"]:
            return None
        objects = self.mass(maps)
        return ratio_interval(
            objects, objects + self.clutter_mass(maps), self.stratum, self.draws, self.seed
        )

    def selectivity_difference(self, a: np.ndarray, b: np.ndarray) -> Interval | None:
        if not self.results.manifest["data"]["clutter"]:
            return None
        columns = [f(m) for m in (a, b) for f in (self.mass, self.clutter_mass)]

        def difference(m: np.ndarray) -> np.ndarray:
            return m[..., 0] / (m[..., 0] + m[..., 1]) - m[..., 2] / (m[..., 2] + m[..., 3])

        return interval_of(difference, np.stack(columns, 1), self.stratum, self.draws, self.seed)

    def blocks(self, maps: np.ndarray) -> list[np.ndarray]:
        return head_blocks(PairScores(maps[:, None], self.coverage, self.valid), self.stratum)

    def excess(self, maps: np.ndarray) -> Interval:
        return excess_interval(self.blocks(maps), self.draws, self.seed)

    def excess_difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        blocks = [x - y for x, y in zip(self.blocks(a), self.blocks(b))]
        return excess_interval(blocks, self.draws, self.seed)

    def fixed(self, name: str, map_: np.ndarray, own: np.ndarray) -> Baseline:
        maps = np.broadcast_to(map_, (len(self.rows), len(map_)))
        difference = self.mean(self.mass(own) - self.mass(maps))
        return self._row("fixed", name, maps, own, None, difference, "in-box mass")

    def moving(self, kind: str, name: str, maps: np.ndarray, own: np.ndarray) -> Baseline:
        difference = self.excess_difference(own, maps)
        return self._row(kind, name, maps, own, self.excess(maps), difference, "excess")

    def _row(self, kind, name, maps, own, excess, difference, unit) -> Baseline:
        return Baseline(
            kind,
            name,
            self.mean(self.mass(maps)),
            self.enrichment(maps),
            excess,
            difference,
            unit,
            self.selectivity(maps),
            self.selectivity_difference(own, maps),
        )


def _pointing_chance(hits: np.ndarray, valid: np.ndarray) -> float:
    """Of a patch drawn from those that can be pointed at."""
    allowed = valid > 0
    return float((((hits > 0) & allowed).sum(1) / allowed.sum(1)).mean())


def _baselines(view: _View, own: np.ndarray):
    """Rows of the baseline table; whatever is chosen is chosen on discovery."""
    results = view.results
    chooses = results.rows("discovery")
    coverage, valid = results.coverage[chooses], results.valid[chooses]
    stratum = results.stratum[chooses].astype(np.int64)
    p = results.coverage.shape[1]
    yield view.fixed("uniform", baselines.uniform(p), own)
    yield view.fixed(
        "best fixed patch (chosen on discovery)", baselines.best_fixed_patch(coverage, valid), own
    )
    yield view.fixed("centre Gaussian", baselines.centre_gaussian(results.grid), own)
    champion_pairs = PairScores(own[:, None], view.coverage, view.valid)
    mass = view.mass(own)
    for name, function in (
        ("own prior (its maps of other pictures)", metrics.own_prior_mass),
        ("shuffled boxes (its maps, other pictures' boxes)", metrics.shuffled_mass),
    ):
        other = function(champion_pairs, view.stratum)[:, 0]
        ratio = ratio_interval(other, view.area, view.stratum, view.draws, view.seed)
        gap = view.mean(mass - other)
        shown = view.mean(other)
        yield Baseline("prior", name, shown, ratio, None, gap, "in-box mass", None, None)
    target = float(baselines.entropy(own).mean())
    for k, name in enumerate(results.manifest["saliency"]):
        raw = results.saliency[:, k].astype(np.float64)
        power = baselines.best_power(raw[chooses], coverage, valid, stratum)
        maps = baselines.sharpen(raw[view.rows], power)
        yield view.moving("pixels", f"{name} ^{power:g} (power chosen on discovery)", maps, own)
        matched = baselines.power_at_entropy(raw[chooses], target)
        maps = baselines.sharpen(raw[view.rows], matched)
        yield view.moving("pixels", f"{name} ^{matched:.1f} (at the champion's entropy)", maps, own)
    for k, facts in enumerate(results.manifest["untrained"]):
        what = "own initialisation" if facts["own_initialisation"] else f"seed {facts['seed']}"
        maps = results.untrained_maps[view.rows, k].astype(np.float64)
        name = f"untrained tower, {what}, its best head {facts['head']}"
        yield view.moving("untrained", name, maps, own)


def _head_rows(results: SweepResults, verdict: Verdict):
    """One row of plain values per head: discovery, validation with its simultaneous band, both
    p-values."""
    layers, heads = results.shape
    chooses, judges = results.rows("discovery"), results.rows("validation")
    for layer in range(layers):
        for index in range(heads):
            at = (layer, index)
            row: dict[str, Any] = {
                "head": str(Head(layer, index)),
                "layer": layer,
                "index": index,
                "discovery_excess": float(verdict.discovery.mean[at]),
                "discovery_t": float(verdict.discovery.t[at]),
                "discovery_p_adjusted": float(verdict.discovery.p_adjusted[at]),
                "validation_excess": float(verdict.band.estimate[at]),
                "validation_low": float(verdict.band.low[at]),
                "validation_high": float(verdict.band.high[at]),
                "p_first": float(verdict.p_first[at]),
                "p_top5": float(verdict.p_top[at]),
                "class_mass": float(results.class_mass[judges][:, layer, index].mean()),
                "sink_mass": float(results.sink_mass[judges][:, layer, index].mean()),
            }
            for name, values in results.metrics.items():
                if name != "excess":
                    row[name] = float(np.nanmean(values[judges][:, layer, index]))
            row["enrichment"] = row["in_box_mass"] / float(
                metrics.area(results.coverage[judges], results.valid[judges]).mean()
            )
            row["discovery_in_box_mass"] = float(
                results.metrics["in_box_mass"][chooses][:, layer, index].mean()
            )
            yield row


def category_rows(results: SweepResults, head: Head, fewest: int = 10) -> list[dict[str, Any]]:
    """A head by category, on validation pictures that show it: in-box mass on the boxes of that
    category alone against their area, which uniform attention would have; most frequent first.

    Intervals are of each row alone. Categories in fewer than `fewest` pictures are left out.
    """
    draws, seed = results.manifest["draws"], results.manifest["seed"]
    judged = np.isin(results.category_image, results.rows("validation"))
    found = []
    for number, name in enumerate(results.manifest["categories"]):
        at = np.flatnonzero(judged & (results.category_id == number))
        if len(at) < fewest:
            continue
        images, boxes = results.category_image[at], results.category_coverage[at].astype(np.float64)
        valid, maps = results.valid[images], results.maps[images, head.layer, head.index]
        mass = metrics.in_box_mass(maps.astype(np.float64), boxes, valid)
        area = metrics.area(boxes, valid)
        found.append(
            {
                "category": name,
                "area": float(area.mean()),
                "mass": mean_interval(mass, None, draws, seed),
                "enrichment": ratio_interval(mass, area, None, draws, seed),
            }
        )
    return sorted(found, key=lambda row: -row["mass"].n)


def top_heads(results: SweepResults, count: int) -> tuple[Head, ...]:
    """The best heads of discovery, without the tests: what an ablation needs to know."""
    from interp.stats.selection import best_heads

    rows = results.rows("discovery")
    return best_heads(results.metrics["excess"][rows].astype(np.float64).mean(axis=0), count)


def plain(findings: Findings) -> dict[str, Any]:
    """Findings as JSON values."""
    verdict = findings.verdict
    return {
        "champion": {
            "head": str(findings.champion),
            "discovery_excess": float(
                verdict.discovery.mean[findings.champion.layer, findings.champion.index]
            ),
            "validation_excess": asdict(verdict.validation[0]),
            "p": float(verdict.p[0]),
            "shrinkage": verdict.shrinkage,
            "p_first": float(verdict.p_first[findings.champion.layer, findings.champion.index]),
            "p_top5": float(verdict.p_top[findings.champion.layer, findings.champion.index]),
            **{
                name: asdict(value) if (value := getattr(findings, name)) is not None else None
                for name in (
                    "mass",
                    "enrichment",
                    "auroc",
                    "pointing",
                    "selectivity",
                    "class_mass",
                    "sink_mass",
                )
            },
        },
        "finalists": [
            {"head": str(h), "validation_excess": asdict(v), "p": float(p), "p_holm": float(q)}
            for h, v, p, q in zip(verdict.top, verdict.validation, verdict.p, verdict.p_holm)
        ],
        "discovery": {
            "n": verdict.discovery.n,
            "draws": verdict.discovery.draws,
            "heads_significant": int((verdict.discovery.p_adjusted <= 0.05).sum()),
            "null_max_t_95": verdict.discovery.null_max_t_95,
        },
        "area": asdict(findings.area),
        "pointing_chance": findings.pointing_chance,
        "baselines": [asdict(b) for b in findings.baselines],
        "heads": list(findings.heads),
    }
