"""Writing the shards that `superclip.data.shards` reads."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superclip.data.batch import Boxes, Record
from superclip.data.geometry import BadPicture, picture_size
from superclip.data.shards import MANIFEST, SCHEMA, refuse_twins, scan
from superclip.errors import UserError

MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def write_shards(
    samples: Iterable[tuple[Record, Sequence[int]]], out: Path, split: str, per_shard: int = 1000
) -> list[dict[str, Any]]:
    """Write `SPLIT-000000.tar`, ... with an index beside each; equal samples give equal bytes.

    Args:
        samples: records in the order they are to be read back, with their captions' public ids.

    Returns:
        One manifest entry a shard.

    Raises:
        UserError: if a picture is of another size than its record says, or a key has a dot.
    """
    from webdataset.writer import TarWriter

    entries = []
    for number, group in itertools.groupby(enumerate(samples), lambda pair: pair[0] // per_shard):
        path, images = out / f"{split}-{number:06d}.tar", []
        with path.open("wb") as file:
            options: dict[str, Any] = {"user": "superclip", "group": "superclip", "mtime": 0}
            with TarWriter(file, encoder=False, compress=False, **options) as tar:
                for _, (record, ids) in group:
                    tar.write(_sample(record, ids))
                    images.append({"key": record.key, "caption_ids": list(ids)})
        index = scan(path)
        index.save(path.with_suffix(".idx"))
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(
            {
                "name": path.name,
                "split": split,
                "pictures": len(index.keys),
                "captions": int(index.captions.sum()),
                "sha256": content,
                "images": images,
            }
        )
    return entries


def write_manifest(
    entries: Sequence[dict[str, Any]], out: Path, tagged_by: str | None = None
) -> None:
    """Write `manifest.json` of a packed set; `tagged_by` names what tagged its captions.

    Raises:
        UserError: if a picture is in it twice.
    """
    refuse_twins([image["key"] for shard in entries for image in shard["images"]], str(out))
    tags = {} if tagged_by is None else {"tagged_by": tagged_by}
    (out / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "shards": list(entries)} | tags))


def _sample(record: Record, caption_ids: Sequence[int]) -> dict[str, Any]:
    """A record as the parts of a WebDataset sample."""
    if re.search(r"[./\s]", record.key):
        raise UserError(
            f"picture id {record.key!r} has a dot, slash or blank; rename it to pack it"
        )
    picture = record.picture
    if isinstance(picture, np.ndarray):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        picture = buffer.getvalue()
    extension = next((e for magic, e in MAGIC.items() if picture.startswith(magic)), None)
    if extension is None:
        raise UserError(
            f"picture {record.key} is neither JPEG, PNG nor WebP; convert it to pack it"
        )
    try:
        size = picture_size(picture)
    except BadPicture as error:
        raise UserError(f"picture {record.key}: {error}; fetch it again") from None
    if size != (record.width, record.height):
        raise UserError(
            f"picture {record.key} is {size[0]}x{size[1]} pixels, its annotations say "
            f"{record.width}x{record.height}; its boxes would not fit"
        )
    facts = {
        "schema": SCHEMA,
        "image_id": record.key,
        "width": record.width,
        "height": record.height,
        "captions": list(record.captions),
        "caption_ids": list(caption_ids),
        "boxes": _written_boxes(record.boxes),
    }
    if record.tags is not None:
        facts["tags"] = record.tags
    if len(record.clutter.xywh):
        facts["clutter"] = _written_boxes(record.clutter)
    return {"__key__": record.key, extension: picture, "json": json.dumps(facts).encode()}


def _written_boxes(boxes: Boxes) -> dict[str, Any]:
    """Boxes as plain values; the shortest decimals that read back as the same float32."""
    return {
        "xywh": [[float(str(v)) for v in box] for box in boxes.xywh],
        "categories": list(boxes.categories),
        "iscrowd": boxes.crowd.astype(int).tolist(),
    }
