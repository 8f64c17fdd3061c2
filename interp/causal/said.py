"""What removals say, as sentences, from the rows of `interp.causal.findings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from interp.stats.multiplicity import ALPHA
from superclip.evaluation.tables import shown

Rows = Sequence[dict[str, Any]]


def change(row: dict[str, Any]) -> int:
    """-1 where the margin falls without the unit, 1 where it rises, by p and band both; else 0."""
    margin = row["margin"]
    sure = row["p_adjusted"] <= ALPHA and not margin["low"] <= 0 <= margin["high"]
    return int(np.sign(margin["estimate"])) if sure else 0


def champion_said(rows: Rows, head: str) -> list[str]:
    """What the model loses without the champion, one plain sentence a kind."""
    lines = []
    for row in (row for row in rows if row["unit"] == head):
        margin = row["margin"]
        if row["p_adjusted"] > ALPHA:
            said = "is not shown to change the margin"
        elif not (way := change(row)):
            said = "is not shown to change the margin (p is below .05, but the band holds 0)"
        else:
            said = "costs margin" if way < 0 else "raises the margin"
        place = f"rank {row['rank']} of {row['of']} removed heads by loss of margin"
        if row["layer_of"] > 1:
            place += f", {row['layer_rank']} of {row['layer_of']} in its layer"
        lines.append(
            f"{row['kind']} ablation of the champion {head} (n = {margin['n']}): removing it "
            f"{said} ({place}): {_interval(margin)} (band over all removed heads), adjusted p "
            f"{shown(row['p_adjusted'])}; image-to-text R@1 "
            f"{_interval(row['measures']['i2t@1'], 100, 1)} points (interval of this row alone)"
        )
    return lines


def harmless(rows: Rows, head: str) -> str | None:
    """Kinds of ablation under which removing the champion is not shown to cost margin; None where
    there are none."""
    own = [row for row in rows if row["unit"] == head]
    kinds = [row["kind"] for row in own if change(row) >= 0]
    if not kinds:
        return None
    of = "no" if len(kinds) == len(own) else f"not every ({', '.join(kinds)})"
    return f"{of} ablation of it is shown to cost margin"


def agreement_said(rows: Rows, head: str) -> str | None:
    """What the kinds of ablation agree on about the champion; None where there are not two."""
    own = [row for row in rows if row["unit"] == head]
    if len(own) < 2:
        return None
    ways, ranks = [change(row) for row in own], sorted({row["rank"] for row in own})
    kinds = " and ".join([", ".join(row["kind"] for row in own[:-1]), own[-1]["kind"]])
    told = (
        (-1, "costs margin"),
        (1, "raises the margin"),
        (0, "is not shown to change the margin"),
    )
    if len(set(ways)) == 1:
        found = f"{kinds} ablation agree: removing {head} {dict(told)[ways[0]]}"
    else:
        parts = [
            f"it {said} under {', '.join(row['kind'] for row, w in zip(own, ways) if w == way)}"
            for way, said in told
            if way in ways
        ]
        found = f"{kinds} ablation do not agree on removing {head}: {'; '.join(parts)}"
    places = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{found}; by loss of margin it ranks {places} of {own[0]['of']} removed heads"


def sets_said(sets: dict[str, Any]) -> str:
    """The best heads together beside random sets of as many, by margin and by R@1."""
    told = []
    for name, called, scale, digits in (("margin", "margin", 1, 4), ("i2t@1", "R@1", 100, 1)):
        found = sets[name]
        least, most = (scale * end(found["random"]) for end in (min, max))
        told.append(
            f"{called} {_interval(found['top'], scale, digits)}{' points' * (scale > 1)}, number "
            f"{found['rank']} of {found['of']} by loss of {called} (random: {least:+.{digits}f} to "
            f"{most:+.{digits}f})"
        )
    own = sets["margin"]
    return (
        f"the {sets['size']} best heads of discovery together ({', '.join(sets['top'])}), mean "
        f"ablation, n = {own['top']['n']}, beside {len(own['random'])} random sets of as many: "
        f"{'; '.join(told)}"
    )


def _interval(of: dict[str, float], scale: int = 1, digits: int = 4) -> str:
    values = (of[k] * scale for k in ("estimate", "low", "high"))
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*values, d=digits)
