import numpy as np
import pytest
import torch
from reference import retrieval as naive

from superclip.ops import retrieval as ops


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("k", [1, 5])
def test_recall_equals_reference_with_several_captions_and_ties(k, chunk):
    rng = np.random.default_rng(0)
    owner = np.sort(np.concatenate([np.arange(11), rng.integers(0, 11, 19)]))
    # Features on a coarse lattice tie often.
    image = torch.from_numpy(rng.integers(-1, 2, (11, 4))).float()
    text = torch.from_numpy(rng.integers(-1, 2, (30, 4))).float()
    similarity = (image @ text.T).tolist()
    owners = torch.from_numpy(owner)
    i2t = ops.image_to_text_ranks(image, text, owners, chunk)
    t2i = ops.text_to_image_ranks(image, text, owners, chunk)
    assert (i2t < k).double().mean() == naive.image_to_text(similarity, owner.tolist(), k)
    assert (t2i < k).double().mean() == naive.text_to_image(similarity, owner.tolist(), k)


def test_constant_features_score_nothing():
    ones = torch.ones(5, 3)
    assert (ops.image_to_text_ranks(ones, ones, torch.arange(5)) == 4).all()


def test_chance_equals_random_orders():
    rng = np.random.default_rng(1)
    own, candidates, k = 3, 20, 4
    hits = [(rng.permutation(candidates)[:k] < own).any() for _ in range(20_000)]
    assert abs(np.mean(hits) - ops.chance_recall([own], candidates, k)) < 0.01


def test_cluster_bootstrap_keeps_captions_with_their_picture():
    # Two hits or two misses a picture: the interval must be that of 200 pictures, not 400 queries.
    hits = np.repeat(np.tile([0.0, 1.0], 100), 2)
    low, high = ops.cluster_bootstrap(hits, np.repeat(np.arange(200), 2), 200, 2000)
    expected = 2 * 1.96 * 0.5 / 200**0.5
    assert high - low == pytest.approx(expected, rel=0.1)
