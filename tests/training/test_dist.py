"""Gloo processes against one process; three ranks show order effects that two hide."""

import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT

from superclip.config import SuperClipOptions
from superclip.data.batch import Batch
from superclip.losses import LossContext, build_loss
from superclip.ops.similarity import info_nce
from superclip.ops.world import World

pytestmark = pytest.mark.dist
B, D, V = 12, 5, 17


def data():
    torch.manual_seed(0)
    x, z, w1, w2 = (torch.randn(n, D).double() for n in (B, B, D, D))
    return x, z, w1, w2, torch.randint(0, V, (B, 6))


def parameters_gradient(world: World, rows: slice):
    """Gradient of a linear two-tower model's parameters on this rank's rows."""
    x, z, w1, w2, _ = data()
    w1, w2 = w1.requires_grad_(), w2.requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = info_nce(F.normalize(x[rows] @ w1), F.normalize(z[rows] @ w2), scale, world)
    return torch.autograd.grad(loss, (w1, w2, scale))


def rank_main(rank: int, size: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    rows = slice(rank * B // size, (rank + 1) * B // size)
    grads = [world.sum(g) / size for g in parameters_gradient(world, rows)]
    loss = build_loss("superclip", SuperClipOptions(), LossContext(V, (0,)))
    for _ in range(3):
        tokens = data()[4][rows]
        ids = torch.arange(len(tokens))
        loss.observe(Batch(torch.zeros(len(tokens), 1), tokens, ids, ids), world)
    torch.save({"grads": grads, "state": loss.state_dict()}, f"{path}/{rank}.pt")
    world.close()


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_and_counts_equal_one_process(size, tmp_path):
    port = 20_000 + os.getpid() % 20_000 + size
    mp.spawn(rank_main, (size, port, str(tmp_path)), nprocs=size)
    expected = parameters_gradient(World(), slice(0, B))
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(size)]
    for rank in found:
        for a, b in zip(rank["grads"], expected):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert rank["state"]["samples"] == 3 * B
        assert torch.equal(rank["state"]["counts"], found[0]["state"]["counts"])
    dense = torch.zeros(V, dtype=torch.long)
    for row in data()[4].tolist():
        dense[list(set(row))] += 3
    assert torch.equal(found[0]["state"]["counts"], dense)


def launch(ranks: int, out, *more: str) -> None:
    words = (
        "-m superclip.train --train-num-samples 96 --precision fp32 --head-vocab seen --threads 1"
    )
    batch = ["--batch-size", str(12 // ranks), "--out", str(out), *more]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, *(torchrun if ranks > 1 else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, *words.split(), *batch], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_trained_weights_equal_one_process(ranks, tmp_path):
    launch(1, tmp_path / "one")
    launch(ranks, tmp_path / "many")
    one, many = (
        torch.load(tmp_path / n / "epoch_1.pt", weights_only=True) for n in ("one", "many")
    )
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(many["state_dict"][name], tensor, rtol=0, atol=1e-5, msg=name)
    for name in ("counts", "samples"):
        assert torch.equal(one["training"]["loss"][name], many["training"]["loss"][name])
