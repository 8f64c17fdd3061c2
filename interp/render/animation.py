"""Champion against challenger, picture by picture, as a GIF on one colour scale."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from interp.analysis import Findings
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
)
from interp.render.words import attention_of, evidence, number, plural, subject
from interp.results import SweepResults
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


def frame(
    results: SweepResults, findings: Findings, challenger: Head, i: int, norm: Normalize
) -> Figure:
    """Gallery picture `i`, and the attention of both heads on it."""
    name, split = facts(results, i)
    patches = results.maps.shape[-1]
    with themed(LIGHT):
        figure = Figure(figsize=(8.9, 3.95))
        title = f"{subject(results)}: {attention_of(results)}"
        write(figure, 0.15, 0.13, title, size=10, weight="bold")
        panels = [place(figure, 0.15 + k * 2.75, 0.72, 2.6, 2.6) for k in range(3)]
        picture, marked = results.gallery_pixels[i], boxes(results, i)
        draw_picture(panels[0], picture, marked)
        words = [
            (
                f"picture {i + 1} of the gallery",
                f"{name}, {split}",
                f"area of the boxes {number(box_area(results, i))}",
                "(the in-box mass of uniform attention)",
            )
        ]
        for k, (role, head) in enumerate(
            (("champion", findings.champion), ("challenger", challenger)), start=1
        ):
            draw_attention(panels[k], picture, marked, attention(results, head, i), norm)
            here = f"in-box mass of this picture {number(mass(results, head, i))}"
            words.append((f"{role} {head}", here, *evidence(findings, head)))
        for k, (above, *under) in enumerate(words):
            write(figure, 0.15 + k * 2.75, 0.5, above, size=9, weight="bold" if k else "normal")
            write(figure, 0.15 + k * 2.75, 3.38, "\n".join(under), size=8, linespacing=1.35)
        draw_scale(figure, place(figure, 8.35, 0.72, 0.1, 2.6), patches, norm)
        write(figure, 8.75, 0.16, scale_words(patches), size=7, ha="right", color=LIGHT.muted)
    return figure


def frames(
    results: SweepResults, findings: Findings, challenger: Head
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """One frame a picture of the gallery, all on one colour scale."""
    norm = scale(results, [findings.champion, challenger])
    return [_pixels(frame(results, findings, challenger, i, norm)) for i in range(shown(results))]


def gif(
    pictures: list[UInt8[np.ndarray, "height width 3"]], largest: int = LARGEST
) -> tuple[bytes, int]:
    """An endless GIF of at most `largest` bytes, and its number of frames: where it would be
    larger, the last ones are left out.

    All frames share one palette of 256 colours, so a colour means the same in each of them.
    """
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
        f"each, on one colour scale from 0 to {number(float(norm.vmax or 0))} of the attention to "
        "patches. Patches are drawn as they are (nearest neighbour)."
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
