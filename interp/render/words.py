"""Numbers and sentences, computed from findings: nothing here states what was not measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from interp.analysis import Baseline, Findings
from interp.causal.said import agreement_said, champion_said, harmless, sets_said
from interp.heads import Head
from interp.results import SweepResults
from interp.stats.intervals import Interval
from interp.stats.multiplicity import ALPHA

TOWERS_NEEDED = 5
"""Untrained towers from which on the contrast with them counts."""


def number(value: float, digits: int = 3) -> str:
    """A fixed number of decimals, with a true minus sign and no negative zero.

    >>> number(-0.0004, 3), number(-1.5, 1)
    ('0.000', '−1.5')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def span(interval: Interval | dict[str, Any], digits: int = 3) -> str:
    """Estimate and interval, from an `Interval` or from its JSON form."""
    values = interval if isinstance(interval, dict) else vars(interval)
    low, high = (number(values[name], digits) for name in ("low", "high"))
    return f"{number(values['estimate'], digits)} [{low}, {high}]"


def count(value: int) -> str:
    """An integer in groups of three.

    >>> count(9999)
    '9\\u202f999'
    """
    return f"{value:,}".replace(",", "\u202f")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def p_value(p: float) -> str:
    return f"{p:.4g}"


def plural(n: int, one: str, many: str | None = None) -> str:
    """
    >>> plural(1, "tower"), plural(5, "tower")
    ('1 tower', '5 towers')
    """
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sign(interval: Interval | dict[str, Any]) -> int:
    """1 or -1 where the interval lies above or below 0, else 0."""
    values = interval if isinstance(interval, dict) else vars(interval)
    return int(values["low"] > 0) - int(values["high"] < 0)


def attention_of(results: SweepResults) -> str:
    """Whose attention the sweep scored."""
    whose = {"class": "class token", "patches": "patch queries (mean)"}
    return f"attention of the {whose[results.manifest['kind']]}"


def subject(results: SweepResults) -> str:
    """The checkpoint in a few words."""
    checkpoint = results.manifest["checkpoint"]
    loss = "" if checkpoint["loss"] == "unknown" else checkpoint["loss"] + " "
    return f"{loss}{short(checkpoint['model'])} {checkpoint['sha256'][:8]}"


def short(name: str, letters: int = 48) -> str:
    """A name of others, brought onto a line and cut to it.

    >>> short("a" * 60, 5), short("two\\nlines")
    ('aaaa…', 'two lines')
    """
    name = " ".join(name.split())
    return name if len(name) <= letters else name[: letters - 1] + "…"


def significant(findings: Findings) -> np.ndarray:
    """Heads `[layer, head]` that the max-T test of discovery rejects."""
    return findings.verdict.discovery.p_adjusted <= ALPHA


def stands_out(findings: Findings) -> bool:
    """Whether the champion is among them."""
    return bool(significant(findings)[findings.champion.layer, findings.champion.index])


def untrained(findings: Findings) -> list[Baseline]:
    """Rows of the baseline table that are towers before training."""
    return [row for row in findings.baselines if row.kind == "untrained"]


def pixel_maps(findings: Findings) -> list[Baseline]:
    """Rows of the baseline table that are made from the pixels, without a network."""
    return [row for row in findings.baselines if row.kind == "pixels"]


def head_row(findings: Findings, head: Head) -> dict[str, Any]:
    return next(row for row in findings.heads if row["head"] == str(head))


def evidence(findings: Findings, head: Head) -> tuple[str, ...]:
    """Excess of a head on validation, and its p-values, as short lines, each with its own n.

    One of discovery's best five has an interval and a test of its own on validation; for another
    head there is the band over all heads. Every head has the max-T p of discovery.
    """
    verdict, row = findings.verdict, head_row(findings, head)
    chosen = (
        f"discovery p = {p_value(row['discovery_p_adjusted'])} (max-T over all heads), "
        f"n = {count(verdict.discovery.n)}"
    )
    if head in verdict.top:
        k = verdict.top.index(head)
        return (
            f"validation excess {span(verdict.validation[k], 4)} (interval of this head alone), "
            f"p = {p_value(verdict.p[k])} (Holm {p_value(verdict.p_holm[k])}), "
            f"n = {count(verdict.validation[k].n)}",
            chosen,
        )
    band = {name: row[f"validation_{name}"] for name in ("low", "high")}
    return (
        f"validation excess {span(band | {'estimate': row['validation_excess']}, 4)} (band over "
        f"all heads), n = {count(verdict.band.n)}",
        chosen,
    )


def answer(results: SweepResults, findings: Findings) -> list[str]:
    """What the sweep found, most important first."""
    sentences = [_champion(results, findings), _placement(findings), _training(findings)]
    if maps := pixel_maps(findings):
        sentences.append(_pixels(maps))
    if findings.selectivity is not None:
        sentences.append(_selectivity(findings))
    return [*sentences, _stability(findings)]


def _champion(results: SweepResults, findings: Findings) -> str:
    """The verdict, what chose the head and what training adds to it, and the test of validation."""
    verdict, head = findings.verdict, findings.champion
    excess, p = verdict.validation[0], float(verdict.p[0])
    smallest = 1 / (results.manifest["draws"] + 1)
    least = ", the smallest that the permutations can give" if p <= smallest * 1.0001 else ""
    towers = untrained(findings)
    above = [row for row in towers if sign(row.difference) > 0]
    if p > ALPHA:
        found = "No evidence that the champion's attention follows this picture's boxes."
    elif not stands_out(findings):
        found = (
            "Not established that a head's attention follows this picture's boxes: the champion "
            "passes its own test, but not the one over all heads."
        )
    elif len(above) < len(towers):
        found = (
            "The champion's attention covaries with where this picture's boxes are, but training "
            "is not shown to be why."
        )
    elif towers:
        found = (
            "The champion's attention covaries with where this picture's boxes are, more than that "
            "of the best head of each untrained tower."
        )
    else:
        found = (
            "The champion's attention covaries with where this picture's boxes are; whether "
            "training is why was not asked."
        )
    told = (
        f"its excess lies above that of {count(len(above)) if above else 'none'} of "
        f"{plural(len(towers), 'untrained tower')}"
        if towers
        else "no untrained tower was swept"
    )
    best = p_value(findings.verdict.discovery.p_adjusted[head.layer, head.index])
    return (
        f"{found} The champion {head}, best of {plural(len(findings.heads), 'head')} on "
        f"{plural(verdict.discovery.n, 'discovery picture')}, is "
        f"{'' if stands_out(findings) else 'not '}significant there (max-T over all heads p = "
        f"{best}); {told}. On {plural(excess.n, 'validation picture')} that took no part in the "
        f"choice, its attention on the boxes exceeds its own prior by {span(excess, 4)} (chance 0; "
        f"one-sided pairing permutation of this one head, p = {p_value(p)}{least})."
    )


def _placement(findings: Findings) -> str:
    alike = findings.auroc.n == findings.mass.n
    fewer = "" if alike else f", n = {count(findings.auroc.n)} that it is defined of"
    return (
        f"Of its attention to patches {span(findings.mass)} lies in the boxes, "
        f"{span(findings.enrichment, 2)} times the {number(findings.area.estimate)} of uniform "
        f"attention. Patch AUROC {span(findings.auroc)} (chance 0.5{fewer}); pointing game "
        f"{span(findings.pointing)} (chance {number(findings.pointing_chance)}); "
        f"n = {count(findings.mass.n)}."
    )


def _training(findings: Findings) -> str:
    rows = untrained(findings)
    if not rows:
        return "No untrained tower was swept, so nothing can be said about what training did."
    above = [row for row in rows if sign(row.difference) > 0]
    closest = min(rows, key=lambda row: row.difference.estimate)
    gap = (
        f"the least difference, to {closest.name.removeprefix('untrained tower, ')}, is "
        f"{span(closest.difference, 4)}, paired by picture, n = {count(closest.difference.n)}"
    )
    towers = plural(len(rows), "untrained tower")
    if len(above) < len(rows):
        return (
            f"Against {towers}, each with its own best head, the interval of the difference lies "
            f"above 0 for {count(len(above))} ({gap}): the sweep does not show that training made "
            "the head."
        )
    enough = (
        "training made it so"
        if len(rows) >= TOWERS_NEEDED
        else f"but fewer than {TOWERS_NEEDED} towers are a weak contrast"
    )
    return (
        f"Against {towers}, each with its own best head, the champion's excess is larger in every "
        f"case, all intervals above 0 ({gap}): {enough}."
    )


def _pixels(rows: Sequence[Baseline]) -> str:
    signs = [sign(row.difference) for row in rows]
    best = max(rows, key=lambda row: row.excess.estimate if row.excess else 0)
    assert best.excess is not None
    places = (("lies above", 1), ("lies below", -1), ("is not told apart from", 0))
    found = [f"{said} {count(signs.count(k))}" for said, k in places if k in signs]
    place = found[0].replace(count(len(rows)), "all of them") if len(found) == 1 else listed(found)
    return (
        f"Against {plural(len(rows), 'map')} made from the pixels without a network, the "
        f"champion's excess {place}. The strongest, {best.name}, has {span(best.excess, 4)}; "
        f"champion minus it {span(best.difference, 4)}, n = {count(best.difference.n)}."
    )


def _selectivity(findings: Findings) -> str:
    assert findings.selectivity is not None
    uniform = next(row for row in findings.baselines if row.name == "uniform")
    assert uniform.selectivity is not None and uniform.selectivity_difference is not None
    verdict = {
        1: "it prefers objects to clutter",
        0: "it is not shown to tell objects from clutter",
        -1: "it prefers clutter to objects",
    }[sign(uniform.selectivity_difference)]
    return (
        "Between objects and unannotated clutter it gives the objects "
        f"{span(findings.selectivity)} of its mass; uniform attention "
        f"{number(uniform.selectivity.estimate)}, difference "
        f"{span(uniform.selectivity_difference)}, n = {count(findings.selectivity.n)}: {verdict}."
    )


def _stability(findings: Findings) -> str:
    at = findings.champion.layer, findings.champion.index
    verdict = findings.verdict
    return (
        f"It ranks first in {percent(verdict.p_first[at])} and among the first five in "
        f"{percent(verdict.p_top[at])} of the resamples of discovery. Its excess there was "
        f"{number(float(verdict.discovery.mean[at]), 4)} (shrinkage "
        f"{number(verdict.shrinkage, 4)}). The class token keeps {span(findings.class_mass)} of "
        f"its attention; of that to patches, {span(findings.sink_mass)} falls on sinks."
    )


def removal(ablation: dict[str, Any]) -> list[str]:
    """What removing the champion did: what the kinds of ablation agree on, each of them, and the
    best heads together."""
    rows, champion = ablation["units"], ablation["champion"]
    told = [agreement_said(rows, champion), *champion_said(rows, champion)]
    told.append(sets_said(ablation["sets"]) if ablation["sets"] else None)
    shown = [sentence for sentence in told if sentence]
    return [re.sub(r"(?<![\w.)])-(?=\d)", "−", f"{s[:1].upper()}{s[1:]}.") for s in shown]


def limits(
    results: SweepResults,
    findings: Findings,
    evaluation: dict[str, Any] | None,
    ablation: dict[str, Any] | None,
) -> list[str]:
    """What was not established, from what is present and what the intervals leave open."""
    manifest, towers = results.manifest, untrained(findings)
    judged = findings.verdict.validation[0].n
    found = [
        "Significance means covariation: attention moves with this picture's boxes. It does not "
        "say that the head recognises objects, nor that the model uses it."
    ]
    if ablation is None:
        found.append("Whether the model needs the champion: no ablation stands beside the sweep.")
    elif (unsure := harmless(ablation["units"], ablation["champion"])) is not None:
        found.append(f"That the model needs the champion: {unsure}.")
    if findings.verdict.p[0] > ALPHA:
        found.append("That any head follows the boxes: the champion's test does not reject.")
    if not stands_out(findings):
        found.append("That the champion stands out among all heads: discovery does not show it.")
    if not towers or any(sign(row.difference) <= 0 for row in towers):
        found.append("That training made the champion: see the contrast with untrained towers.")
    elif len(towers) < TOWERS_NEEDED:
        found.append(
            f"That training made the champion: {plural(len(towers), 'untrained tower')} of the "
            f"{TOWERS_NEEDED} that the contrast asks for."
        )
    elif not any(row["own_initialisation"] for row in manifest["untrained"]):
        found.append(
            "What training changed from this run's own start: its initialisation is not among the "
            "untrained towers."
        )
    weak = [row for row in pixel_maps(findings) if sign(row.difference) <= 0]
    if weak:
        found.append(
            "That the champion sees more than low-level contrast: "
            f"{plural(len(weak), 'map')} made from pixels alone "
            f"{'reaches' if len(weak) == 1 else 'reach'} as much, or the interval leaves it open."
        )
    uniform = next(row for row in findings.baselines if row.name == "uniform")
    if uniform.selectivity_difference is not None and sign(uniform.selectivity_difference) <= 0:
        found.append("That the champion tells objects from clutter.")
    if manifest["trained_pictures_allowed"]:
        found.append("Unseen pictures: pictures that the checkpoint was trained on were allowed.")
    if evaluation is None:
        found.append("How well the model retrieves: no evaluation of this checkpoint stands by.")
    seed = manifest["checkpoint"].get("seed")
    found += [
        "Spread over training runs: one checkpoint"
        + ("" if seed is None else f" of one seed ({seed})")
        + f"; every interval is over the {plural(judged, 'validation picture')} alone.",
        "Other readers of the tower: only the "
        f"{attention_of(results)} was scored, not values or the other tokens' attention.",
        f"Any claim on the {plural(manifest['counts']['confirm_set_aside'], 'confirm picture')}: "
        "they were set aside and not looked at.",
    ]
    if str(manifest["checkpoint"].get("commit", "")).endswith("+"):
        found.append("The exact code of the training run: the commit had uncommitted changes.")
    return found
