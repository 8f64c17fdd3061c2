"""Attention laid over the pictures that a sweep kept, on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from interp.heads import Head
from interp.render.canvas import LIGHT, Theme, place, themed, write
from interp.render.words import attention_of, count, number, percent, plural, short, subject
from interp.results import SweepResults

MOST = 24
"""Pictures shown at most."""

MAP = "inferno"
OPACITY = 0.65
COLUMNS = 4
_SIDE, _GAP, _BELOW = 0.92, 0.22, 0.44  # inches: a panel, between pairs, the words under a pair


def shown(results: SweepResults) -> int:
    """How many of the kept pictures are drawn."""
    return min(len(results.gallery_rows), MOST)


def attention(results: SweepResults, head: Head, i: int) -> Float[np.ndarray, "rows columns"]:
    """Attention of a head on gallery picture `i`; sums to 1."""
    values = results.maps[results.gallery_rows[i], head.layer, head.index]
    return values.astype(np.float64).reshape(results.grid)


def scale(results: SweepResults, heads: Sequence[Head]) -> Normalize:
    """One colour scale for these heads on the pictures shown: see `up_to`."""
    return up_to([attention(results, h, i).max() for h in heads for i in range(shown(results))])


def up_to(largest: Sequence[float]) -> Normalize:
    """A scale from 0 to the median of the maps' largest values, where half of the maps reach the
    last colour; all that is larger has it too. A scale to the very largest value would leave the
    maps of all other pictures dark wherever one of them is a single bright patch.
    """
    return Normalize(0, float(np.median(largest)), clip=True)


def top(norm: Normalize) -> str:
    """The last colour of a scale, in words: it stands for all that is larger, too."""
    return f"≥ {number(float(norm.vmax or 0))}"


def boxes(results: SweepResults, i: int) -> Float[np.ndarray, "k 4"]:
    """Boxes xyxy of gallery picture `i`, in its pixels."""
    return results.gallery_boxes[results.gallery_boxes[:, 0] == i, 1:]


def facts(results: SweepResults, i: int) -> tuple[str, str]:
    """Public id and split of gallery picture `i`."""
    row = results.gallery_rows[i]
    name = str(results.image_ids[row])
    return name if len(name) <= 24 else "…" + name[-23:], ("discovery", "validation")[
        results.split[row]
    ]


def mass(results: SweepResults, head: Head, i: int) -> float:
    """In-box mass of a head on gallery picture `i`, as the sweep scored it."""
    row = results.gallery_rows[i]
    return float(results.metrics["in_box_mass"][row, head.layer, head.index])


def box_area(results: SweepResults, i: int) -> float:
    """Area of the boxes on gallery picture `i`: the in-box mass of uniform attention."""
    row = results.gallery_rows[i]
    valid = results.valid[row].astype(np.float64)
    return float((valid * results.coverage[row]).sum() / valid.sum())


def draw_picture(
    axes: Axes, pixels: UInt8[np.ndarray, "3 s s"], boxes: Float[np.ndarray, "k 4"]
) -> None:
    """A picture as the tower saw it, with boxes xyxy in its pixels."""
    axes.imshow(pixels.transpose(1, 2, 0), extent=_extent(pixels))
    _finish(axes, pixels, boxes)


def draw_attention(
    axes: Axes,
    pixels: UInt8[np.ndarray, "3 s s"],
    boxes: Float[np.ndarray, "k 4"],
    attention: Float[np.ndarray, "rows columns"],
    norm: Normalize,
) -> None:
    """The picture in grey under attention; a patch is one square of constant colour.

    Grey keeps to the middle half, lest a bright picture be read as more attention.
    """
    grey = np.tensordot([0.299, 0.587, 0.114], pixels, 1)
    axes.imshow(grey, "gray", vmin=-128, vmax=383, extent=_extent(pixels))
    axes.imshow(
        attention, MAP, norm, alpha=OPACITY, extent=_extent(pixels), interpolation="nearest"
    )
    _finish(axes, pixels, boxes)


def _extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    return 0, pixels.shape[-1], pixels.shape[-1], 0


def _finish(axes: Axes, pixels: np.ndarray, boxes: np.ndarray) -> None:
    side = pixels.shape[-1]
    halo = [patheffects.withStroke(linewidth=2.0, foreground="black")]
    for left, top, right, bottom in boxes:
        box = Rectangle((left, top), right - left, bottom - top, fill=False)
        box.set(edgecolor="white", linewidth=0.9, path_effects=halo, joinstyle="miter")
        axes.add_patch(box)
    axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def scale_colours() -> Float[np.ndarray, "256 3"]:
    """The map as it looks over middle grey, which is how the colour bar shows it."""
    colours = matplotlib.colormaps[MAP](np.linspace(0, 1, 256))[:, :3]
    return OPACITY * colours + (1 - OPACITY) * 0.5


def draw_scale(figure: Figure, axes: Axes, patches: int, norm: Normalize) -> None:
    """The colour bar, from 0 to the top of the scale, with a tick at uniform attention."""
    box, (across, down) = axes.get_position(), figure.get_size_inches()
    upright = box.height * down > box.width * across
    shades = ScalarMappable(norm, ListedColormap(scale_colours().tolist()))
    bar = figure.colorbar(shades, axes, orientation="vertical" if upright else "horizontal")
    bar.set_ticks([0, 1 / patches, float(norm.vmax or 1)])
    bar.set_ticklabels(["0", "", top(norm)])
    bar.ax.tick_params(length=3, labelsize=6.5, color=matplotlib.rcParams["text.color"])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def scale_words(patches: int) -> str:
    return f"attention of a patch; tick: uniform {number(1 / patches)}"


def gallery(results: SweepResults, head: Head, theme: Theme = LIGHT) -> Figure:
    """Every picture shown beside the head's attention on it, its in-box mass and its split below.

    With no picture in the results the figure says so.
    """
    total, patches = shown(results), results.maps.shape[-1]
    rows = -(-total // COLUMNS)
    width = COLUMNS * (2 * _SIDE + _GAP) + 0.3 - _GAP
    with themed(theme):
        figure = Figure(figsize=(width, 0.82 + rows * (_SIDE + _BELOW)))
        write(figure, 0.15, 0.12, f"Attention of {head} on the pictures", size=10.5, weight="bold")
        data = short(results.manifest["data"]["name"])
        below = f"{subject(results)}, {data}, {attention_of(results)}"
        write(figure, 0.15, 0.36, below, size=8, color=theme.muted)
        if total == 0:
            write(figure, 0.15, 0.66, caption(results, head), size=8)
            return figure
        norm = scale(results, [head])
        draw_scale(figure, place(figure, width - 2.3, 0.3, 2.0, 0.1), patches, norm)
        write(figure, width - 2.3, 0.14, scale_words(patches), size=6.5, color=theme.muted)
        for i in range(total):
            left = 0.15 + (i % COLUMNS) * (2 * _SIDE + _GAP)
            top = 0.8 + (i // COLUMNS) * (_SIDE + _BELOW)
            picture, marked = results.gallery_pixels[i], boxes(results, i)
            draw_picture(place(figure, left, top, _SIDE, _SIDE), picture, marked)
            over = place(figure, left + _SIDE, top, _SIDE, _SIDE)
            draw_attention(over, picture, marked, attention(results, head, i), norm)
            name, split = facts(results, i)
            inside, area = number(mass(results, head, i)), number(box_area(results, i))
            write(figure, left, top + _SIDE + 0.05, f"in-box mass {inside}, area {area}", size=7)
            under = f"{split}, {name}"
            write(figure, left, top + _SIDE + 0.19, under, size=6, color=theme.muted)
    return figure


def head_grid(
    pixels: UInt8[np.ndarray, "3 s s"],
    boxes: Float[np.ndarray, "k 4"],
    maps: Float[np.ndarray, "l h p"],
    grid: tuple[int, int],
    heads: Sequence[Head] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """One picture under every head, a row a layer, or under the heads given, in one row; all on one
    colour scale.

    Args:
        maps: attention over the patches `grid`, which sums to 1.
    """
    layers, across = maps.shape[:2]
    rows = [[Head(i, j) for j in range(across)] for i in range(layers)]
    rows = rows if heads is None else [list(heads)]
    norm = up_to([float(maps[h.layer, h.index].max()) for row in rows for h in row])
    side, patches = 1.1 if heads is None else 2.2, maps.shape[2]
    width = max(len(rows[0]) * (side + 0.08) + 0.3 + side, 4.2)
    with themed(theme):
        figure = Figure(figsize=(width, 0.75 + len(rows) * (side + 0.22)))
        write(figure, 0.15, 0.1, scale_words(patches), size=7, color=theme.muted)
        draw_scale(figure, place(figure, 0.15, 0.26, 2.0, 0.1), patches, norm)
        draw_picture(place(figure, 0.15, 0.82, side, side), pixels, boxes)
        for i, row in enumerate(rows):
            for j, head in enumerate(row):
                left, top = 0.23 + side + j * (side + 0.08), 0.82 + i * (side + 0.22)
                write(figure, left, top - 0.15, str(head), size=7.5)
                attention = maps[head.layer, head.index].reshape(grid)
                over = place(figure, left, top, side, side)
                draw_attention(over, pixels, boxes, attention, norm)
    return figure


def caption(results: SweepResults, head: Head) -> str:
    """What the gallery shows, its colour scale and how its pictures were come by."""
    total = shown(results)
    if total == 0:
        return f"No pictures of {head}: the sweep kept none (--gallery 0)."
    last = top(scale(results, [head]))
    first = np.array_equal(results.gallery_rows[:total], np.arange(total))
    chosen = "the first" if first else "a choice"
    return (
        f"Attention of {head} on {count(total)} pictures, {chosen} of the "
        f"{plural(len(results.image_ids), 'scored picture')} in the data's order, not picked by "
        "score. Each pair: pixels as the tower saw them with their boxes, then the same in grey "
        f"under the attention, patches drawn as they are (nearest neighbour, {percent(OPACITY)} "
        f"opaque). One colour scale for all, 0 to {last} of the attention to patches (the median "
        "of the pictures' largest; all above is of one colour). In-box mass is this picture's; "
        "area is what uniform attention would have."
    )
