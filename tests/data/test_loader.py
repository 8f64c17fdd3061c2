import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest

from superclip.data.batch import Record
from superclip.data.colour import Colours
from superclip.data.geometry import BadPicture
from superclip.data.loader import (
    PairMaker,
    Preprocess,
    StepSampler,
    TrainRows,
    limited,
    train_batches,
)
from superclip.data.order import Order, Purpose, draw
from superclip.data.scenes import Scenes
from superclip.errors import UserError

PREPROCESS = Preprocess(48, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def tokenize(text):
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.int32).astype(np.int64)


def digest_of_steps(rows, order, ranks, workers, steps, epoch=1):
    """One hash a step of the global batch, whatever its cut over ranks and workers."""
    per_rank = 12 // ranks
    parts = []
    for rank in range(ranks):
        start = epoch * order.steps_per_epoch(12)
        sampler = StepSampler(order, start, start + steps, per_rank, rank, ranks)
        batches = train_batches(rows, sampler, workers, False, 60)
        parts.append([b for b, _ in batches])
    found = []
    for step in zip(*parts):
        whole = [
            np.concatenate([getattr(b, name).numpy() for b in step])
            for name in ("images", "tokens", "image_ids", "caption_ids")
        ]
        found.append(hashlib.sha256(b"".join(w.tobytes() for w in whole)).hexdigest())
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batches_do_not_depend_on_ranks_and_workers(ranks, workers):
    source = Scenes("train", 60)
    rows = TrainRows(source, PairMaker(PREPROCESS, tokenize, (0.5, 1.0)), 3)
    order = Order(source.shard_sizes, 3)
    expected = digest_of_steps(rows, order, 1, 0, 3)
    assert len(set(expected)) == 3
    assert digest_of_steps(rows, order, ranks, workers, 3) == expected


def test_a_run_can_be_entered_at_any_step():
    source = Scenes("train", 60)
    rows = TrainRows(source, PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)
    order = Order(source.shard_sizes, 0)
    whole = [b for b, _ in train_batches(rows, StepSampler(order, 0, 12, 12, 0, 1), 0, False, 60)]
    rest = [b for b, _ in train_batches(rows, StepSampler(order, 3, 12, 12, 0, 1), 0, False, 60)]
    assert len(whole) == 12 and len(rest) == 9
    for a, b in zip(whole[3:], rest):
        assert (a.images == b.images).all() and (a.tokens == b.tokens).all()


def test_readers_live_as_long_as_the_run_and_read_ahead_across_epochs():
    rows = Noted(Scenes("train", 24), PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)
    sampler = StepSampler(Order(rows.source.shard_sizes, 0), 0, 10, 12, 0, 1)
    readers = [set(b.image_ids.tolist()) for b, _ in train_batches(rows, sampler, 2, False, 60)]
    assert len(readers) == 10 and len(set.union(*readers)) == 2


class Noted(TrainRows):
    """Training rows whose picture id is the process that read them."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"image_id": os.getpid()}


def test_copies_of_a_picture_differ_in_caption_and_crop():
    rows = TrainRows(Captioned("train", 40), PairMaker(PREPROCESS, tokenize, (0.3, 1.0)), 0)
    pairs = [rows[(0, 3, copy)] for copy in range(6)]
    assert {p["image_id"] for p in pairs} == {3}
    assert len({p["image"].tobytes() for p in pairs}) == 6
    assert len({p["tokens"].tobytes() for p in pairs}) > 1
    assert (rows[(0, 3, 2)]["image"] == pairs[2]["image"]).all()


class Captioned(Scenes):
    """Scenes with four captions each."""

    def read(self, row):
        record = super().read(row)
        texts = tuple(f"{record.captions[0]} {k}" for k in range(4))
        return replace(record, captions=texts, caption_rows=tuple(range(4 * row, 4 * row + 4)))


class Damaged:
    """Scenes of which some rows can't be read."""

    def __init__(self, bad):
        self.inner, self.bad = Scenes("train", 40), bad

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, row) -> Record:
        if row in self.bad:
            raise BadPicture(f"row {row}")
        return self.inner.read(row)


def test_unreadable_picture_is_replaced_with_its_ids_and_counted():
    rows = TrainRows(Damaged({5}), PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)  # pyright: ignore
    pair = rows[(0, 5, 0)]
    assert pair["image_id"] != 5 and len(pair["causes"]) == 1
    other = rows[(0, pair["image_id"], 0)]
    assert (pair["image"] == other["image"]).all() and (pair["tokens"] == other["tokens"]).all()
    assert rows[(0, 5, 0)]["image_id"] == pair["image_id"], (
        "the substitute is a function of the row"
    )
    assert rows[(0, 6, 0)]["image_id"] == 6


def test_data_without_a_readable_picture_stops():
    rows = TrainRows(Damaged(set(range(40))), PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)  # pyright: ignore
    with pytest.raises(UserError, match="substitutes can't be read"):
        rows[(0, 5, 0)]


def test_limited_cuts_the_last_shard():
    assert limited((4, 4, 4), 6, "x") == (4, 2)
    with pytest.raises(UserError, match="only 12 pictures"):
        limited((4, 4, 4), 13, "x")


def test_colours_change_as_torchvision_changes_them_and_are_counted_draws():
    source, strength = Scenes("train", 60), (0.32, 0.32, 0.32, 0.08)
    plain = TrainRows(source, PairMaker(PREPROCESS, tokenize, (1.0, 1.0)), 0)

    def rows(*how):
        make = PairMaker(PREPROCESS, tokenize, (1.0, 1.0), colours=Colours(*how))
        return TrainRows(source, make, 0)

    def changed(found):
        pictures = [(plain[0, r, 0]["image"], found[0, r, 0]["image"]) for r in range(60)]
        return pictures, sum((a != b).any() for a, b in pictures)

    assert changed(rows(strength, 0.0, 0.0))[1] == 0
    pictures, count = changed(rows(strength, 0.8, 0.0))
    assert 38 <= count <= 58  # of 60, 48 expected, SD 3.1
    again = rows(strength, 0.8, 0.0)
    assert all((again[0, r, 0]["image"] == b).all() for r, (_, b) in enumerate(pictures))
    grey, count = changed(rows(None, 0.8, 1.0))
    assert count == 60 and all((b[0] == b[1]).all() and (b[0] == b[2]).all() for _, b in grey)
    # One strength alone is the factor of one named change, drawn within its range.
    bright, count = changed(rows((0.5, 0.0, 0.0, 0.0), 1.0, 0.0))
    assert count >= 57
    for row, (a, b) in enumerate(bright):
        rng = draw(0, 0, row, Purpose.COLOUR)
        rng.random(2), rng.permutation(4)
        factor = 1 + 0.5 * rng.uniform(-1, 1, 4)[0]
        assert np.abs(np.minimum(a * factor, 255.0) - b).max() <= 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_changed_colours_do_not_depend_on_ranks_and_workers(ranks):
    source, colours = Scenes("train", 60), Colours((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    rows = TrainRows(source, PairMaker(PREPROCESS, tokenize, (1.0, 1.0), colours=colours), 3)
    order = Order(source.shard_sizes, 3)
    assert digest_of_steps(rows, order, ranks, 2, 3) == digest_of_steps(rows, order, 1, 0, 3)
