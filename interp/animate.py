"""`python -m interp.animate`: heads on pictures, as a GIF or as sheets for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from interp.config import AnimateConfig
from interp.heads import Head
from superclip.errors import UserError, check_writable, nearest, replacing, run_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.results import SweepResults

DESCRIPTION = """Draw what a sweep kept: champion and challenger, all heads of a layer, layer after
layer, one head through training. Every caption (value, interval, p, n) is computed from the
results; one colour scale for all frames; boxes are drawn through the geometry that the tower saw
the picture by.

  python -m interp.animate logs/sweep --what layers --image 000000000139
  python -m interp.animate logs --what training    # after interp.sweep --ckpt 'logs/step_*.pt'
"""


def main(argv: list[str]) -> None:
    """Parse, draw, write."""
    from superclip.flags import parse

    config = parse(AnimateConfig, argv, "python -m interp.animate", DESCRIPTION)
    from interp.render.animation import gif
    from interp.report import folder_of, newest_sweep

    folder = config.results or (Path("logs") if config.what == "training" else None)
    folder = folder_of(folder or newest_sweep(Path("logs")))
    if config.what == "sheets":
        write_sheets(config, folder)
        return
    out = config.out or folder / f"{config.what}.gif"
    _refuse_occupied(out, config.overwrite)
    frames = _frames(config, folder)
    content, kept = gif(frames, round(config.largest * 1e6))
    with replacing(out) as partial:
        partial.write_bytes(content)
    said = "" if kept == len(frames) else f" of {len(frames)}: more do not fit --largest"
    print(f"written: {out} ({len(content) / 1e6:.1f} MB, {kept} frames{said})")


def _refuse_occupied(path: Path, overwrite: bool) -> None:
    check_writable(path, "--out")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; --overwrite replaces it, --out FILE writes elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)


def _frames(config: AnimateConfig, folder: Path) -> list[np.ndarray]:
    from interp.analysis import analyse, top_heads
    from interp.render import animation
    from interp.results import SweepResults

    if config.what == "training":
        steps, sweeps = swept_run(folder)
        best = top_heads(sweeps[-1], 2)
        heads = [_head("--head", config.head or str(best[0]), sweeps[-1])]
        if config.challenger is not None:
            heads.append(_head("--challenger", config.challenger, sweeps[-1]))
        return animation.training_frames(steps, sweeps, heads, _picture(sweeps[-1], config.image))
    results = SweepResults.load(folder)
    first = _picture(results, config.image)
    findings = analyse(results)
    if config.what == "duel":
        wanted = config.challenger and _head("--challenger", config.challenger, results)
        rival = animation.challenger_of(findings, wanted or None)
        if rival is None:
            raise UserError("the tower has one head; there is no challenger")
        return animation.frames(results, findings, rival)
    if config.what == "layers":
        return animation.layer_frames(results, findings, range(results.shape[0]), [first])
    layer = findings.champion.layer if config.layer is None else config.layer
    if not 0 <= layer < results.shape[0]:
        raise UserError(f"--layer {layer}: the tower has layers 0 to {results.shape[0] - 1}")
    return animation.layer_frames(results, findings, [layer], range(animation.shown(results)))


def swept_run(folder: Path) -> tuple[list[int], list[SweepResults]]:
    """The sweeps of a run's numbered checkpoints, first to last.

    Raises:
        UserError: if fewer than two were swept.
    """
    from interp.results import SweepResults
    from interp.subject import default_folder
    from superclip.model.weights import resumable, steps_of

    found = [(steps_of(path), default_folder(path)) for path in resumable(folder)]
    found = [(step, at) for step, at in found if (at / "results.json").exists()]
    if len(found) < 2:
        raise UserError(
            f"{folder}: {len(found)} numbered checkpoint(s) are swept, two are needed; run "
            f"python -m interp.sweep --ckpt '{folder}/step_*.pt'"
        )
    return [step for step, _ in found], [SweepResults.load(at) for _, at in found]


def _head(flag: str, name: str, results: SweepResults) -> Head:
    from interp.report import head_of

    head, (layers, heads) = head_of(flag, name), results.shape
    if not (head.layer < layers and head.index < heads):
        raise UserError(f"{flag} {head}: the tower's heads are L0H0 to L{layers - 1}H{heads - 1}")
    return head


def _picture(results: SweepResults, wanted: str | None) -> int:
    """Place in the gallery of the picture asked for, else of the first of validation."""
    rows = results.gallery_rows
    if not len(rows):
        raise UserError("the sweep kept no pictures (--gallery 0); sweep again with some")
    ids = [str(results.image_ids[row]) for row in rows]
    if wanted is not None:
        if wanted not in ids:
            raise UserError(f"--image {wanted} is none that the sweep kept; {nearest(wanted, ids)}")
        return ids.index(wanted)
    judged = np.flatnonzero(results.split[rows] == 1)
    return int(judged[0]) if len(judged) else 0


def write_sheets(config: AnimateConfig, folder: Path) -> None:
    """The gallery of a head, and all heads on one picture, each as PNG and PDF."""
    from interp.analysis import top_heads
    from interp.render.canvas import png
    from interp.render.gallery import boxes, gallery, head_grid
    from interp.results import SweepResults

    results = SweepResults.load(folder)
    head = _head("--head", config.head, results) if config.head else top_heads(results, 1)[0]
    i = _picture(results, config.image)
    maps = results.maps[results.gallery_rows[i]].astype(np.float64)
    drawn: dict[str, Figure] = {
        f"gallery_{head}": gallery(results, head),
        f"heads_{Path(str(results.image_ids[results.gallery_rows[i]])).name}": head_grid(
            results.gallery_pixels[i], boxes(results, i), maps, results.grid
        ),
    }
    out = config.out or folder / "sheets"
    paths = {name: [out / f"{name}.{kind}" for kind in ("png", "pdf")] for name in drawn}
    for path in [path for both in paths.values() for path in both]:
        _refuse_occupied(path, config.overwrite)
    for name, figure in drawn.items():
        for path in paths[name]:
            with replacing(path) as partial:
                if path.suffix == ".png":
                    partial.write_bytes(png(figure))
                else:
                    figure.savefig(partial, format="pdf", metadata={"CreationDate": None})
        print("written: " + ", ".join(map(str, paths[name])))


if __name__ == "__main__":
    run_command(main)
