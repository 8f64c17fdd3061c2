"""Small real JPEGs with one caption each, in shards; shared by the tests of readers."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from superclip.data.batch import Record
from superclip.data.loader import PairMaker, Preprocess, StepSampler, TrainRows, train_batches
from superclip.data.order import Order
from superclip.data.shard_writer import write_shards
from superclip.data.shards import Shards

SIDE = 16
PREPROCESS = Preprocess(SIDE, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NO_WAITS = (0.0, 0.0)


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def photo(row: int) -> Record:
    return Record(row, f"id{row:04d}", SIDE, SIDE, jpeg(row), (f"picture {row}",), (row,))


def pack(out: Path, count: int, per_shard: int, bad: dict[int, bytes] | None = None) -> str:
    """Shards of `count` pictures, those in `bad` overwritten by other bytes; their pattern."""
    write_shards(((photo(row), [row]) for row in range(count)), out, "train", per_shard)
    source = Shards(f"{out}/train-*.tar")
    for row, data in (bad or {}).items():
        shard, local = source._place(row)
        offset, length = source._indices[shard].picture[local].tolist()
        with source._paths[shard].open("r+b") as file:
            file.seek(offset)
            file.write(data[:length].ljust(length, b"\0"))
    for path in source._paths:
        path.with_suffix(".idx").unlink()
    return f"{out}/train-*.tar"


def tokenize(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.int32).astype(np.int64)


def training_rows(source) -> TrainRows:
    return TrainRows(source, PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)


def one_pass(source, workers: int, batch: int = 10, rank: int = 0, ranks: int = 1, timeout=60.0):
    """Batches and causes of one pass over a source."""
    order = Order(source.shard_sizes, 0)
    total = order.steps_per_epoch(batch * ranks)
    sampler = StepSampler(order, 0, total, batch, rank, ranks)
    return train_batches(training_rows(source), sampler, workers, False, timeout)


def assert_true_to_ids(batch) -> None:
    """Every picture and caption is the one that its id names."""
    for row, image, tokens in zip(batch.image_ids.tolist(), batch.images, batch.tokens):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(row))))
        assert (image.numpy() == np.moveaxis(pixels, 2, 0)).all(), row
        assert (tokens.numpy() == tokenize(f"picture {row}")).all()
