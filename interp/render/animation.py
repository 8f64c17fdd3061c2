"""Heads on pictures as a GIF on one colour scale: a duel, a layer, all layers, along training."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import imageio.v3 as iio
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from interp.analysis import Findings
from interp.grounding.metrics import PairScores
from interp.heads import Head
from interp.render.canvas import LIGHT, place, themed, write
from interp.render.gallery import (
    attention,
    box_area,
    boxes,
    draw_attention,
    draw_picture,
    draw_scale,
    facts,
    mass,
    scale,
    scale_colours,
    scale_words,
    shown,
    top,
    up_to,
)
from interp.render.words import (
    attention_of,
    count,
    evidence,
    number,
    p_value,
    plural,
    span,
    subject,
)
from interp.results import SweepResults
from interp.stats.intervals import excess_interval, head_blocks
from interp.stats.pairing import pairing_test
from superclip.errors import UserError

MILLISECONDS = 1500
"""Every frame stands equally long."""

LARGEST = 5_000_000
_DPI = 100


def challenger_of(findings: Findings, wanted: Head | None = None) -> Head | None:
    """The head set against the champion: the one asked for, else the second of discovery.

    Returns:
        None for a tower of a single head.

    Raises:
        UserError: if the tower has no such head, or it is the champion.
    """
    if wanted is None:
        return findings.verdict.top[1] if len(findings.verdict.top) > 1 else None
    if wanted == findings.champion:
        raise UserError(f"--challenger {wanted} is the champion itself; name another head")
    if str(wanted) not in [row["head"] for row in findings.heads]:
        last = findings.heads[-1]["head"]
        raise UserError(f"--challenger {wanted}: the tower's heads are L0H0 to {last}")
    return wanted


@dataclass(frozen=True, eq=False)
class Panel:
    """Attention of one head on a picture, with words above and below."""

    above: str
    attention: Float[np.ndarray, "rows columns"]
    under: tuple[str, ...]


def still(
    results: SweepResults, i: int, title: str, panels: Sequence[Panel], norm: Normalize
) -> Figure:
    """Gallery picture `i`, and heads on it; at most four in a row, all on one colour scale."""
    across = min(len(panels), 4)
    side, size = (2.6, 8) if across < 3 else (1.95, 6.5)
    name, split = facts(results, i)
    area = number(box_area(results, i))
    beside = (f"{name}, {split}", f"area of the boxes {area}", "(in-box mass of uniform attention)")
    under = [_wrapped(lines, side, size) for lines in (beside, *(p.under for p in panels))]
    deep = side + 0.24 + 0.02 * size * max(text.count("\n") + 1 for text in under)
    rows = -(-len(panels) // across)
    width, left = 0.15 + (across + 1) * (side + 0.15) + 0.68, 0.3 + side
    with themed(LIGHT):
        figure = Figure(figsize=(width, max(0.62 + rows * deep, 0.72 + side + 0.62)))
        write(figure, 0.15, 0.13, title, size=10, weight="bold")
        picture, marked = results.gallery_pixels[i], boxes(results, i)
        draw_picture(place(figure, 0.15, 0.72, side, side), picture, marked)
        write(figure, 0.15, 0.5, f"picture {i + 1} of the gallery", size=9)
        write(figure, 0.15, 0.78 + side, under[0], size=size, linespacing=1.3)
        for k, panel in enumerate(panels):
            x, y = left + k % across * (side + 0.15), 0.72 + k // across * deep
            draw_attention(place(figure, x, y, side, side), picture, marked, panel.attention, norm)
            write(figure, x, y - 0.2, panel.above, size=9, weight="bold")
            write(figure, x, y + side + 0.06, under[k + 1], size=size, linespacing=1.3)
        draw_scale(
            figure, place(figure, width - 0.63, 0.72, 0.1, side), results.maps.shape[-1], norm
        )
        words = scale_words(results.maps.shape[-1])
        write(figure, width - 0.1, 0.32, words, size=7, ha="right", color=LIGHT.muted)
    return figure


def _wrapped(lines: Sequence[str], wide: float, size: float) -> str:
    """Lines of text that keep to `wide` inches in letters of `size` points."""
    letters = int(wide * 134 / size)
    return "\n".join(textwrap.fill(line, letters) for line in lines)


def duel(
    results: SweepResults, findings: Findings, challenger: Head, i: int, norm: Normalize
) -> Figure:
    """Champion and challenger on gallery picture `i`."""
    panels = [
        Panel(f"{role} {head}", attention(results, head, i), _said(results, findings, head, i))
        for role, head in (("champion", findings.champion), ("challenger", challenger))
    ]
    return still(results, i, f"{subject(results)}: {attention_of(results)}", panels, norm)


def _said(results: SweepResults, findings: Findings, head: Head, i: int) -> tuple[str, ...]:
    here = f"in-box mass of this picture {number(mass(results, head, i))}"
    return here, *evidence(findings, head)


def frames(
    results: SweepResults, findings: Findings, challenger: Head, most: int | None = None
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Champion against challenger: one frame a picture, the first `most` of them, all on one
    colour scale."""
    norm = scale(results, [findings.champion, challenger])
    pictures = range(shown(results))[:most]
    return [_pixels(duel(results, findings, challenger, i, norm)) for i in pictures]


def layer_frames(
    results: SweepResults, findings: Findings, layers: Sequence[int], pictures: Sequence[int]
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """All heads of a layer: one frame a layer and picture, all on one colour scale."""
    heads = {layer: [Head(layer, k) for k in range(results.shape[1])] for layer in layers}
    norm = scale(results, [head for own in heads.values() for head in own])
    drawn = []
    for layer, i in itertools.product(layers, pictures):
        panels = [
            Panel(str(head), attention(results, head, i), _said(results, findings, head, i))
            for head in heads[layer]
        ]
        title = f"{subject(results)}: layer {layer}, {attention_of(results)}"
        drawn.append(_pixels(still(results, i, title, panels, norm)))
    return drawn


def training_frames(
    steps: Sequence[int], sweeps: Sequence[SweepResults], heads: Sequence[Head], i: int
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Heads on one picture, one frame a checkpoint, all on one colour scale.

    Raises:
        UserError: if the sweeps did not keep the same pictures.
    """
    for sweep in sweeps:
        if sweep.manifest["images_sha256"] != sweeps[-1].manifest["images_sha256"]:
            raise UserError("the checkpoints were swept on other pictures; sweep them anew")
    kept = [(s, h, k) for s in sweeps for h in heads for k in range(shown(s))]
    norm = up_to([attention(s, h, k).max() for s, h, k in kept])
    drawn = []
    for step, sweep in zip(steps, sweeps):
        rows = sweep.rows("validation")
        stratum, panels = sweep.stratum[rows].astype(np.int64), []
        draws, seed = sweep.manifest["draws"], sweep.manifest["seed"]
        for head in heads:
            maps = sweep.maps[rows, head.layer, head.index].astype(np.float64)[:, None]
            pairs = PairScores(maps, sweep.coverage[rows], sweep.valid[rows])
            excess = excess_interval(head_blocks(pairs, stratum), draws, seed)
            p = float(pairing_test(pairs, stratum, draws, seed).p.ravel()[0])
            told = (
                f"in-box mass of this picture {number(mass(sweep, head, i))}",
                f"validation excess {span(excess, 4)} (interval of this head alone), "
                f"p = {p_value(p)} (this step alone), n = {count(excess.n)}",
            )
            panels.append(Panel(str(head), attention(sweep, head, i), told))
        title = f"{subject(sweep)}: step {count(step)}, {attention_of(sweep)}"
        drawn.append(_pixels(still(sweep, i, title, panels, norm)))
    return drawn


def gif(
    pictures: list[UInt8[np.ndarray, "height width 3"]], largest: int = LARGEST
) -> tuple[bytes, int]:
    """An endless GIF of at most `largest` bytes, and its number of frames: where it would be
    larger, the last ones are left out.

    All frames share one palette of 256 colours, so a colour means the same in each of them; those
    with fewer lines of words have more paper below.
    """
    deepest = max(len(picture) for picture in pictures)
    pictures = [
        np.pad(p, ((0, deepest - len(p)), (0, 0), (0, 0)), constant_values=255) for p in pictures
    ]
    indices, palette = _one_palette(pictures)
    while True:
        encoded = iio.imwrite(
            "<bytes>",
            indices,
            extension=".gif",
            mode="P",
            palette=palette.tobytes(),
            duration=MILLISECONDS,
            loop=0,
        )
        if len(encoded) <= largest or len(indices) == 1:
            return encoded, len(indices)
        fitting = len(indices) * largest // len(encoded)
        indices = indices[: max(1, min(len(indices) - 1, fitting))]


def caption(results: SweepResults, findings: Findings, challenger: Head, kept: int) -> str:
    """What the animation shows, how many of the pictures, and its colour scale."""
    norm = scale(results, [findings.champion, challenger])
    total = len(results.gallery_rows)
    return (
        f"Champion {findings.champion} and challenger {challenger} on the same "
        f"{plural(kept, 'picture')} (of {total} kept by the sweep), {MILLISECONDS / 1000:g} s "
        f"each, on one colour scale from 0 to {top(norm)} of the attention to patches (the median "
        "of the maps' largest; all above is of one colour). Patches are drawn as they are (nearest "
        "neighbour)."
    )


def _pixels(figure: Figure) -> UInt8[np.ndarray, "height width 3"]:
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _one_palette(
    pictures: list[UInt8[np.ndarray, "height width 3"]],
) -> tuple[UInt8[np.ndarray, "frame height width"], UInt8[np.ndarray, "256 3"]]:
    """The frames as indices into 256 colours chosen over all of them, the colour scale among
    them."""
    sample = np.concatenate([picture[::2, ::2] for picture in pictures])
    strip = (255 * scale_colours()).astype(np.uint8)[np.arange(sample.shape[1]) % 256]
    weight = np.broadcast_to(strip, (len(sample) // 10, *strip.shape))
    chosen = Image.fromarray(np.concatenate([sample, weight])).quantize(256)
    indices = np.stack(
        [
            np.asarray(Image.fromarray(p).quantize(palette=chosen, dither=Image.Dither.NONE))
            for p in pictures
        ]
    )
    colours = np.zeros((256, 3), np.uint8)
    found = np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(found)] = found
    colours[indices[0, 0, 0]] = pictures[0][0, 0]  # the paper, exactly
    return indices, colours
