"""`python -m interp.patch`: which heads carry an object, and whether by where they look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.config import PatchConfig
from interp.heads import Head
from superclip.errors import UserError, replacing, run_command
from superclip.progress import progress

if TYPE_CHECKING:
    from interp.causal.pairs import Pair
    from interp.swept import Swept

SCHEMA = 2
FEWEST = 20
"""Pairs that a verdict needs at least."""
SHOWN = 8

DESCRIPTION = """Patch activations between pictures that differ in one object, made of the sweep's
validation pictures: the residual stream, every head's output, its pattern alone (where it looks)
and its values alone (what it finds). Metric: cosine with what is true of the clean picture, less
that of the corrupted picture's text or of the hardest wrong caption. Writes patching.json and
patching.png beside the sweep's results."""


def main(argv: list[str]) -> None:
    """Parse, patch, print, write."""
    from superclip.flags import parse

    config = parse(PatchConfig, argv, "python -m interp.patch", DESCRIPTION)
    report, path = patch_one(config)
    print(render(report))
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


def patch_one(config: PatchConfig) -> tuple[dict[str, Any], Path]:
    """Patch, draw and write one checkpoint's report."""
    from interp.render.canvas import png
    from interp.render.patching import figure
    from interp.swept import asked, claim, open_swept, write_report

    path, picture = claim(config, "patching.json"), claim(config, "patching.png")
    report = patch(open_swept(config), config) | {"asked": asked(config)}
    with replacing(picture) as partial:
        partial.write_bytes(png(figure(report)))
    write_report(path, report)
    return report, path


def make_pairs(swept: Swept, config: PatchConfig) -> tuple[list[Pair], int]:
    """The pairs, and how many pictures (entries of a file) they were sought among.

    Raises:
        UserError: if a file is no list of pairs, or the pictures should be scenes and are none.
    """
    from interp.causal.pairs import box_pairs, given_pairs, scene_pair
    from interp.collect import read_batches
    from superclip.data.scenes import Scenes

    preprocess, source = swept.subject.preprocess, swept.source
    if config.pairs.endswith(".json"):
        pairs = given_pairs(Path(config.pairs), preprocess)[: config.num]
        return pairs, len(pairs)
    rows = swept.rows("validation")[: config.num]
    if config.pairs in ("fill", "swap"):
        ((pictures, records),) = read_batches(source, preprocess, rows, len(rows))
        return box_pairs(records, list(pictures), preprocess, config.pairs == "swap"), len(rows)
    if not isinstance(source, Scenes):
        raise UserError(f"--pairs {config.pairs} redraws generated scenes, not {source.name}")
    return [scene_pair(source, row, config.pairs, preprocess) for row in rows], len(rows)


def patch(swept: Swept, config: PatchConfig) -> dict[str, Any]:
    """Shares of all nodes over the pairs that differ in the metric, with bands and tests.

    Raises:
        UserError: if too few pairs differ, or the clean pictures don't score higher.
    """
    from interp.causal.patching import DIRECTIONS, GROUPS, PARTS
    from interp.stats.intervals import interval_of, mean_interval

    pairs, sought = make_pairs(swept, config)
    found = _measure(swept, pairs, config)
    used = np.abs(found["gap"]) >= config.tau
    if used.sum() < FEWEST:
        raise UserError(
            f"only {used.sum()} of {len(pairs)} pairs differ by --tau {config.tau} in the metric, "
            f"{FEWEST} are needed; give more pictures, other --pairs or a smaller --tau"
        )
    found = {name: values[used] for name, values in found.items()}
    gap, chance = found["gap"], {"draws": config.draws, "seed": config.seed}
    metric = {m: mean_interval(found[m], None, **chance) for m in ("clean", "corrupted", "gap")}
    if metric["gap"].low <= 0:
        raise UserError(
            "clean pictures don't score higher by the metric (gap {estimate:.4f} [{low:.4f}, "
            "{high:.4f}], n = {n}): no shares; try other --pairs".format(**asdict(metric["gap"]))
        )
    report: dict[str, Any] = {"schema": SCHEMA, **swept.tie, "pairs": Path(config.pairs).name}
    report |= {"sought": sought, "made": len(pairs), "below_tau": int((~used).sum())}
    report |= {"tau": config.tau, "n": len(gap), **{m: asdict(i) for m, i in metric.items()}}
    for k, direction in enumerate(DIRECTIONS):
        heads, stream = found["heads"][:, k], found["groups"][:, k].swapaxes(1, 2)
        report[direction] = {
            "heads": _rows(heads, gap, PARTS, chance),
            "stream": _rows(stream, gap, (*GROUPS, "an object patch", "another patch"), chance),
        }
        if swept.tower.cfg.pool_type == "tok":
            both = np.concatenate([stream[:, 0], stream[:, 1]], axis=1)
            entry = interval_of(_handover, both, None, **chance)
            ends = {"low": np.floor(entry.low), "high": np.ceil(entry.high)}
            report[direction]["handover"] = asdict(entry) | ends
    return report


def _measure(swept: Swept, pairs: Sequence[Pair], config: PatchConfig) -> dict[str, np.ndarray]:
    """Fields of `Patched` and the gap; single patches as their means inside and outside objects,
    behind the groups."""
    import torch

    from interp.causal.patching import margin_directions, patch_batch

    def tensor(rows: Iterable[np.ndarray]) -> Any:
        return torch.from_numpy(np.stack([*rows])).to(swept.device)

    tower, normalise = swept.tower, swept.model.normalise
    texts = list(dict.fromkeys(t for p in pairs for t in p.texts_clean + p.texts_corrupted))
    vectors, parts = swept.encoder.texts(swept.model, texts), []
    run = partial(
        patch_batch, every_patch=config.every_patch, max_memory=int(config.max_memory * 2**30)
    )
    for start in progress(range(0, len(pairs), config.batch_size), "patching", unit="batch"):
        some = pairs[start : start + config.batch_size]
        clean = normalise(tensor(p.clean for p in some))
        corrupted = normalise(tensor(p.corrupted for p in some))
        true = tensor(np.isin(texts, p.texts_clean) for p in some)
        false = tensor(np.isin(texts, p.texts_corrupted) for p in some)
        objects = np.stack([p.patches(tower.cfg.patch_size) for p in some])
        with torch.no_grad():
            directions = margin_directions(tower(clean), vectors, true, false)
        of = run(tower, clean, corrupted, tensor(objects), directions)._asdict()
        part = {name: x.double().cpu().numpy() for name, x in of.items()}
        if config.every_patch:
            inside = np.stack([objects, ~objects], axis=-1).astype(float)
            means = part["patches"] @ (inside / inside.sum(1, keepdims=True).clip(1))[:, None]
            part["groups"] = np.concatenate([part["groups"], means], axis=-1)
        parts.append(part | {"gap": part["clean"] - part["corrupted"]})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(
    effects: np.ndarray, gap: np.ndarray, parts: Sequence[str], chance: dict[str, int]
) -> list[dict[str, Any]]:
    """A row a node of effects `[pair, part, layer, head]` or `[pair, part, entry]`."""
    from interp.causal.patching import shares

    band, test = shares(effects, gap, **chance)
    columns = {"estimate": band.estimate, "low": band.low, "high": band.high, "p": test.p_adjusted}
    return [
        {"part": parts[node[0]], "at": str(Head(*node[1:])) if len(node) == 3 else node[1]}
        | {name: float(values[node]) for name, values in columns.items()}
        for node in np.ndindex(band.estimate.shape)
    ]


def _handover(means: np.ndarray) -> np.ndarray:
    """The entry from which on the class token's stream is worth as much as the object patches';
    the number of entries where it is not at the last."""
    from interp.stats.intervals import first_held

    of_class, of_object = np.split(means, 2, axis=-1)
    return first_held(of_class >= of_object).astype(float)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    from pandas import DataFrame

    from interp.render.words import ALPHA, span

    lines = [
        f"{report['pairs']}: {report['made']} pairs of {report['sought']} pictures, less "
        f"{report['below_tau']} below tau {report['tau']}: n = {report['n']}",
        f"metric: clean {span(report['clean'])}, corrupted {span(report['corrupted'])}, gap "
        f"{span(report['gap'])}; below, shares of the gap",
    ]
    for direction in ("denoise", "noise"):
        found = report[direction]
        for title in ("heads", "stream"):
            table = DataFrame(found[title])
            table["share"] = [span(row) + " *"[row["p"] <= ALPHA] for row in found[title]]
            share = table.pivot(index="at", columns="part", values="share")[table["part"].unique()]
            if title == "heads":
                by_share = sorted(found[title], key=lambda row: -row["estimate"])
                share = share.loc[list(dict.fromkeys(row["at"] for row in by_share))[:SHOWN]]
            lines += ["", f"{direction}, {title}", share.rename_axis(None, axis=1).to_string()]
        if "handover" in found:
            never = len({row["at"] for row in found["stream"]})
            sides = (found["handover"][side] for side in ("estimate", "low", "high"))
            entry = "{} [{}, {}]".format(*("never" if s == never else f"{s:g}" for s in sides))
            lines.append(f"the class token is worth the object's patches from entry {entry} on")
    lines.append(
        "\nbands: simultaneous 95 % in a table; *: max-T p <= .05; entry: before that layer"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
