"""Several sources behave as one."""

from collections import Counter
from dataclasses import replace

import pytest
from data.photos import NO_WAITS, pack, photo, training_rows

from superclip.data.batch import Source
from superclip.data.loader import StepSampler, train_batches
from superclip.data.order import Order
from superclip.data.scenes import Scenes
from superclip.data.shard_writer import write_manifest, write_shards
from superclip.data.shards import Shards
from superclip.data.sources import Mixture, held_out_spec, open_source, shard_weights
from superclip.errors import UserError


@pytest.fixture
def two(tmp_path):
    """Patterns of two sets of shards with three captions a picture, whose keys are the same."""
    patterns = []
    for name, count, grey in (("a", 25, 0), ("b", 12, 1000)):
        (tmp_path / name).mkdir()
        records = (
            replace(photo(grey + row), row=row, key=f"{row:03d}", captions=("x", "y", f"{grey}"))
            for row in range(count)
        )
        samples = ((record, [0, 0, 0]) for record in records)
        write_manifest(write_shards(samples, tmp_path / name, "train", 10), tmp_path / name)
        patterns.append(f"{tmp_path}/{name}/train-*.tar")
    return patterns


def test_rows_and_captions_run_on_over_the_sources(two):
    a, b = map(Shards, two)
    both = open_source("::".join(two))
    assert isinstance(both, Mixture) and isinstance(both, Source)
    assert (both.num_images, both.num_captions) == (37, 37 * 3)
    assert both.shard_sizes == (10, 10, 5, 10, 2) and both.name == f"{a.name}::{b.name}"
    for row in range(37):
        record, source = both.read(row), (a if row < 25 else b)
        inner = source.read(row % 25)
        assert record.row == row and record.caption_rows == (3 * row, 3 * row + 1, 3 * row + 2)
        assert (record.picture, record.captions) == (inner.picture, inner.captions)
        assert record.key == both.keys[row] and both.where(row) == source.where(row % 25)
    for row in (-1, 37):
        with pytest.raises(IndexError):
            both.read(row)
    assert open_source("::".join(two[::-1])).digest != both.digest


def test_keys_that_occur_twice_get_their_sources_place(two):
    both = open_source("::".join(two))
    assert both.keys[0] == "1:000" and both.keys[25] == "2:000" and len(set(both.keys)) == 37
    apart = Mixture([Shards(two[0]), Scenes("train", 3)])
    assert apart.keys == [*Shards(two[0]).keys, *Scenes("train", 3).keys]


def test_a_pass_holds_each_source_as_often_as_its_weight_says(two):
    both = open_source("::".join(two))
    weights = shard_weights(both, (0.4, 2.5))
    assert weights == (0.4, 0.4, 0.4, 2.5, 2.5)
    order = Order(both.shard_sizes, 0, weights=weights)
    assert order.per_epoch == 10 + 30
    for workers in (0, 2):
        sampler = StepSampler(order, 0, 2 * order.steps_per_epoch(8), 8, 0, 1)
        found = list(train_batches(training_rows(both), sampler, workers, False, 60.0))
        rows = [row for batch, _ in found for row in batch.image_ids.tolist()]
        for half in (rows[:40], rows[40:]):
            counts = Counter(row >= 25 for row in half)
            assert counts == {False: 10, True: 30}
            assert set(Counter(row for row in half if row >= 25).values()) == {2, 3}
    assert set(rows[:40]) != set(rows[40:])


def test_weights_of_one_source():
    scenes = Scenes("train", 20)
    assert shard_weights(scenes, None) is None
    assert shard_weights(scenes, (2.0,)) == (2.0,) * len(scenes.shard_sizes)


def test_what_makes_no_mixture(two, tmp_path):
    with pytest.raises(UserError, match=r"sources 1 and 2 .* are the same data.*--train-data-w"):
        open_source(f"{two[0]}::{two[0]}")
    with pytest.raises(UserError, match=r"5 pictures of .*: not said of which source"):
        open_source("::".join(two), num=5)
    with pytest.raises(UserError, match="missing"):
        open_source(f"{two[0]}::{tmp_path}/none.tar")


def test_held_out_data_is_that_of_the_first_source_that_has_any(two):
    with pytest.raises(UserError, match=r"no source of .* has held-out data; .*--val-data"):
        held_out_spec("::".join(two))
    assert held_out_spec("::".join([*two, "scenes"])) == "scenes:val"
    for trained in ("scenes:val", "scenes:val::scenes", "scenes::scenes:val"):
        with pytest.raises(UserError, match="--val-data"):  # it is trained on
            held_out_spec(trained)
    with pytest.raises(UserError, match=r"nobody knows .*; name data with --val-data"):
        held_out_spec("pipe:cat x.tar")


def test_only_the_rows_in_use_take_the_place_of_others(tmp_path):
    bad = dict.fromkeys(range(0, 10, 2), b"junk")
    rows = training_rows(Shards(pack(tmp_path, 100, 50, bad), NO_WAITS))
    rows.num = 10
    ids = {rows[(epoch, 0, 0)]["image_id"] for epoch in range(40)}
    assert ids == {1, 3, 5, 7, 9}
