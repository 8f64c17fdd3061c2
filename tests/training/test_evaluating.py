"""Evaluation while a run goes on: when, and which model it keeps."""

import json

import torch
from conftest import command, refused

WORDS = (
    "superclip.train --loss clip --train-num-samples 256 --batch-size 32 --log-every 1 "
    "--eval-every 3 --keep-best val_t2i_mean_rank"
)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_best_model_is_kept_and_a_resumed_run_keeps_the_same(few_scenes, tmp_path):
    out = tmp_path / "run"
    words = [*WORDS.split(), "--val-data", str(few_scenes), "--lr", "0.01", "--save-every", "5"]
    assert command(*words, "--out", str(out)).returncode == 0
    ranks = {x["step"]: x["val_t2i_mean_rank"] for x in lines_of(out) if "val_t2i_R@1" in x}
    assert list(ranks) == [3, 6, 8]  # the end of the epoch, too
    best = torch.load(out / "best.pt", weights_only=True)
    step = min(ranks, key=lambda k: ranks[k])  # lower ranks are better
    assert best["best"] == {"metric": "val_t2i_mean_rank", "value": ranks[step], "step": step}
    assert "training" not in best

    cut = tmp_path / "cut"  # what a run killed after step 5 left behind
    cut.mkdir()
    names = ["run.json", "step_5.pt", "metrics.jsonl"] + ["best.pt"] * (step < 5)
    for name in names:
        (cut / name).write_bytes((out / name).read_bytes())
    assert command(*words, "--out", str(cut)).returncode == 0
    again = torch.load(cut / "best.pt", weights_only=True)
    assert again["best"] == best["best"]
    assert all(torch.equal(v, again["state_dict"][k]) for k, v in best["state_dict"].items())


def test_a_metric_that_is_never_measured_is_refused(tmp_path):
    said = refused("superclip.train", "--keep-best", "val_i2t_R@2", "--out", str(tmp_path / "x"))
    assert "did you mean 'val_i2t_R@" in said
    assert not (tmp_path / "x").exists()
