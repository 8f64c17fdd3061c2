"""Along a run's checkpoints: when grounding appears, in which layer, and when the model begins to
depend on it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from interp.analysis import top_heads
from interp.grounding.metrics import PairScores
from interp.heads import Head
from interp.results import SweepResults
from interp.stats.intervals import (
    first_held,
    influence_values,
    interval_of,
    simultaneous_band,
)
from superclip.errors import UserError

SCHEMA = 1
AGAIN = "run interp.ablate --overwrite"
SHARE = 0.5
"""A curve has set in where it reaches this share of its final value, for good."""


def numbered(pattern: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run that match a pattern, with their optimizer steps, first to last.

    Raises:
        UserError: if fewer than two do.
    """
    from superclip.model.weights import resumable, steps_of

    folder = pattern.parent
    found = [path for path in resumable(folder) if fnmatch(path.name, pattern.name)]
    if not folder.is_dir():
        raise UserError(f"--ckpt {pattern}: there is no folder {folder}")
    if len(found) < 2:
        raise UserError(
            f"--ckpt {pattern} matches {len(found)} of a run's epoch_K.pt and step_N.pt; a course "
            "needs two at least: train with --save-every (and without --keep-last)"
        )
    return [(steps_of(path), path) for path in found]


def refuse_other_course(path: Path, steps: Sequence[int], overwrite: bool) -> None:
    """A course may be taken further, as training goes on; one of other checkpoints stays.

    Raises:
        UserError: if the one that stands there has as many steps, or any that the new one lacks.
    """
    if overwrite or not path.exists():
        return
    try:
        held = set(json.loads(path.read_text())["steps"])
    except (ValueError, LookupError, TypeError):
        held = None
    if held is None or not held < set(steps):
        raise UserError(f"{path} exists; --overwrite replaces it, and all that stands beside it")


def grounding(steps: Sequence[int], sweeps: Sequence[SweepResults], draws: int) -> dict[str, Any]:
    """Courses of the excess on validation, layer by layer and of the last champion.

    `layers`: mean over a layer's heads, which asks nothing of single heads. `champion`: the head
    that discovery chose at the last checkpoint, followed back. `best`: at each checkpoint the head
    that its own discovery chose, whichever it is.

    Raises:
        UserError: if the sweeps are not of the same pictures.
    """
    last = sweeps[-1]
    rows = last.rows("validation")
    stratum = last.stratum[rows].astype(np.int64)
    for step, sweep in zip(steps, sweeps):
        if sweep.manifest["images_sha256"] != last.manifest["images_sha256"]:
            raise UserError(f"step {step} was swept on other pictures than the last; sweep it anew")
    champion = top_heads(last, 1)[0]
    values, best, names = [], [], []
    for sweep in sweeps:
        pairs = PairScores(sweep.maps[rows], sweep.coverage[rows], sweep.valid[rows])
        values.append(influence_values(pairs, stratum))
        head = top_heads(sweep, 1)[0]
        names.append(str(head))
        best.append(values[-1][:, head.layer, head.index])
    by_head = np.stack(values, 1)  # image, checkpoint, layer, head
    curves = {f"L{layer}": by_head[:, :, layer].mean(-1) for layer in range(last.shape[0])}
    curves |= {f"champion {champion}": by_head[:, :, champion.layer, champion.index]}
    curves |= {"best": np.stack(best, 1)}
    untrained = [u["discovery_excess"] for u in last.manifest["untrained"]]
    return {
        "schema": SCHEMA,
        "what": "excess",
        "steps": list(steps),
        "champion": str(champion),
        "best_heads": names,
        "best_untrained_on_discovery": max(untrained) if untrained else None,
        "curves": courses(curves, steps, stratum, 2, draws, last.manifest["seed"]),
    }


def dependence(
    steps: Sequence[int], folders: Sequence[Path], head: Head, kind: str, draws: int, seed: int
) -> dict[str, Any]:
    """Courses of the loss of margin without the champion, and without each unit of all tables.

    Raises:
        UserError: if a checkpoint's ablation is missing, or lacks the head.
    """
    found = [load_effects(folder) for folder in folders]
    shared = set.intersection(
        *({n for n in arrays if n.startswith(f"{kind} ")} for arrays in found)
    )
    if f"{kind} {head}" not in shared:
        raise UserError(f"{kind} ablation of {head} is not there for every checkpoint")
    names = sorted(shared, key=lambda name: (name != f"{kind} {head}", name))
    curves = {name: -np.stack([arrays[name] for arrays in found], 1) for name in names}
    one = np.zeros(len(next(iter(curves.values()))), np.int64)
    return {
        "schema": SCHEMA,
        "what": "loss of margin",
        "steps": list(steps),
        "champion": str(head),
        "curves": courses(curves, steps, one, 1, draws, seed),
    }


def load_effects(folder: Path) -> dict[str, Float[np.ndarray, " image"]]:
    """Change of margin of every image by `KIND UNIT`, from `ablation.npz`.

    Raises:
        UserError: if it is not there, can't be read, or is not that of `ablation.json`.
    """
    try:
        told = json.loads((folder / "ablation.json").read_text()).get("arrays_sha256")
        held = hashlib.sha256((folder / "ablation.npz").read_bytes()).hexdigest()
        if told not in (None, held):  # None: of an older report
            raise UserError(f"{folder}/ablation.npz is not that of ablation.json; {AGAIN}")
        with np.load(folder / "ablation.npz", allow_pickle=False) as file:
            return {name: file[name].astype(np.float64) for name in file.files}
    except UserError:
        raise
    except (OSError, EOFError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}/ablation.npz can't be read ({error}); {AGAIN}") from None


def courses(
    curves: dict[str, Float[np.ndarray, "image checkpoint"]],
    steps: Sequence[int],
    stratum: Int[np.ndarray, " image"],
    lost: int,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Each curve with one simultaneous band over all of them, and its onset.

    `appears`: the first step from which on the band stays above 0; None if it ends at 0.
    `onset`: the first step from which on the curve holds half of its final value, with a bootstrap
    interval over images; None for a curve that does not appear. Steps are those of checkpoints, so
    an onset lies within the interval that ends there.
    """
    at = np.asarray(steps, float)
    band = simultaneous_band(np.stack(list(curves.values()), 1), stratum, lost, draws, seed)
    found = {}
    for k, (name, values) in enumerate(curves.items()):
        low = band.low[k]
        holds = first_held(low > 0)
        appears = None if holds == len(at) else int(at[holds])
        onset = None
        if appears is not None:
            onset = asdict(interval_of(_onset(at), values, stratum, draws, seed))
        found[name] = {
            "estimate": band.estimate[k].tolist(),
            "low": low.tolist(),
            "high": band.high[k].tolist(),
            "n": band.n,
            "appears": appears,
            "onset": onset,
        }
    return found


def _onset(steps: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def onset(means: np.ndarray) -> np.ndarray:
        index = first_held(means >= SHARE * means[..., -1:])
        # A draw whose end is not above 0 has no onset before it.
        return steps[np.where(means[..., -1] > 0, index, len(steps) - 1)]

    return onset


def _at(step: float, steps: Sequence[int]) -> str:
    return f"≤ {step:g}" if step <= steps[0] else f"{step:g}"


def render(course: dict[str, Any], most: int = 12) -> str:
    """A course as text: one line a curve."""
    from superclip.evaluation.tables import aligned

    steps = course["steps"]
    table = [["", *(f"step {step}" for step in steps), "appears", "half of the end from"]]
    for name, curve in list(course["curves"].items())[:most]:
        onset = curve["onset"]
        said = (
            "-"
            if onset is None
            else f"{_at(onset['estimate'], steps)} [{_at(onset['low'], steps)}, "
        )
        said += "" if onset is None else f"{onset['high']:g}]"
        appears = "-" if curve["appears"] is None else _at(curve["appears"], steps)
        table.append([name, *(f"{value:+.4f}" for value in curve["estimate"]), appears, said])
    n = next(iter(course["curves"].values()))["n"]
    return "\n".join(
        [
            f"{course['what']} along training, n = {n} validation pictures:",
            *(f"  {line}" for line in aligned(table, "<" + ">" * (len(steps) + 2))),
            "appears: first step from which on the 95 % band, for all curves and steps at once, is "
            "above 0; the other: bootstrap",
            "over pictures, on the grid of checkpoints; ≤: from the first checkpoint on. Bands of "
            "all cells: in the file.",
        ]
    )
