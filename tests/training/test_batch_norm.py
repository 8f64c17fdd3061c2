"""A tower with running statistics: every rank trains its own, and all evaluate the main rank's."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from reference.hf_towers import image_folder, text_folder
from test_dist import launch
from test_resume import equal, record

from superclip.data.loader import tokenizer_for
from superclip.data.sources import open_source
from superclip.evaluation.encode import Encoder
from superclip.model.factory import tokenizer
from superclip.model.weights import load_checkpoint
from superclip.ops.world import World
from superclip.training.evaluators import Retrieval, run_evaluators, share_statistics

pytestmark = pytest.mark.dist


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


def test_every_rank_gets_the_main_ranks_statistics(tmp_path):
    mp.spawn(rank_main, (3, 20_000 + os.getpid() % 20_000 + 7, str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(3)]
    for name in ("running_mean", "running_var"):
        assert len({tuple(rank["before"][name].tolist()) for rank in ranks}) == 3
        assert all(torch.equal(r["after"][name], ranks[0]["before"][name]) for r in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_record_is_of_the_model_in_the_checkpoint(ranks, few_scenes, tmp_path):
    """What three ranks measured together, one process measures of their checkpoint; and a run
    stopped at step 4 ends in the same bits."""
    towers = f"timm/{image_folder(tmp_path / 'image')}", f"hf/{text_folder(tmp_path / 'text')}"
    words = ["--image-tower", towers[0], "--text-tower", towers[1], "--embed-dim", "16"]
    words += ["--train-num-samples", "96", "--val-data", str(few_scenes), "--save-every", "4"]
    launch(ranks, tmp_path / "run", *words, "--lr", "1e-3")
    found = load_checkpoint(tmp_path / "run" / "final_epoch.pt")
    tokenize = tokenizer_for(tokenizer(found.model_config))
    encoder = Encoder(found.preprocess, tokenize, torch.device("cpu"))
    alone = Retrieval("val", open_source(str(few_scenes), held_out=True), encoder, None)
    measured = dict(run_evaluators([alone], found.model))
    assert {k: v for k, v in record(tmp_path / "run")[-1].items() if k != "step"} == measured

    (tmp_path / "cut").mkdir()
    for name in ("run.json", "step_4.pt", "metrics.jsonl"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "run" / name).read_bytes())
    assert "resuming from step_4.pt" in launch(ranks, tmp_path / "cut", *words, "--lr", "1e-3")
    whole, cut = (
        torch.load(tmp_path / name / "epoch_1.pt", weights_only=True) for name in ("run", "cut")
    )
    for part in ("state_dict", "token_head", "training"):
        assert equal(cut[part], whole[part])
