"""Training from `pipe:` commands and http(s), which can only be read from the front: webdataset
opens them (http by the command `curl`)."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import tarfile_samples

from superclip.data.batch import Batch
from superclip.data.geometry import BadPicture
from superclip.data.loader import PairMaker, cause_of, collate
from superclip.data.order import draw
from superclip.data.patience import Watch, begin_reader, start_readers
from superclip.data.shards import PICTURE_PARTS, BrokenFacts, make_record
from superclip.errors import UserError

BUFFER = 1000
"""Encoded samples that one reader holds back to mix them."""
BROKEN = 64
"""Unreadable samples or shards, one after the other, from which on the run stops."""


class Stream:
    """Shards that are read from the front and never indexed.

    Less is promised than of other data. Every reader draws shards with replacement (seeded by run,
    rank, reader and first step) and mixes a buffer of their samples: the same number of ranks and
    readers gives the same samples while the shards answer alike, another number gives others, and
    so does a run that goes on from a checkpoint. An epoch is `num` samples, not a pass. Image and
    caption ids are running numbers, so a loss with a table per sample has no use for them.

    Args:
        spec: `pipe:COMMAND` or URLs with braces; several joined by `::`.
        num: pictures in one epoch.

    Raises:
        UserError: without `num`, or if the braces don't match.
    """

    promises = (
        "a stream: shards come at random and with replacement, ids are running numbers, and a "
        "resumed run goes on with other samples"
    )

    def __init__(self, spec: str, num: int | None):
        if num is None:
            raise UserError(
                f"--train-data {spec!r} is a stream of unknown length; say with "
                "--train-num-samples N how many pictures make an epoch"
            )
        try:
            self.urls = [url for part in spec.split("::") for url in braceexpand(part)]
        except ValueError:
            raise UserError(f"--train-data {spec!r} has unbalanced braces") from None
        self.name, self.num_images, self.num_captions = spec, num, num
        self.digest = hashlib.sha256(json.dumps([self.urls, num]).encode()).hexdigest()


@dataclass(eq=False)
class _Steps(IterableDataset[tuple[Batch, Counter[str]]]):
    """This rank's batches; reader w of W makes every W-th of them."""

    stream: Stream
    make: PairMaker
    seed: int
    rows: int
    rank: int
    ranks: int
    start: int
    watch: Watch

    def __iter__(self) -> Iterator[tuple[Batch, Counter[str]]]:
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        rng = random.Random(f"{self.seed} {self.rank} {reader} {self.start}")
        causes: list[str] = []
        mixed = shuffle(BUFFER, rng=rng)(self._samples(rng, causes))
        for step in count(self.start + reader, readers):
            first, pairs = (step * self.ranks + self.rank) * self.rows, []
            while len(pairs) < self.rows:
                pair = self._pair(next(mixed), first + len(pairs), causes)
                if pair is not None:
                    pairs.append(pair | {"causes": causes[:]})
                    causes.clear()
            self.watch.note(-1)
            yield collate(pairs)

    def _samples(self, rng: random.Random, causes: list[str]) -> Iterator[dict[str, Any]]:
        """Encoded samples without end; a shard that breaks off is counted and left."""

        def counted(error: Exception) -> bool:
            causes.append(cause_of(error))
            return True

        while True:
            number, before = rng.randrange(len(self.stream.urls)), len(causes)
            self.watch.note(number)
            sample = None
            for sample in tarfile_samples([{"url": self.stream.urls[number]}], handler=counted):
                yield sample
                self.watch.note(number)
            if sample is None and len(causes) == before:
                causes.append("EmptyShard")
            if len(causes) >= BROKEN:
                raise UserError(
                    f"{len(causes)} samples or shards of {self.stream.name!r} in a row can't be "
                    f"read, the last for {causes[-1]}; see what its first shard holds"
                )

    def _pair(
        self, sample: dict[str, Any], number: int, causes: list[str]
    ) -> dict[str, Any] | None:
        """The training pair with this running number; None for a sample that is broken."""
        key, where = sample["__key__"], f"{sample['__url__']}: {sample['__key__']}"
        document, text = sample.get("json", b""), sample.get("txt", b"")
        try:
            picture = next((sample[e] for e in PICTURE_PARTS if e in sample), b"")
            record = make_record(number, key, picture, document, text, number, where)
            if not record.captions:
                raise BrokenFacts(f"{where}: no caption")
            pair = self.make(record, lambda purpose: draw(self.seed, 0, number, purpose))
        except BadPicture as error:
            causes.append(cause_of(error))
            return None
        return pair | {"caption_id": number}


def stream_batches(
    stream: Stream,
    make: PairMaker,
    seed: int,
    rows: int,
    rank: int,
    ranks: int,
    start: int,
    total: int,
    workers: int,
    pin: bool,
    timeout: float,
) -> Iterator[tuple[Batch, Counter[str]]]:
    """This rank's batches of steps `start` to `total`; see `loader.train_batches`.

    Raises:
        UserError: if no shard gives a sample, a reader hangs, or dies.
    """
    watch = Watch(workers, timeout, stream.urls.__getitem__)
    steps = _Steps(stream, make, seed, rows, rank, ranks, start, watch)
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        worker_init_fn=begin_reader if workers else None,
    )
    return watch.over(islice(start_readers(loader), total - start))
