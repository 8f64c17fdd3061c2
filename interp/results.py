"""The results of a sweep: one `.npz` and one JSON manifest. Every table, p-value and figure comes
from them.

Nothing in them tells the clock, the machine or a path, so two runs of one sweep give identical
bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, Int, Int16, Int32, UInt8

from superclip.errors import UserError, replace_text, replacing

SCHEMA = 1
MANIFEST = {"schema", "kind", "checkpoint", "tower", "data", "split", "counts", "untrained"}
MANIFEST |= {"categories", "saliency", "seed", "draws", "images_sha256"}
METRICS = ("in_box_mass", "excess", "patch_auroc", "normalised_mass", "pointing")


@dataclass(frozen=True)
class SweepResults:
    """What one checkpoint did on one set of pictures; n pictures, l layers, h heads, p patches.

    Attributes:
        manifest: plain values: `schema`, `kind`, `checkpoint`, `tower`, `data`, `split`, `counts`,
            `untrained`, `categories`, `saliency`, `seed`, `draws`, `images_sha256`.
        maps: attention over patches, renormalised over patches.
        coverage, valid: as `interp.grounding.coverage` defines them.
        clutter: coverage by unannotated clutter (scenes; zero elsewhere).
        hits: 1 where the pointing game counts the patch.
        class_mass: attention that stays on the class token. sink_mass: share of the patch attention
            on sinks.
        image_ids: public ids. split: 0 discovery, 1 validation. stratum: label, -1 in none.
        category_image, category_id, category_coverage: coverage by category, one row per (image,
            category).
        saliency: low-level maps of the pixels, one per name in the manifest.
        untrained_maps: maps of each untrained tower's best head of discovery; untrained_heads: that
            head.
        metrics: per-image scores, one array per name of `METRICS` (and `legacy_mass` where asked
            for).
        gallery_rows: rows whose pixels are kept; gallery_pixels: uint8 pictures as the tower saw
            them;
            gallery_boxes: `[m, 5]`, position in the gallery and xyxy in those pixels.
    """

    manifest: dict[str, Any]
    maps: Float16[np.ndarray, "n l h p"]
    coverage: Float32[np.ndarray, "n p"]
    valid: Float32[np.ndarray, "n p"]
    clutter: Float32[np.ndarray, "n p"]
    hits: UInt8[np.ndarray, "n p"]
    class_mass: Float32[np.ndarray, "n l h"]
    sink_mass: Float32[np.ndarray, "n l h"]
    image_ids: np.ndarray
    split: UInt8[np.ndarray, " n"]
    stratum: Int16[np.ndarray, " n"]
    category_image: Int32[np.ndarray, " m"]
    category_id: Int16[np.ndarray, " m"]
    category_coverage: Float16[np.ndarray, "m p"]
    saliency: Float32[np.ndarray, "n s p"]
    untrained_maps: Float16[np.ndarray, "n u p"]
    untrained_heads: Int16[np.ndarray, "u 2"]
    gallery_rows: Int32[np.ndarray, " g"]
    gallery_pixels: UInt8[np.ndarray, "g 3 px px"]
    gallery_boxes: Float32[np.ndarray, "k 5"]
    metrics: dict[str, Float32[np.ndarray, "n l h"]]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return self.maps.shape[1], self.maps.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        return tuple(self.manifest["tower"]["grid"])

    def rows(self, split: str) -> Int[np.ndarray, " k"]:
        """Rows of `discovery` or `validation` that take part in tests."""
        return np.flatnonzero(
            (self.split == ("discovery", "validation").index(split)) & (self.stratum >= 0)
        )

    def strata(self, split: str) -> Int[np.ndarray, " n"]:
        """Stratum labels within one split, -1 elsewhere."""
        wanted = self.split == ("discovery", "validation").index(split)
        return np.where(wanted, self.stratum, -1).astype(np.int64)

    def save(self, folder: Path) -> None:
        """Write `results.npz` and `results.json`, each whole or not at all; the latter with a hash
        over both, so that an edit by hand is told when they are opened."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        manifest, metrics = arrays.pop("manifest"), arrays.pop("metrics")
        arrays |= {f"metric_{name}": values for name, values in metrics.items()}
        with replacing(folder / "results.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        signed = manifest | {"content_sha256": _content_sha256(manifest, arrays)}
        text = json.dumps(signed, indent=1, sort_keys=True) + "\n"
        replace_text(folder / "results.json", text)

    @staticmethod
    def load(folder: Path) -> SweepResults:
        """Open a sweep's folder.

        Raises:
            UserError: if it holds no results, damaged ones, or those of another schema.
        """
        for name in ("results.json", "results.npz"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no {name}; run python -m interp.sweep first (--ckpt FILE)"
                )
        try:
            manifest = json.loads((folder / "results.json").read_text())
            if not isinstance(manifest, dict):
                raise ValueError("results.json is no object")
            if manifest.get("schema") != SCHEMA:
                raise UserError(
                    f"{folder}: results of schema {manifest.get('schema')}; this version reads "
                    f"schema {SCHEMA}"
                )
            with np.load(folder / "results.npz", allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{folder}: the results can't be read ({error}); run the sweep again"
            ) from None
        if lacking := MANIFEST - set(manifest):
            raise UserError(
                f"{folder}/results.json lacks {', '.join(sorted(lacking))}; run the sweep again"
            )
        signed = manifest.pop("content_sha256", None)  # absent from older sweeps
        edited = signed is not None and signed != _content_sha256(manifest, arrays)
        metrics = {
            name.removeprefix("metric_"): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("metric_")
        }
        if not _whole(arrays, metrics):
            raise UserError(f"{folder}: arrays are missing, cut or not finite; run the sweep again")
        tied = images_sha256(arrays["image_ids"], arrays["coverage"])
        if manifest.get("images_sha256") != tied:
            raise UserError(
                f"{folder}: results.npz is of other pictures than results.json; run the sweep again"
            )
        if edited:
            raise UserError(
                f"{folder}: the files were edited since the sweep (their hash says so); "
                "run the sweep again"
            )
        results = SweepResults(manifest=manifest, metrics=metrics, **arrays)
        for split in ("discovery", "validation"):
            if not len(results.rows(split)):
                raise UserError(f"{folder}: no picture is of {split}; run the sweep again")
        return results


def _content_sha256(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _whole(arrays: Mapping[str, np.ndarray], metrics: Mapping[str, np.ndarray]) -> bool:
    """Whether every array is there, of the sizes that its annotation names, and finite; a metric
    may be undefined (NaN) for a picture, as normalised mass where objects cover all."""
    types = {f.name: f.type for f in dataclasses.fields(SweepResults)}
    if set(arrays) != set(types) - {"manifest", "metrics"}:
        return False
    if any(a.dtype.kind == "f" and np.isnan(a).any() for a in arrays.values()):
        return False
    sizes: dict[str, int] = {}
    named = [(str(types[name]), array) for name, array in arrays.items()]
    named += [(str(types["metrics"]), array) for array in metrics.values()]
    for annotation, array in named:
        found = re.search(r"'([\w ]+)'", annotation)
        axes = found[1].split() if found else ["n"]  # the ids
        if array.ndim != len(axes):
            return False
        for axis, size in zip(axes, array.shape):
            if (int(axis) if axis.isdigit() else sizes.setdefault(axis, size)) != size:
                return False
        if array.dtype.kind == "f" and np.isinf(array).any():
            return False
    return True


def images_sha256(image_ids: np.ndarray, coverage: np.ndarray) -> str:
    """Ties sibling files (ablation banks) to the pictures and boxes of a sweep."""
    digest = hashlib.sha256("\n".join(image_ids.tolist()).encode())
    digest.update(np.ascontiguousarray(coverage, np.float32).tobytes())
    return digest.hexdigest()
