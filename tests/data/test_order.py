import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superclip.data.order import Order, Purpose, draw
from superclip.errors import UserError


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    batch=st.integers(1, 12),
    block=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_visits_every_row_at_most_once_whatever_the_step_asked_first(
    sizes, batch, block, epoch
):
    if batch > sum(sizes):
        return
    order = Order(tuple(sizes), 7, block)
    steps = order.steps_per_epoch(batch)
    backwards = [order.rows(epoch, s, batch) for s in reversed(range(steps))][::-1]
    rows = np.concatenate(backwards)
    assert len(np.unique(rows)) == len(rows) == steps * batch
    assert rows.min() >= 0 and rows.max() < sum(sizes)
    fresh = Order(tuple(sizes), 7, block)
    assert np.array_equal(rows, np.concatenate([fresh.rows(epoch, s, batch) for s in range(steps)]))


def test_global_batch_does_not_depend_on_how_it_is_cut():
    order = Order((50, 50), 0)
    whole = order.rows(0, 0, 60)
    assert np.array_equal(whole, np.concatenate([order.rows(0, s, 12) for s in range(5)]))


def test_reading_stays_within_a_block_of_shards():
    order = Order((10,) * 40, 0, block_shards=4)
    shards = order.rows(0, 0, 40) // 10
    assert len(np.unique(shards)) == 4


def test_epochs_and_seeds_differ():
    order, other = Order((100,), 0), Order((100,), 1)
    assert not np.array_equal(order.rows(0, 0, 50), order.rows(1, 0, 50))
    assert not np.array_equal(order.rows(0, 0, 50), other.rows(0, 0, 50))


def test_draws_are_counted():
    a = draw(3, 1, 5, Purpose.CROP).random(4)
    draw(3, 1, 6, Purpose.CROP).random(1000)
    assert np.array_equal(a, draw(3, 1, 5, Purpose.CROP).random(4))
    others = [draw(4, 1, 5, Purpose.CROP), draw(3, 2, 5, Purpose.CROP), draw(3, 1, 6, Purpose.CROP)]
    others.append(draw(3, 1, 5, Purpose.CAPTION))
    assert all(not np.array_equal(a, rng.random(4)) for rng in others)


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="larger than the data"):
        Order((10,), 0).steps_per_epoch(11)
