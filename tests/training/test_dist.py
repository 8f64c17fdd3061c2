"""Gloo processes against one process; three ranks show order effects that two hide."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT
from test_resume import equal, record

from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.loss_options import SuperClipOptions
from superclip.losses import LossContext, build_loss
from superclip.ops.reducer import GradientReducer
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


def reducer_main(rank: int, size: int, port: int, path: str) -> None:
    """Two backward passes, the second one averaged; one parameter is never used."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    model = torch.nn.ModuleList([torch.nn.Linear(D, D), torch.nn.Linear(9, 9), small_net()])
    reducer = GradientReducer(model.parameters(), world, bucket_bytes=100)
    for k, averaging in enumerate((contextlib.nullcontext(), reducer.averaging())):
        with averaging:
            model[2](data()[k][rank : rank + 2].float()).square().sum().backward()
    grads = [p.grad for p in model[2].parameters()]
    unused = [p.grad is None for part in model[:2] for p in part.parameters()]
    refused = None
    try:
        world.on_main(lambda: (_ for _ in ()).throw(UserError("no room")))
    except UserError as error:
        refused = str(error)
    told = world.gather_objects(rank), world.on_main(lambda: "main"), refused
    numbers = world.exchange(torch.tensor([rank, 0.5], dtype=torch.float64))
    torch.save({"grads": grads, "unused": unused, "told": told, "n": numbers}, f"{path}/{rank}.pt")
    world.close()


def small_net():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(D, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def test_accumulated_gradients_are_averaged_once(tmp_path):
    port = 20_000 + os.getpid() % 20_000 + 4
    mp.spawn(reducer_main, (3, port, str(tmp_path)), nprocs=3)
    net = small_net()
    for rank in range(3):
        for part in data()[:2]:
            (net(part[rank : rank + 2].float()).square().sum() / 3).backward()
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, p in zip(found["grads"], net.parameters()):
            torch.testing.assert_close(a, p.grad)
        assert all(found["unused"])
        assert found["told"] == ([0, 1, 2], "main", "no room")
        assert found["n"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]


def launch(ranks: int, out, *more: str) -> str:
    words = "-m superclip.train --global-batch-size 12 --precision fp32 --head-vocab seen"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, *(torchrun if ranks > 1 else []), *words.split(), "--threads", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, "--out", str(out), *more], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory, few_scenes):
    """50 steps of one process, in six parts."""
    out = tmp_path_factory.mktemp("one") / "run"
    launch(1, out, "--train-num-samples", "600", "--val-data", str(few_scenes))
    return torch.load(out / "epoch_1.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_50_steps_equal_those_of_one_process_and_resume_to_the_bit(
    ranks, one, few_scenes, tmp_path
):
    """The same samples whatever the number of ranks; and, stopped at step 20, the same weights."""
    words = ["--train-num-samples", "600", "--val-data", str(few_scenes), "--save-every", "20"]
    launch(ranks, tmp_path / "many", *words)
    many = torch.load(tmp_path / "many" / "epoch_1.pt", weights_only=True)
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(many["state_dict"][name], tensor, rtol=0, atol=1e-5, msg=name)
    for name in ("counts", "samples"):
        assert torch.equal(one["training"]["loss"][name], many["training"]["loss"][name])

    (tmp_path / "cut").mkdir()
    for name in ("run.json", "step_20.pt", "metrics.jsonl"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "many" / name).read_bytes())
    assert "resuming from step_20.pt" in launch(ranks, tmp_path / "cut", *words)
    cut = torch.load(tmp_path / "cut" / "epoch_1.pt", weights_only=True)
    for part in ("state_dict", "token_head", "training"):
        assert equal(cut[part], many[part])
    assert record(tmp_path / "cut") == record(tmp_path / "many")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(one, few_scenes, tmp_path):
    words = ["--train-num-samples", "600", "--val-data", str(few_scenes), "--save-every", "20"]
    launch(1, tmp_path / "run", *words)
    for name in ("epoch_1.pt", "step_40.pt", "final_epoch.pt"):
        (tmp_path / "run" / name).unlink()
    said = launch(3, tmp_path / "run", *words)
    assert "world_size was 1, is 3: not bit-equal" in said
    end = torch.load(tmp_path / "run" / "epoch_1.pt", weights_only=True)
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(end["state_dict"][name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_masked_patches_are_the_same_on_any_number_of_ranks(few_scenes, tmp_path):
    """Eight steps over two epochs: one process, one in micro-steps, three."""
    words = "--train-num-samples 48 --epochs 2 --image-reduction random:0.5 --val-data"
    for name, ranks, more in (("one", 1, []), ("parts", 1, ["--accum-freq", "3"]), ("many", 3, [])):
        launch(ranks, tmp_path / name, *words.split(), str(few_scenes), *more)
    plain = [*words.replace("random:0.5", "random:0.75").split(), str(few_scenes)]
    launch(1, tmp_path / "other", *plain)
    end = {
        name: torch.load(tmp_path / name / "final_epoch.pt", weights_only=True)["state_dict"]
        for name in ("one", "parts", "many", "other")
    }
    for name, tensor in end["one"].items():
        torch.testing.assert_close(end["parts"][name], tensor, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(end["many"][name], tensor, rtol=0, atol=1e-5, msg=name)
    far = end["other"]["visual.proj"] - end["one"]["visual.proj"]
    assert far.abs().max() > 1e-4  # ten times what is let pass as rounding
