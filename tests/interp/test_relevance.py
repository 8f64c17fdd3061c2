"""Relevance maps against loops, exact identities, and the league table end to end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import relevance as naive
from test_hooked import TOWERS, build, own, pictures

from interp.hooked import HookedVisionTransformer
from interp.lenses.relevance import (
    METHODS,
    PATTERN_BUDGET,
    READ_NO_TEXT,
    chefer,
    dense,
    legrad,
    raw_attention,
    relevance,
    rollout,
)
from superclip.errors import UserError

OF_PATCHES = [name for name in METHODS if not name.startswith("legrad-mean")]


def texts(n=3, seed=3, d=20):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tower():
    return HookedVisionTransformer(build())


def known(tower):
    return list(METHODS) if tower.cfg.pool_type == "tok" else OF_PATCHES


@pytest.mark.parametrize(
    "name", ["plain", "quickgelu", "LayerScale", "avg", "norm after pool", "oblong patch"]
)
def test_maps_equal_the_loops(name):
    tower = HookedVisionTransformer(build(**(TOWERS[name] | {"heads": 4})))
    images, vectors = pictures(tower.visual, n=2), texts(2)
    assert set(naive.METHODS) == set(METHODS)
    for method in known(tower):
        found = METHODS[method](tower, images, vectors)
        assert found.shape == (2, tower.cfg.n_ctx - 1) and not found.requires_grad
        for image, text, mine in zip(images, vectors, found, strict=True):
            expected = naive.METHODS[method](tower.visual, image, text).detach()
            assert expected.max() > expected.min(), method  # a flat map would prove nothing
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10 * expected.max())
        maps = relevance(tower, method, images, vectors)
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(maps * found.sum(-1, keepdim=True), found)
        assert (maps >= 0).all()
