import os

import pytest
import torch
import torch.multiprocessing as mp

from superclip.ops.statistics import share_statistics
from superclip.ops.world import World


def rank_main(rank: int, size: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    world = World.from_env("cpu")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    torch.manual_seed(rank)
    model(torch.randn(2, 3, 5, 5))
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    share_statistics(model, world)
    torch.save({"before": before, "after": model[1].state_dict()}, f"{path}/{rank}.pt")
    world.close()


@pytest.mark.dist
def test_every_rank_gets_the_main_ranks_statistics(tmp_path):
    mp.spawn(rank_main, (3, 20_000 + os.getpid() % 20_000 + 7, str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(3)]
    for name in ("running_mean", "running_var"):
        assert len({tuple(rank["before"][name].tolist()) for rank in ranks}) == 3
        assert all(torch.equal(r["after"][name], ranks[0]["before"][name]) for r in ranks)
