"""NeuCLIP against the naive reference, on one process and on ranks, and what its texts say."""

import os
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import SIZES, free_port
from reference.neuclip import Naive

from superclip.data.batch import Batch
from superclip.loss_options import FastClipV3Options, NeuClipOptions
from superclip.losses import LossContext, build_loss
from superclip.losses.neuclip import predicted
from superclip.ops.normalizers import similarity_blocks
from superclip.ops.world import World

B, D, STEPS = 12, 5, 5
CONTEXT = LossContext(1, (), None, B, B, steps_per_epoch=100, width=D)
SMALL = NeuClipOptions(npn_num_protos=7, npn_repetition=3, npn_restart_iter=3, npn_lr=0.3)
CASES = [
    SMALL,
    replace(SMALL, communication="gather", npn_num_protos=30, npn_own_partner=True),
    replace(SMALL, npn_reset=False, npn_accumulator=0.01),
    replace(SMALL, npn_adagrad="norm"),
    replace(SMALL, npn_repetition=0, npn_lr=1.0, normalizer_eps=0.1),
]


def data(step):
    torch.manual_seed(step)
    return [F.normalize(torch.randn(B, D).double(), dim=1) for _ in range(2)]


def walk(options, world):
    """Value and gradients of each step on this rank's rows, and what is kept at the end."""
    loss = build_loss("neuclip", options, CONTEXT).double()
    share, found = B // world.size, []
    ids = torch.arange(share)
    batch = Batch(torch.zeros(share, 1), torch.zeros(share, 1), ids, ids)
    for step in range(STEPS):
        x, z = (t[world.rank * share : (world.rank + 1) * share] for t in data(step))
        leaves = [t.requires_grad_() for t in (x, z, torch.tensor(7.0).double())]
        loss.observe(batch, world)
        total = sum(loss.pair_terms(*leaves, batch, world).values())
        grads = torch.autograd.grad(total, leaves)
        found.append((total.detach(), *(g / world.size for g in grads)))
    return found, loss.state_dict()


def rank_main(rank, size, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    torch.save([walk(options, world) for options in CASES], f"{path}/{rank}.pt")
    world.close()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def hold_against_reference(options, ranks):
    naive = Naive(options)
    for step in range(STEPS):
        value, grads = naive.step(*data(step), torch.tensor(7.0).double())
        found = [rank[0][step] for rank in ranks]
        mean = sum(f[0] for f in found) / len(found)
        close(mean, torch.tensor(value, dtype=torch.float64))
        for k in (1, 2):
            close(torch.cat([f[k] for f in found]), grads[k - 1])
        close(sum(f[3] for f in found), grads[2])
    for rank in ranks:
        close(rank[1]["prototypes"], torch.stack(naive.w))
        assert all(torch.equal(rank[1][k], ranks[0][1][k]) for k in ("prototypes", "recent"))


@pytest.mark.parametrize("options", CASES, ids=range(len(CASES)))
def test_equals_the_naive_reference(options):
    hold_against_reference(options, [walk(options, World())])


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
def test_ranks_equal_the_naive_reference(size, tmp_path):
    mp.spawn(rank_main, (size, free_port(), str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    for k, options in enumerate(CASES):
        hold_against_reference(options, [rank[k] for rank in found])


def test_prototypes_that_are_the_batch_give_its_log_normalisers():
    """But for the own partner, which the network's mean counts: exp(a) = (1 + (B - 1) g) / B."""
    x, z = data(0)
    blocks = similarity_blocks(x, z, World())
    tau = blocks.spread(torch.tensor(0.1).double())
    g = blocks.log_normalizers(blocks.exponents(tau), 0.0).exp()
    anchors = torch.stack([x, z]), blocks.all_positives, tau[0, 0]
    logs, shares, _ = predicted(torch.stack([z, x]), *anchors, 0.0)
    close(logs.exp(), (1 + (B - 1) * g) / B)
    close(shares.sum(2), torch.ones(2, B).double())


def test_a_network_at_its_optimum_is_fastclip_v3_without_memory(monkeypatch):
    """With a = log(eps + g) value and gradients are those of v3 in its first epoch."""
    x, z = data(0)
    ids = torch.arange(B)
    batch = Batch(torch.zeros(B, 1), torch.zeros(B, 1), ids, ids)
    blocks = similarity_blocks(x, z, World())
    eps, tau = 1e-6, blocks.spread(1 / torch.tensor(7.0).double())
    exact = blocks.log_normalizers(blocks.exponents(tau), eps)
    monkeypatch.setattr("superclip.losses.neuclip.predicted", lambda *_: (exact, None, None))
    found = []
    for name, options in (
        ("neuclip", NeuClipOptions(npn_repetition=0, npn_num_protos=4, rho=2.0)),
        ("fastclip-v3", FastClipV3Options(rho=2.0, normalizer_eps=eps)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, z, torch.tensor(7.0).double())]
        loss = build_loss(name, options, CONTEXT).double()
        loss.observe(batch, World())
        total = sum(loss.pair_terms(*leaves, batch, World()).values())
        found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for a, b in zip(*found):
        close(a, b)


def test_a_long_fit_to_fixed_features_finds_their_log_normalisers():
    x, z = data(0)
    ids = torch.arange(B)
    batch = Batch(torch.zeros(B, 1), torch.zeros(B, 1), ids, ids)
    fit = {"npn_num_protos": 64, "npn_repetition": 100, "npn_restart_iter": 1000}
    options = NeuClipOptions(npn_adagrad="norm", **fit)
    loss, errors = build_loss("neuclip", options, CONTEXT).double(), []
    for _ in range(12):
        loss.observe(batch, World())
        loss.pair_terms(x, z, torch.tensor(4.0).double(), batch, World())
        errors.append(float(loss.gauges()["npn_error"]))
    assert errors[-1] < 1e-9 < errors[0], errors
