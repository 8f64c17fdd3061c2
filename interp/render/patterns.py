"""One picture and its attention patterns, in shape to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from interp.collect import Subject, read_batches
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.hooked.cache import TowerCache
from interp.render.gallery import head_grid
from interp.stats.splits import assign_split
from superclip.data.batch import Record, Source
from superclip.data.loader import Preprocess
from superclip.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class Look:
    """One picture as the tower saw it.

    Attributes:
        boxes: xyxy in its pixels. record: its id, captions and categories.
        cache: `cache["pattern", layer]` is `[1, head, query, key]`; query 0 is the class token.
        maps: the class token's attention over patches; sums to 1.
    """

    pixels: UInt8[np.ndarray, "3 s s"]
    boxes: Float[np.ndarray, "k 4"]
    record: Record
    cache: TowerCache
    maps: Float[np.ndarray, "l h p"]
    grid: tuple[int, int]

    def __repr__(self) -> str:
        layers, heads, _ = self.maps.shape
        return (
            f"picture {self.record.key}: {self.record.captions[0]!r}, {len(self.boxes)} boxes; "
            f"{layers} x {heads} heads over {self.grid[0]} x {self.grid[1]} patches"
        )

    def head(self, layer: int, head: int) -> Figure:
        """The picture beside its attention by one head.

        Raises:
            UserError: if the tower has no such head.
        """
        layers, heads, _ = self.maps.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise UserError(
                f"the tower has no {Head(layer, head)}; L0H0 to {Head(layers - 1, heads - 1)}"
            )
        return head_grid(self.pixels, self.boxes, self.maps, self.grid, [Head(layer, head)])

    def heads(self) -> Figure:
        """The picture under every head, a row a layer, on one colour scale."""
        return head_grid(self.pixels, self.boxes, self.maps, self.grid)


@dataclass(frozen=True, eq=False, repr=False)
class Opened:
    """A checkpoint, its tower under TransformerLens's hooks, and pictures to look at."""

    subject: Subject
    tower: HookedVisionTransformer
    source: Source

    def __repr__(self) -> str:
        facts, cfg = self.subject.facts, self.tower.cfg
        rows, columns = cfg.grid
        return (
            f"{facts['loss']} {facts['model']} ({cfg.activation}), sha256 {facts['sha256'][:12]}: "
            f"{cfg.n_layers} x {cfg.n_heads} heads over {rows} x {columns} patches; pictures: "
            f"{self.source.name}"
        )

    @torch.no_grad()
    def look(self, picture: int = 0) -> Look:
        """Send one discovery picture, counted from 0, through the tower.

        Raises:
            UserError: if there are fewer.
        """
        pixels, boxes, record = discovery_picture(self.source, self.subject.preprocess, picture)
        images = self.subject.captioned.normalise(torch.from_numpy(pixels))
        _, cache = self.tower.run_with_cache(images, names_filter=lambda name: "pattern" in name)
        maps = class_maps(cache, self.tower)
        return Look(pixels[0], boxes, record, cache, maps, self.tower.cfg.grid)


def discovery_picture(
    source: Source, preprocess: Preprocess, number: int = 0
) -> tuple[UInt8[np.ndarray, "1 3 s s"], Float[np.ndarray, "k 4"], Record]:
    """Pixels, boxes xyxy in those pixels, and record of a discovery picture, counted from 0.

    Only discovery may be looked at freely: validation judges, confirm is kept for hypotheses.

    Raises:
        UserError: if the source has fewer.
    """
    rows = [row for row, key in enumerate(source.keys) if assign_split(key) == "discovery"]
    if not 0 <= number < len(rows):
        raise UserError(
            f"{source.name} has {len(rows)} discovery pictures, numbered from 0; there is no "
            f"{number}"
        )
    pixels, [record] = next(read_batches(source, preprocess, [rows[number]], 1))
    boxes, _ = preprocess.geometry(record).map_boxes(record.boxes.xywh)
    return pixels, boxes, record


def class_maps(
    cache: TowerCache, tower: HookedVisionTransformer, image: int = 0
) -> Float[np.ndarray, "l h p"]:
    """The class token's attention over patches in every layer and head, renormalised over patches.

    Args:
        cache: holds `pattern` of every layer.
        image: position in the batch.
    """
    prefix, layers = tower.cfg.prefix_tokens, range(tower.cfg.n_layers)
    rows = torch.stack([cache["pattern", layer][image, :, 0, prefix:] for layer in layers])
    return (rows / rows.sum(dim=-1, keepdim=True)).double().cpu().numpy()
