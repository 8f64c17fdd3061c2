"""A small sweep made by hand: planted head L1H2, blind others, two untrained towers."""

import numpy as np

from interp.grounding import metrics
from interp.grounding.metrics import PairScores
from interp.results import SweepResults, images_sha256

LAYERS, HEADS, SIDE, PIXELS = 2, 3, 4, 16
PLANTED = (1, 2)


def small_sweep(
    seed: int = 0,
    gallery: int = 3,
    planted: float = 0.3,
    shape: tuple[int, int] = (LAYERS, HEADS),
    side: int = SIDE,
    pixels: int = PIXELS,
    n: int = 72,
) -> SweepResults:
    """Pictures with one box of one patch each; `planted` is the planted head's mass on it."""
    rng = np.random.default_rng(seed)
    p = side * side
    target = rng.integers(0, p, n)
    coverage = np.eye(p, dtype=np.float32)[target]
    maps = rng.dirichlet(np.full(p, 2.0), (n, *shape))
    maps[:, *PLANTED] = planted * coverage + (1 - planted) * maps[:, *PLANTED]
    maps = maps.astype(np.float16)
    valid = np.ones((n, p), np.float32)
    hits = coverage.astype(np.uint8)
    split = (np.arange(n) % 5 >= 3).astype(np.uint8)
    stratum = np.where(np.arange(n) < n // 2, 0, 1).astype(np.int16)
    ids = np.array([f"picture-{i:03d}" for i in range(n)])
    row, column = np.divmod(target[:gallery], side)
    patch = pixels // side
    boxes = np.stack([np.arange(gallery), column, row, column + 1, row + 1], 1).astype(np.float32)
    boxes[:, 1:] *= patch
    untrained = rng.dirichlet(np.full(p, 2.0), (n, 2)).astype(np.float16)
    scores = {
        "in_box_mass": metrics.in_box_mass(maps, coverage, valid),
        "excess": metrics.excess(PairScores(maps, coverage, valid), stratum.astype(np.int64)),
        "patch_auroc": metrics.patch_auroc(maps, coverage, valid),
        "normalised_mass": metrics.normalised_mass(maps, coverage, valid),
        "pointing": metrics.pointing(maps, hits > 0, valid),
    }
    return SweepResults(
        manifest={
            "schema": 1,
            "kind": "class",
            "checkpoint": {
                "sha256": f"{seed:064x}",
                "epoch": 1,
                "model": "tiny <vit>",
                "loss": "superclip",
                "lr": 0.001,
                "seed": 0,
                "trained_on": "scenes",
                "commit": "abc+",
            },
            "tower": {
                "layers": shape[0],
                "heads": shape[1],
                "grid": [side, side],
                "prefix_tokens": 1,
                "image_size": pixels,
                "activation": "GELU",
                "geometry": "crop",
            },
            "data": {"name": "by hand", "sha256": "d" * 64, "clutter": False},
            "split": {"salt": "s", "discovery": 0.5, "validation": 0.3, "confirm": 0.2},
            "counts": {"listed": 90, "confirm_set_aside": 18, "discovery": 44, "validation": 28},
            "strata": 2,
            "boxes": {"boxes": n, "crowd": 0, "lost_to_crop": 0, "mean_share_kept": 1.0},
            "untrained": [
                {"seed": k, "own_initialisation": k == 0, "head": "L0H0", "discovery_excess": 0.0}
                for k in range(2)
            ],
            "categories": ["thing"],
            "saliency": ["contrast"],
            "seed": 0,
            "draws": 199,
            "trained_pictures_allowed": False,
            "images_sha256": images_sha256(ids, coverage),
        },
        maps=maps,
        coverage=coverage,
        valid=valid,
        clutter=np.zeros((n, p), np.float32),
        hits=hits,
        class_mass=np.full((n, *shape), 0.1, np.float32),
        sink_mass=np.full((n, *shape), 0.05, np.float32),
        image_ids=ids,
        split=split,
        stratum=stratum,
        category_image=np.arange(n, dtype=np.int32),
        category_id=np.zeros(n, np.int16),
        category_coverage=coverage.astype(np.float16),
        saliency=rng.random((n, 1, p)).astype(np.float32),
        untrained_maps=untrained,
        untrained_heads=np.zeros((2, 2), np.int16),
        gallery_rows=np.arange(gallery, dtype=np.int32),
        gallery_pixels=rng.integers(0, 256, (gallery, 3, pixels, pixels), dtype=np.uint8),
        gallery_boxes=boxes,
        metrics={name: values.astype(np.float32) for name, values in scores.items()},
    )
