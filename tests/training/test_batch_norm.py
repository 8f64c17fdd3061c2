"""A tower with running statistics: every rank trains its own, and all evaluate the main rank's."""

import pytest
import torch
from reference.hf_towers import image_folder, text_folder
from test_dist import launch
from test_resume import equal, record

from superclip.data.loader import tokenizer_for
from superclip.data.sources import open_source
from superclip.evaluation.encode import Encoder
from superclip.model.factory import tokenizer
from superclip.model.weights import load_checkpoint
from superclip.training.evaluators import Retrieval, run_evaluators

pytestmark = [pytest.mark.dist, pytest.mark.slow]


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
