import itertools
import math

import numpy as np
import pytest
import torch
from reference import retrieval as naive
from torch.utils._python_dispatch import TorchDispatchMode

from superclip.errors import UserError
from superclip.ops.retrieval import UNIT, image_to_text_ranks, ranks


def same(found, expected):
    for side, rows in zip(found, expected):
        query, rank, precision, right = zip(*rows)
        assert side.query.tolist() == list(query)
        assert side.rank.tolist() == list(rank)
        assert side.right.tolist() == list(right)
        np.testing.assert_allclose(side.precision.tolist(), precision, rtol=1e-12)


def problem(n, m, p, seed, width=4):
    """Features on a coarse lattice, which tie often, and pairs that are a little alike; several
    captions a picture, several pictures a caption, and some of both with none."""
    rng = np.random.default_rng(seed)
    pairs = np.stack([rng.integers(0, n, p), rng.integers(0, m, p)], 1)
    image, text = rng.integers(-2, 3, (n, width)), rng.integers(-1, 2, (m, width))
    np.add.at(text, pairs[:, 1], image[pairs[:, 0]])
    return tuple(map(torch.from_numpy, (image.astype("f4"), text.astype("f4"), pairs)))


@pytest.mark.parametrize(
    ("n", "m", "p"),
    [(1, 1, 1), (5, 9, 6), (64, 64, 90), (65, 129, 60), (130, 70, 200), (40, 190, 190), (9, 4, 99)],
)
@pytest.mark.parametrize("width", [1, 4])
def test_ranks_equal_sorting_the_whole_matrix(n, m, p, width):
    for seed, block in itertools.product(range(3), (UNIT, None)):
        image, text, pairs = problem(n, m, p, seed, width)
        expected = naive.answers((image @ text.T).tolist(), pairs.tolist())
        same(ranks(image, text, pairs, block), expected)


def test_by_hand():
    # Similarities are the captions' own numbers. Picture 0: a wrong one at .9, own at .8, a wrong
    # one that ties with the own at .3; two right answers at places 2 and 4.
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.8, 0], [0.9, 1], [0.3, 2]])
    text = torch.cat([text, torch.tensor([[0.3, 0.0]])])
    to_text, to_image = ranks(image, text, torch.tensor([[0, 0], [0, 2], [1, 1], [0, 2]]))
    assert to_text.query.tolist() == [0, 1] and to_text.right.tolist() == [2, 1]
    assert to_text.rank.tolist() == [1, 1]
    assert to_text.precision.tolist() == [(1 / 2 + 2 / 4) / 2, 1 / 2]
    assert to_image.query.tolist() == [0, 1, 2]  # caption 3 describes nothing
    assert to_image.rank.tolist() == [0, 0, 1]


def test_more_right_answers_than_places():
    scores = torch.arange(40.0, 0, -1)[:, None]
    right = [0, *range(2, 25)]  # the best 25 but one
    pairs = torch.tensor([[0, j] for j in right])
    (to_text, _) = ranks(torch.ones(1, 1), scores, pairs)
    expected = (1 + sum((k - 1) / k for k in range(3, 11))) / 10
    assert to_text.precision.item() == pytest.approx(expected)


@pytest.mark.parametrize("width", [1, 3, 5, 31, 64, 100, 512, 513])
def test_equal_vectors_tie_to_the_bit_wherever_they_stand(width):
    # Five vectors a side, each repeated all over blocks, the last ones filled up.
    rng = torch.Generator().manual_seed(width)
    for n, m in ((70, 300), (200, 90), (129, 513)):
        kinds = [torch.randn(5, width, generator=rng) for _ in range(2)]
        which = [torch.randint(5, (count,), generator=rng) for count in (n, m)]
        image, text = (k[w] for k, w in zip(kinds, which))
        pairs = torch.stack([torch.randint(n, (m,), generator=rng), torch.arange(m)], 1)
        similarity = (kinds[0].double() @ kinds[1].double().T)[which[0]][:, which[1]]
        expected = naive.answers(similarity.tolist(), pairs.tolist())
        for block in (UNIT, 128, None):
            same(ranks(image, text, pairs, block), expected)


def test_constant_features_score_nothing():
    ones, owner = torch.ones(200, 3), torch.arange(200)
    to_text, to_image = ranks(ones, ones, torch.stack([owner, owner], 1), UNIT)
    for found in (to_text, to_image):
        assert (found.rank == 199).all() and not found.precision.any()
    assert (image_to_text_ranks(ones, ones, owner) == 199).all()


def test_order_of_captions_and_pairs_does_not_matter():
    image, text, pairs = problem(90, 200, 300, 0)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    moved = torch.stack([pairs[:, 0], shuffle.argsort()[pairs[:, 1]]], 1).flip(0).repeat(2, 1)
    before, after = ranks(image, text, pairs, UNIT), ranks(image, text[shuffle], moved, UNIT)
    assert torch.equal(before[0].rank, after[0].rank)
    assert torch.equal(before[0].precision, after[0].precision)
    there = torch.full((200,), -1)
    there[before[1].query] = before[1].rank
    assert torch.equal(there[shuffle][after[1].query], after[1].rank)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return found


def test_the_matrix_never_stands_whole():
    image, text, pairs = problem(700, 1500, 1500, 0)
    with Largest() as seen:
        ranks(image, text, pairs, UNIT)
    assert UNIT**2 <= seen.elements <= 10 * (700 + 1500) < 700 * 1500 / 40


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    image, text = torch.ones(5, 3), torch.ones(5, 3)
    text[3, 1] = bad
    pairs = torch.arange(5)[:, None].repeat(1, 2)
    with pytest.raises(UserError, match=r"text features are not finite \(first in row 3\).*--lr"):
        ranks(image, text, pairs)
    with pytest.raises(UserError, match="image features"):
        ranks(text, image, pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_of_any_precision(dtype):
    image, text, pairs = problem(30, 50, 60, 0)
    expected = ranks(image, text, pairs)
    found = ranks(image.to(dtype).requires_grad_(), text.to(dtype), pairs)
    assert all(torch.equal(a.precision, b.precision) for a, b in zip(expected, found))


@pytest.mark.gpu
def test_the_gpu_agrees():
    image, text, pairs = problem(300, 900, 1200, 0)
    for block in (UNIT, None):
        here = ranks(image, text, pairs, block)
        there = ranks(image.cuda(), text.cuda(), pairs.cuda(), block)
        for a, b in zip(here, there):
            assert torch.equal(a.rank, b.rank.cpu()) and torch.equal(a.precision, b.precision.cpu())
