import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superclip.data.loader import StepSampler
from superclip.data.order import Order, Purpose, draw
from superclip.errors import UserError

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=9)


def rows_of(order, epoch, step, batch):
    return order.rows(epoch, step, batch)[0]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 12), block=st.integers(1, 4), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_at_most_once_whatever_the_step_asked_first(
    sizes, batch, block, epoch
):
    if batch > sum(sizes):
        return
    order = Order(tuple(sizes), 7, block)
    steps = order.steps_per_epoch(batch)
    backwards = [rows_of(order, epoch, s, batch) for s in reversed(range(steps))][::-1]
    rows = np.concatenate(backwards)
    assert len(np.unique(rows)) == len(rows) == steps * batch
    assert rows.min() >= 0 and rows.max() < sum(sizes)
    fresh = Order(tuple(sizes), 7, block)
    assert np.array_equal(
        rows, np.concatenate([rows_of(fresh, epoch, s, batch) for s in range(steps)])
    )


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, data=st.data(), epoch=st.integers(0, 3), block=st.integers(1, 4))
def test_a_pass_holds_every_picture_as_often_as_its_weight_says(sizes, data, epoch, block):
    weight = st.floats(0.05, 3.5)
    weights = tuple(data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes))))
    order = pickle.loads(pickle.dumps(Order(tuple(sizes), 3, block, weights)))
    counts = [int(w) * n + round((w - int(w)) * n) for w, n in zip(weights, sizes)]
    assert order.per_epoch == sum(counts) and order.num_rows == sum(sizes)
    if not sum(counts):
        return
    rows, copies = order.rows(epoch, 0, sum(counts))
    assert len(set(zip(rows, copies))) == len(rows), "no picture twice as the same copy"
    shards = np.searchsorted(order.starts, rows, side="right") - 1
    assert np.bincount(shards, minlength=len(sizes)).tolist() == counts
    for shard, (w, n) in enumerate(zip(weights, sizes)):
        held = np.bincount(rows[shards == shard] - order.starts[shard], minlength=n)
        assert set(held) <= {int(w), int(w) + 1}
        assert copies[shards == shard].max(initial=0) <= int(w)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES.filter(lambda sizes: sum(sizes) > 5), ranks=st.sampled_from([1, 2, 3, 6]))
def test_a_weight_of_one_changes_nothing_and_ranks_only_slice(sizes, ranks):
    plain, ones = Order(tuple(sizes), 5), Order(tuple(sizes), 5, weights=(1.0,) * len(sizes))
    total = 3 * (sum(sizes) // 6)
    for a, b in zip(StepSampler(plain, 0, total, 6, 0, 1), StepSampler(ones, 0, total, 6, 0, 1)):
        assert a == b and all(copy == 0 for _, _, copy in a)
    halves = Order(tuple(sizes), 5, weights=(2.5,) * len(sizes))
    total = 2 * halves.steps_per_epoch(6)
    whole = list(StepSampler(halves, 1, total, 6, 0, 1))
    cut = [list(StepSampler(halves, 1, total, 6 // ranks, rank, ranks)) for rank in range(ranks)]
    joined = [[key for part in step for key in part] for step in zip(*cut)]
    assert joined == whole and len(whole) == total - 1


def test_the_random_part_is_another_one_in_every_pass():
    order = Order((100,), 0, weights=(0.5,))
    first, second = (set(rows_of(order, epoch, 0, 50)) for epoch in (0, 1))
    assert len(first) == len(second) == 50 and 10 < len(first & second) < 40


def test_global_batch_does_not_depend_on_how_it_is_cut():
    order = Order((50, 50), 0)
    whole = rows_of(order, 0, 0, 60)
    assert np.array_equal(whole, np.concatenate([rows_of(order, 0, s, 12) for s in range(5)]))


def test_reading_stays_within_a_block_of_shards():
    order = Order((10,) * 40, 0, block_shards=4)
    assert len(np.unique(rows_of(order, 0, 0, 40) // 10)) == 4


class Counted(Order):
    """An order that counts the shards it lays out and the blocks it permutes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.plans = self.blocks = 0

    def _plan_of(self, epoch):
        self.plans += 1
        return super()._plan_of(epoch)

    def _block_of(self, epoch, block):
        self.blocks += 1
        return super()._block_of(epoch, block)


@pytest.mark.parametrize("start", [0, 1, 100_000, 100_124])
def test_the_first_step_costs_the_same_wherever_it_lies(start):
    order = Counted((1000,) * 16, 0)
    next(iter(StepSampler(order, start, 200_000, 128, 0, 1)))
    assert (order.plans, order.blocks) == (1, 1)


def test_the_steps_of_the_run_go_on_across_epochs():
    order = Order((10, 7), 0)
    steps = list(StepSampler(order, 0, 11, 4, 0, 1))
    assert [epoch for step in steps for epoch, _, _ in step] == [0] * 16 + [1] * 16 + [2] * 12
    assert list(StepSampler(order, 6, 11, 4, 0, 1)) == steps[6:]
    assert [row for _, row, _ in steps[5]] == rows_of(order, 1, 1, 4).tolist()


def test_epochs_and_seeds_differ():
    order, other = Order((100,), 0), Order((100,), 1)
    assert not np.array_equal(rows_of(order, 0, 0, 50), rows_of(order, 1, 0, 50))
    assert not np.array_equal(rows_of(order, 0, 0, 50), rows_of(other, 0, 0, 50))


def test_draws_are_counted():
    a = draw(3, 1, 5, Purpose.CROP).random(4)
    draw(3, 1, 6, Purpose.CROP).random(1000)
    assert np.array_equal(a, draw(3, 1, 5, Purpose.CROP, copy=0).random(4))
    others = [draw(4, 1, 5, Purpose.CROP), draw(3, 2, 5, Purpose.CROP), draw(3, 1, 6, Purpose.CROP)]
    others += [draw(3, 1, 5, Purpose.CAPTION), draw(3, 1, 5, Purpose.CROP, copy=1)]
    assert all(not np.array_equal(a, rng.random(4)) for rng in others)


def test_draws_stay_what_they_were():
    """A resumed run must go on with the same pictures under a later version."""
    assert draw(3, 1, 5, Purpose.CROP).integers(1 << 32, size=3).tolist() == [
        3547508689,
        3310888956,
        2695177095,
    ]
    assert rows_of(Order((3, 4), 9), 1, 0, 7).tolist() == [3, 6, 0, 4, 1, 2, 5]


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="larger than the data"):
        Order((10,), 0).steps_per_epoch(11)
    with pytest.raises(UserError, match=r"larger than the data \(5 pictures a pass\)"):
        Order((10,), 0, weights=(0.5,)).steps_per_epoch(6)
