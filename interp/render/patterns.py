"""One picture and its attention patterns, in shape to be drawn: what the notebook calls."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8

from interp.collect import read_batches
from interp.hooked import HookedVisionTransformer
from interp.hooked.cache import TowerCache
from interp.stats.splits import assign_split
from superclip.data.batch import Record, Source
from superclip.data.loader import Preprocess
from superclip.errors import UserError


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
