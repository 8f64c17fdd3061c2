"""The losses with normalisers of every sample: against the naive reference on one process and on
two, three and four ranks; the identities of losses.md; what their tables keep."""

import math
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from reference.global_contrastive import Naive

from superclip.config import (
    FastClipV0Options,
    FastClipV1Options,
    FastClipV2Options,
    FastClipV3Options,
    ISogClrOptions,
    SogClrOptions,
)
from superclip.data.batch import Batch
from superclip.losses import LossContext, build_loss
from superclip.ops.world import World

B, D, STEPS, IMAGES, CAPTIONS = 12, 5, 5, 9, 20
CONTEXT = LossContext(
    1, (), None, IMAGES, CAPTIONS, steps_per_epoch=1, epochs=8, lr_tau=0.01, optimizer_eps=1e-3
)
FALLING = [FastClipV1Options(gamma=0.2).gamma_at(e, 8) for e in range(STEPS)]
RANGE = {"tau_range": (0.05, 0.5)}


@dataclass
class Case:
    """A loss, the reference's arguments for it, and whether its temperature is learnt."""

    name: str
    options: object
    kind: str
    gammas: list
    naive: dict = field(default_factory=dict)

    def reference(self):
        own = {"rho": getattr(self.options, "rho", 0.0), "eps": self.options.normalizer_eps}
        if hasattr(self.options, "tau_range"):
            own |= {"tau_range": self.options.tau_range, "lr_tau": 0.01, "adam_eps": 1e-3}
        return Naive(self.kind, self.gammas, **own | self.naive)


CONSTANT = [0.6] * STEPS
CASES = [
    Case("sogclr", SogClrOptions(gamma=0.6, normalizer_eps=0.01), "sogclr", CONSTANT),
    Case(
        "sogclr", SogClrOptions(gamma=0.6, include_positive=True), "sogclr", CONSTANT,
        {"include": True},
    ),
    Case("isogclr", ISogClrOptions(gamma=0.6, rho=2.0, **RANGE), "isogclr", CONSTANT),
    Case("fastclip-v0", FastClipV0Options(normalizer_eps=0.01), "v0", FALLING),
    Case(
        "fastclip-v0", FastClipV0Options(published_tau_gradient=True), "v0", FALLING,
        {"twice": True},
    ),
    Case("fastclip-v1", FastClipV1Options(), "v1", FALLING),
    Case("fastclip-v2", FastClipV2Options(rho=2.0, **RANGE), "v2", FALLING),
    Case("fastclip-v3", FastClipV3Options(), "v3", FALLING),
    Case(
        "fastclip-v3", FastClipV3Options(published_tau_gradient=True), "v3", FALLING,
        {"twice": True},
    ),
]  # fmt: skip
PATHS = [(case, way) for case in CASES for way in ("reduction", "gather")]


def data(step):
    """Features and ids; some pictures and captions come twice in a batch."""
    torch.manual_seed(step)
    x, z = (F.normalize(torch.randn(B, D).double(), dim=1) for _ in range(2))
    images, captions = torch.randint(0, IMAGES, (B,)), torch.randperm(CAPTIONS)[:B]
    captions[3] = captions[7]
    return x, z, images, captions


def walk(case, way, world):
    """Value and gradients of each step on this rank's rows, and the tables at the end."""
    loss = build_loss(case.name, replace(case.options, communication=way), CONTEXT).double()
    share, found = B // world.size, []
    rows = slice(world.rank * share, (world.rank + 1) * share)
    for step in range(STEPS):
        x, z, images, captions = (t[rows] for t in data(step))
        batch = Batch(torch.zeros(share, 1), torch.zeros(share, 1), images, captions)
        scale = torch.tensor(7.0).double()
        leaves = [leaf.requires_grad_() for leaf in (x, z, scale)]
        loss.observe(batch, world)
        total = sum(loss.pair_terms(*leaves, batch, world).values())
        grads = torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)
        found.append((total.detach(), *(g / world.size for g in grads)))
    return found, loss.state_dict()


def rank_main(rank, size, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    torch.save([walk(case, way, world) for case, way in PATHS], f"{path}/{rank}.pt")
    world.close()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def hold_against_reference(case, ranks):
    """`ranks`: what `walk` found on each."""
    naive = case.reference()
    for step in range(STEPS):
        x, z, images, captions = data(step)
        ids = images.tolist(), captions.tolist()
        value, grads = naive.step(x, z, torch.tensor(7.0).double(), ids)
        found = [rank[0][step] for rank in ranks]
        close(sum(f[0] for f in found) / len(found), torch.tensor(value, dtype=torch.float64))
        for k in (1, 2):
            close(torch.cat([f[k] for f in found]), grads[k - 1])
        close(sum(f[3] for f in found), grads[2])
    for side, name in enumerate(("images", "captions")):
        table = ranks[0][1][f"tables.{name}.rows"]
        assert all(torch.equal(rank[1][f"tables.{name}.rows"], table) for rank in ranks)
        for key, row in naive.memory[side].items():
            assert table[key, 0].item() == pytest.approx(math.log(row["u"]), rel=1e-9)
            if "tau" in row:
                assert table[key, 1].item() == pytest.approx(row["tau"], rel=1e-9)
        unseen = sorted(set(range(len(table))) - set(naive.memory[side]))
        assert (table[unseen, 0] == -math.inf).all()


@pytest.mark.parametrize(
    "case,way", PATHS, ids=[f"{c.name}-{k}-{w}" for k, (c, w) in enumerate(PATHS)]
)
def test_equals_the_naive_reference(case, way):
    hold_against_reference(case, [walk(case, way, World())])


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_naive_reference(size, tmp_path):
    port = 21_000 + os.getpid() % 20_000 + size
    mp.spawn(rank_main, (size, port, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    for k, (case, _) in enumerate(PATHS):
        hold_against_reference(case, [rank[k] for rank in found])
