"""From effects to findings: paired by image, corrected over the units of a kind, with a null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.causal.effects import Effects
from interp.causal.said import champion_said as champion_said
from interp.causal.units import Unit
from interp.heads import Head
from interp.stats.intervals import mean_interval, ratio_interval, simultaneous_band
from interp.stats.multiplicity import sign_flip_test


@dataclass(frozen=True)
class Judge:
    """How intervals and tests are drawn."""

    draws: int
    seed: int

    def interval(self, values: Float[np.ndarray, " image"]) -> dict[str, float]:
        return asdict(mean_interval(values, None, self.draws, self.seed))

    def ratio(
        self, above: Float[np.ndarray, " image"], below: Float[np.ndarray, " image"]
    ) -> dict[str, float]:
        return asdict(ratio_interval(above, below, None, self.draws, self.seed))


def family(unit: Unit) -> str:
    """Units of one family are tested together: head, mlp, attention, layer or group."""
    if len(unit.heads) == 1 and not unit.mlps:
        return "head"
    if unit.mlps:
        return "layer" if unit.heads else "mlp"
    return "attention" if unit.name.endswith(".attn") else "group"


def judged(
    found: Effects, units: Sequence[Unit], roles: dict[str, str], kind: str, judge: Judge
) -> list[dict[str, Any]]:
    """One row of plain values a unit, in the order of the bank.

    `p` and `p_adjusted` are of `margin`: sign flips by image, two-sided, step-down max-T within the
    family, whose simultaneous band `low` and `high` of `margin` are; all other intervals are of one
    unit. Any perturbation of an embedding costs some margin, so a loss says that the model is worse
    off, and its rank among the heads of the layer, or the loss per norm, whether by more than as
    large a disturbance elsewhere.

    Returns:
        Rows with `rank` (1 is the largest loss of `margin`) and `of` within the family, and for
        heads `layer_rank`, `layer_of` among those of the same layer.
    """
    rows: list[dict[str, Any]] = [
        {"unit": unit.name, "family": family(unit), "role": roles.get(unit.name, ""), "kind": kind}
        for unit in units
    ]
    for name in dict.fromkeys(row["family"] for row in rows):
        chosen = [k for k, row in enumerate(rows) if row["family"] == name]
        _test([rows[k] for k in chosen], found, chosen, judge)
        layers = [units[k].layers[0] for k in chosen]
        _rank([rows[k] for k in chosen], "")
        for layer in set(layers) if name == "head" else ():
            _rank([rows[k] for k, at in zip(chosen, layers) if at == layer], "layer_")
    for k, row in enumerate(rows):
        row["removed_norm"] = float(found.removed[k].mean())
        norm = row["removed_norm"]
        row["per_norm"] = row["margin"]["estimate"] / norm if norm > 0 else None
        row["measures"] = {
            measure: _interval(found, measure, found.change(measure)[k], judge)
            for measure in found.intact
            if measure != "margin"
        }
        if found.mean_ap is not None:
            row["measures"]["mAP"] = asdict(found.mean_ap[1][k])
    return rows


def _test(
    rows: Sequence[dict[str, Any]], found: Effects, chosen: Sequence[int], judge: Judge
) -> None:
    change = found.change("margin")[chosen].T
    test = sign_flip_test(change, two_sided=True, draws=judge.draws, seed=judge.seed)
    everyone = np.zeros(len(change), np.int64)
    band = simultaneous_band(change, everyone, 1, judge.draws, judge.seed)
    for k, row in enumerate(rows):
        limits = zip(("estimate", "low", "high"), (band.estimate, band.low, band.high))
        row["margin"] = {name: float(of[k]) for name, of in limits} | {"n": band.n}
        row |= {"p": float(test.p[k]), "p_adjusted": float(test.p_adjusted[k])}


def _rank(rows: Sequence[dict[str, Any]], prefix: str) -> None:
    """By loss of `margin`; units that tie share the worse place."""
    losses = np.array([row["margin"]["estimate"] for row in rows])
    for row, loss in zip(rows, losses):
        row |= {f"{prefix}rank": int((losses <= loss).sum()), f"{prefix}of": len(rows)}


def _interval(
    found: Effects, measure: str, change: Float[np.ndarray, " image"], judge: Judge
) -> dict[str, float]:
    """Of an image's captions, a caption is the query: recall weighs images by their captions."""
    if measure.startswith("t2i"):
        captions = found.captions.astype(float)
        return judge.ratio(change * captions, captions)
    return judge.interval(change)


def intact(found: Effects, judge: Judge) -> dict[str, Any]:
    """What the model scores with everything in place."""
    rows = {name: _interval(found, name, values, judge) for name, values in found.intact.items()}
    return rows | ({} if found.mean_ap is None else {"mAP": {"estimate": found.mean_ap[0]}})


def direct_rows(
    direct: Float[np.ndarray, "image layer head"],
    total: Float[np.ndarray, "image unit"],
    heads: Sequence[Head],
    judge: Judge,
) -> dict[str, dict[str, Any]]:
    """Direct beside total effect on `frozen` of each head.

    Returns:
        By head `direct`, and `repaired`: of the direct effect, the share that later layers make
        good (below 0: amplify), sum over images by sum; None where the direct effect is 0.
    """
    found = {}
    for k, head in enumerate(heads):
        own, whole = direct[:, head.layer, head.index], total[:, k]
        size = np.abs(own)
        repaired = -np.sign(own) * (whole - own)
        found[str(head)] = {
            "direct": judge.interval(own),
            "repaired": judge.ratio(repaired, size) if size.any() else None,
        }
    return found
