"""One forward pass per picture scores every head: from a checkpoint and a data source to
`SweepResults`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interp.config import Kind, SweepConfig
from interp.grounding import baselines, metrics
from interp.grounding.coverage import (
    MIN_KEPT,
    category_coverage,
    centre_rule,
    patch_coverage,
    pointing_hits,
)
from interp.grounding.metrics import PairScores
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.results import METRICS, SCHEMA, SweepResults, images_sha256
from interp.stats.selection import champion
from interp.stats.splits import SALT, assign_split, strata_by_split
from superclip.data.batch import Record, Source
from superclip.data.geometry import render
from superclip.data.loader import EvalRows, Preprocess
from superclip.errors import UserError
from superclip.model.factory import build_clip
from superclip.model.superclip import SuperCLIP
from superclip.model.weights import state_sha256
from superclip.progress import progress

SALIENCY = {
    "mean colour distance": baselines.mean_colour_distance,
    "colour distance": baselines.colour_distance,
    "patch contrast": baselines.patch_contrast,
}
JUDGED = "discovery", "validation"
FEWEST = 20
"""Pictures that each of them needs at least."""


@dataclass(frozen=True)
class Subject:
    """A trained tower and everything a sweep must know of it.

    Attributes:
        facts: plain values for the manifest (`sha256`, `epoch`, `model`, `loss`, `activation`,
            ...).
        own_init: hash of the run's initial weights, where the run was trained from scratch.
        seed, init_scale: of that initialisation.
        captioned: the whole model, for commands that need texts.
    """

    captioned: SuperCLIP
    model_config: dict[str, Any]
    preprocess: Preprocess
    facts: dict[str, Any]
    own_init: str | None = None
    seed: int = 0
    init_scale: float | None = None


def collect(
    subject: Subject,
    source: Source,
    rows: Sequence[int],
    trained_on: frozenset[str],
    config: SweepConfig,
    device: torch.device,
) -> SweepResults:
    """Sweep the pictures `rows` of a source.

    Pictures of the confirm split are never read. Left out and counted: pictures the model was
    trained on, near duplicates, and pictures without an object after the crop.

    Args:
        trained_on: public ids of the training pictures.

    Raises:
        UserError: if too few pictures remain in discovery or validation.
    """
    keys = source.keys
    counts: Counter[str] = Counter(listed=len(rows), without_object=0, near_duplicates=0)
    scorable = [row for row in rows if assign_split(keys[row]) != "confirm"]
    wanted = [row for row in scorable if keys[row] not in trained_on]
    counts["confirm_set_aside"] = len(rows) - len(scorable)
    counts["trained_on"] = len(scorable) - len(wanted)
    _refuse_few(source, Counter(assign_split(keys[row]) for row in wanted), counts, trained_on)
    collector = _Collector(subject, config, device)
    for pixels, found in usable_batches(
        source, subject.preprocess, wanted, config.batch_size, counts, "sweep"
    ):
        collector.add(pixels, found)
    names = [assign_split(r.key) for r in collector.records]
    _refuse_few(source, Counter(names), counts, trained_on)
    counts.update({name: names.count(name) for name in JUDGED})
    return _results(collector, source, names, counts)


def usable_batches(
    source: Source,
    preprocess: Preprocess,
    rows: Sequence[int],
    batch_size: int,
    counts: Counter[str],
    title: str,
) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """`read_batches` without pictures that have no object after the crop, and without copies of
    earlier ones; both are counted."""
    seen: set[bytes] = set()
    batches = read_batches(source, preprocess, rows, batch_size)
    for pixels, records in progress(batches, title, -(-len(rows) // batch_size), unit="batch"):
        fresh = []
        for position, (picture, record) in enumerate(zip(pixels, records)):
            if not _has_target(record, preprocess):
                counts["without_object"] += 1
            elif (mark := _picture_hash(picture)) in seen:
                counts["near_duplicates"] += 1
            else:
                seen.add(mark)
                fresh.append(position)
        if fresh:
            yield pixels[fresh], [records[i] for i in fresh]


def _refuse_few(
    source: Source, held: Counter[str], counts: Counter[str], trained_on: frozenset[str]
) -> None:
    """Raises UserError if discovery or validation has too few pictures; names the least --num of
    this source that may do, where one does."""
    short = next((name for name in JUDGED if held[name] < FEWEST), None)
    if short is None:
        return
    fresh = [assign_split(key) if key not in trained_on else "" for key in source.keys]
    at = [[k for k, split in enumerate(fresh, 1) if split == name] for name in JUDGED]
    enough = all(len(rows) >= FEWEST for rows in at)
    least = max(rows[FEWEST - 1] for rows in at) if enough else 0
    way_out = f"--num {least} or more" if least > counts["listed"] else "give more pictures"
    told = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sorted(counts.items()))
    raise UserError(
        f"{source.name}: only {held[short]} pictures for {short}, {FEWEST} are needed ({told}); "
        f"{way_out}"
    )


def read_batches(
    source: Source, preprocess: Preprocess, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """uint8 pictures `[b, 3, s, s]` and their records, in the order of `rows`."""
    pictures = EvalRows(source, preprocess, rows)
    for start in range(0, len(rows), batch_size):
        items = [pictures[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield np.stack([pixels for pixels, _ in items]), [record for _, record in items]


class _Collector:
    """Towers in, per-image arrays out, batch by batch."""

    def __init__(self, subject: Subject, config: SweepConfig, device: torch.device):
        self.subject, self.config, self.device = subject, config, device
        self.model = subject.captioned.to(device).eval()
        self.tower = HookedVisionTransformer(self.model.clip.visual)
        self.untrained, self.untrained_facts = _untrained_towers(subject, config.untrained, device)
        self.records: list[Record] = []
        self.gallery: list[np.ndarray] = []
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, pixels: np.ndarray, records: list[Record]) -> None:
        """Score one batch with every tower."""
        maps, class_mass, sink = self._attention(self.tower, pixels)
        self._put(maps=maps, class_mass=class_mass, sink_mass=sink)
        for k, tower in enumerate(self.untrained):
            self._put(**{f"untrained_{k}": self._attention(tower, pixels)[0]})
        grid = self.tower.cfg.grid
        self._put(saliency=np.stack([[f(p, grid) for f in SALIENCY.values()] for p in pixels]))
        if self.config.metric == "legacy-mass":
            self._put(legacy=self._legacy(records))
        self.gallery += list(pixels[: max(0, self.config.gallery - len(self.gallery))])
        self.records += [dataclasses.replace(r, picture=b"") for r in records]

    def array(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts[name])

    def _put(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._parts.setdefault(name, []).append(array)

    def _attention(self, tower: HookedVisionTransformer, pixels: np.ndarray):
        images = self.model.normalise(torch.from_numpy(pixels).to(self.device))
        return attention_maps(tower, images, self.config.kind)

    def _legacy(self, records: list[Record]) -> np.ndarray:
        """The small study's mass: squashed pictures, union of boxes, centre-in-box."""
        squash = dataclasses.replace(self.subject.preprocess, mode="squash")
        pixels = np.stack([render(r.picture, squash.geometry(r)) for r in records])
        boxes = [squash.geometry(r).map_boxes(r.boxes.xywh)[0] for r in records]
        centres = np.stack([centre_rule(b, squash.size, self.tower.cfg.grid) for b in boxes])
        return metrics.legacy_mass(self._attention(self.tower, pixels)[0], centres)


@torch.no_grad()
def attention_maps(
    tower: HookedVisionTransformer, images: Tensor, kind: Kind
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps renormalised over patches, class-token mass and sink share of one batch.

    Returns:
        float16 `[b, l, h, p]`, float32 `[b, l, h]`, float32 `[b, l, h]`.
    """
    found = tower.class_attention(images) if kind == "class" else tower.patch_attention(images)
    prefix = tower.cfg.prefix_tokens
    class_mass = found.rows[..., :prefix].sum(-1)
    patches = found.rows[..., prefix:]
    maps = patches / patches.sum(-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    to_host = (maps.half(), class_mass.float(), found.sink.float())
    return tuple(t.cpu().numpy() for t in to_host)  # pyright: ignore[reportReturnType]


def _results(
    found: _Collector, source: Source, names: Sequence[str], counts: Counter[str]
) -> SweepResults:
    """Boxes on the grid, strata, scores and the manifest."""
    subject, config, tower, records = found.subject, found.config, found.tower, found.records
    preprocess, grid = subject.preprocess, tower.cfg.grid
    ids = np.array([r.key for r in records])
    on_grid = [boxes_on_grid(r, preprocess, grid) for r in records]
    coverage, valid, clutter, hits = (
        np.stack([b[k] for b in on_grid]).astype(np.float32) for k in range(4)
    )
    geometries = [preprocess.geometry(r) for r in records]
    alike = exchangeable(records, preprocess, grid, coverage, valid)
    stratum = strata_by_split(names, *alike)
    counts["in_no_stratum"] = int((stratum < 0).sum())
    split = np.array([("discovery", "validation").index(n) for n in names], np.uint8)
    maps = found.array("maps")
    scores = _scores(maps, coverage, valid, hits, stratum)
    if config.metric == "legacy-mass":
        scores["legacy_mass"] = found.array("legacy").astype(np.float32)
    chooses = np.where(split == 0, stratum, -1)
    best = []
    for k, facts in enumerate(found.untrained_facts):
        head, own, mean = _best_head(found.array(f"untrained_{k}"), coverage, valid, chooses)
        facts |= {"head": str(head), "discovery_excess": mean}
        best.append((head, own))
    categories = sorted({c for r in records for c in r.boxes.categories})
    by_category = [
        (i, categories.index(name), share)
        for i, r in enumerate(records)
        for name, share in _categories_on_grid(r, preprocess, grid).items()
    ]
    gallery_boxes = [
        (i, *xyxy)
        for i, r in enumerate(records[: len(found.gallery)])
        for xyxy in geometries[i].map_boxes(r.boxes.xywh[~r.boxes.crowd])[0]
    ]
    n, p, s = len(ids), grid[0] * grid[1], preprocess.size
    manifest = {
        "schema": SCHEMA,
        "kind": config.kind,
        "checkpoint": subject.facts,
        "tower": {
            "layers": tower.cfg.n_layers,
            "heads": tower.cfg.n_heads,
            "grid": list(grid),
            "prefix_tokens": tower.cfg.prefix_tokens,
            "image_size": s,
            "activation": tower.cfg.activation,
            "geometry": preprocess.mode,
        },
        "data": {
            "name": source.name,
            "sha256": source.digest,
            "num": config.num,
            "clutter": bool(clutter.any()),
        },
        "split": {"salt": SALT, "discovery": 0.5, "validation": 0.3, "confirm": 0.2},
        "counts": dict(sorted(counts.items())),
        "strata": int(stratum.max()) + 1,
        "boxes": _box_counts(records, preprocess),
        "untrained": found.untrained_facts,
        "categories": categories,
        "saliency": list(SALIENCY),
        "seed": config.seed,
        "draws": config.draws,
        "trained_pictures_allowed": config.allow_trained,
        "images_sha256": images_sha256(ids, coverage),
    }
    return SweepResults(
        manifest=manifest,
        maps=maps,
        coverage=coverage,
        valid=valid,
        clutter=clutter,
        hits=hits.astype(np.uint8),
        class_mass=found.array("class_mass"),
        sink_mass=found.array("sink_mass"),
        image_ids=ids,
        split=split,
        stratum=stratum.astype(np.int16),
        category_image=np.array([row for row, _, _ in by_category], np.int32),
        category_id=np.array([c for _, c, _ in by_category], np.int16),
        category_coverage=np.array([x for _, _, x in by_category], np.float16).reshape(-1, p),
        saliency=found.array("saliency").astype(np.float32),
        untrained_maps=np.stack([own for _, own in best], 1) if best else np.zeros((n, 0, p), "f2"),
        untrained_heads=np.array([(h.layer, h.index) for h, _ in best], np.int16).reshape(-1, 2),
        gallery_rows=np.arange(len(found.gallery), dtype=np.int32),
        gallery_pixels=np.stack(found.gallery) if found.gallery else np.zeros((0, 3, s, s), "u1"),
        gallery_boxes=np.array(gallery_boxes, np.float32).reshape(-1, 5),
        metrics=scores,
    )


def _scores(
    maps: np.ndarray, coverage: np.ndarray, valid: np.ndarray, hits: np.ndarray, stratum: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of every image and head, from the maps as stored."""
    found = {
        "in_box_mass": metrics.in_box_mass(maps, coverage, valid),
        "excess": metrics.excess(PairScores(maps, coverage, valid), stratum),
        "patch_auroc": metrics.patch_auroc(maps, coverage, valid),
        "normalised_mass": metrics.normalised_mass(maps, coverage, valid),
        "pointing": metrics.pointing(maps, hits > 0, valid),
    }
    assert tuple(found) == METRICS
    return {name: values.astype(np.float32) for name, values in found.items()}


def _best_head(
    maps: np.ndarray, coverage: np.ndarray, valid: np.ndarray, chooses: np.ndarray
) -> tuple[Head, np.ndarray, float]:
    """An untrained tower's champion by the same rule, its maps and its discovery excess."""
    rows = chooses >= 0
    mean = metrics.excess(PairScores(maps, coverage, valid), chooses)[rows].mean(axis=0)
    head = champion(mean)
    return head, maps[:, head.layer, head.index], float(mean[head.layer, head.index])


def _untrained_towers(
    subject: Subject, count: int, device: torch.device
) -> tuple[list[HookedVisionTransformer], list[dict[str, Any]]]:
    """The run's own initialisation, where it can be rebuilt, and towers of further seeds."""
    towers, facts = [], []
    for k in range(count):
        own = k == 0 and subject.own_init is not None
        seed = subject.seed if own else 10_000 + k
        clip = build_clip(subject.model_config, seed, subject.init_scale)
        verified = own and state_sha256(clip.state_dict()) == subject.own_init
        facts.append({"seed": seed, "own_initialisation": bool(verified)})
        towers.append(HookedVisionTransformer(clip.visual.to(device).eval()))
    return towers, facts


def _has_target(record: Record, preprocess: Preprocess) -> bool:
    _, kept = preprocess.geometry(record).map_boxes(record.boxes.xywh)
    return bool(((kept >= MIN_KEPT) & ~record.boxes.crowd).any())


def exchangeable(
    records: Sequence[Record],
    preprocess: Preprocess,
    grid: tuple[int, int],
    coverage: np.ndarray,
    valid: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int, list[tuple[int, ...]] | None]:
    """What `strata` are made of: object area, orientation, fewest pictures, and the padding in
    whole patches where pictures are padded."""
    patch, padding = preprocess.size / grid[0], None
    if preprocess.mode == "pad":
        edges = [preprocess.geometry(r).valid for r in records]
        padding = [tuple(round(edge / patch) for edge in valid) for valid in edges]
    portrait = np.array([r.height > r.width for r in records])
    return metrics.area(coverage, valid), portrait, 10, padding


def boxes_on_grid(
    record: Record, preprocess: Preprocess, grid: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """Coverage, valid, clutter coverage and pointing hits of one picture."""
    geometry, size = preprocess.geometry(record), preprocess.size
    xyxy, kept = geometry.map_boxes(record.boxes.xywh)
    crowd = record.boxes.crowd
    coverage, valid = patch_coverage(xyxy, crowd, kept, size, grid, geometry.valid)
    other, other_kept = geometry.map_boxes(record.clutter.xywh)
    clutter, _ = patch_coverage(other, record.clutter.crowd, other_kept, size, grid, geometry.valid)
    return coverage, valid, clutter, pointing_hits(xyxy, crowd, kept, size, grid)


def _categories_on_grid(
    record: Record, preprocess: Preprocess, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    geometry, boxes = preprocess.geometry(record), record.boxes
    xyxy, kept = geometry.map_boxes(boxes.xywh)
    return category_coverage(
        xyxy, boxes.crowd, kept, boxes.categories, preprocess.size, grid, geometry.valid
    )


def _box_counts(records: Sequence[Record], preprocess: Preprocess) -> dict[str, float]:
    """How many boxes, how many are regions to ignore, and what the crop took."""
    kept = np.concatenate([preprocess.geometry(r).map_boxes(r.boxes.xywh)[1] for r in records])
    crowd = np.concatenate([r.boxes.crowd for r in records])
    return {
        "boxes": len(kept),
        "crowd": int(crowd.sum()),
        "lost_to_crop": int(((kept < 0.25) & ~crowd).sum()),
        "mean_share_kept": round(float(kept.mean()), 4),
    }


def _picture_hash(pixels: np.ndarray) -> bytes:
    """Difference hash of a 17 x 16 luminance thumbnail; equal for copies and for re-encoded
    copies."""
    grey = (
        Image.fromarray(pixels.transpose(1, 2, 0))
        .convert("L")
        .resize((17, 16), Image.Resampling.BOX)
    )
    values = np.asarray(grey, np.int16)
    return hashlib.sha256(np.packbits(values[:, 1:] > values[:, :-1]).tobytes()).digest()
