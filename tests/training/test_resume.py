import fcntl
import json

import pytest
import torch
from conftest import command, refused

from superclip.data.scenes import Scenes
from superclip.data.shard_writer import write_shards
from superclip.training.folder import _lock
from superclip.training.tracking import PACE

WORDS = "superclip.train --train-num-samples 256 --batch-size 32 --head-vocab seen --log-every 1"


def train(out, *more):
    done = command(*WORDS.split(), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, "--save-every", "5")
    return out


def test_a_run_cut_short_goes_on_bit_for_bit(undisturbed, tmp_path):
    """Keep only what a run killed after its checkpoint of step 5 would have left behind."""
    cut = tmp_path / "run"
    cut.mkdir()
    for name in ("run.json", "step_5.pt"):
        (cut / name).write_bytes((undisturbed / name).read_bytes())
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:7]) + '{"step": 8, "lo')  # two steps too many
    assert "resuming from step_5.pt" in train(cut, "--save-every", "5")
    a, b = (torch.load(d / "epoch_1.pt", weights_only=True) for d in (undisturbed, cut))
    for part in ("state_dict", "token_head", "training"):
        assert equal(a[part], b[part])
    assert record(cut) == record(undisturbed)


def record(out):
    """Every line of the record, without the machine's pace."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in PACE} for line in lines]


def equal(a, b):
    """Whether two nests of tensors and plain values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def test_a_finished_run_says_so(undisturbed):
    before = (undisturbed / "final_epoch.pt").stat().st_mtime_ns
    assert "finished" in train(undisturbed, "--save-every", "5")
    assert (undisturbed / "final_epoch.pt").stat().st_mtime_ns == before


def test_another_run_in_the_folder_is_refused_with_the_differences(undisturbed):
    line = refused(*WORDS.split(), "--out", str(undisturbed), "--lr", "1e-3")
    assert "lr: None -> 0.001" in line and "--overwrite" in line


def test_overwrite_starts_anew(undisturbed, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "final_epoch.pt", "metrics.jsonl"):
        (out / name).write_bytes((undisturbed / name).read_bytes())
    (out / "notes.txt").write_text("mine")
    (out / "ViT-B-32-openai.pt").write_text("mine")
    line = refused(*WORDS.split(), "--out", str(out), "--init-from", str(out), "--overwrite")
    assert "--init-from" in line and "lies in --out" in line and (out / "final_epoch.pt").exists()
    train(out, "--lr", "1e-3", "--overwrite")
    assert (out / "ViT-B-32-openai.pt").read_text() == "mine"
    assert json.loads((out / "run.json").read_text())["config"]["optim"]["lr"] == 1e-3
    assert (out / "notes.txt").read_text() == "mine"


def test_a_second_run_of_one_process_finds_its_folder_free(tmp_path):
    for _ in range(2):
        _lock(tmp_path)
    with (tmp_path / ".lock").open("w") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and another's is not


def test_the_run_is_recorded(undisturbed):
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["config"]["precision"] in ("fp32", "amp_bf16")
    assert {"command", "commit", "versions", "threads", "init_sha256"} <= record.keys()
    metrics = [json.loads(x) for x in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 9))
    assert metrics[-1].keys() >= {"val_i2t_R@1", "val_t2i_median_rank"}


def test_data_that_changed_between_runs_is_refused_and_named(few_scenes, tmp_path):
    """Until it is brought back."""
    tar, out = tmp_path / "train.tar", tmp_path / "run"
    tar.write_bytes(few_scenes.read_bytes())
    words = f"superclip.train --train-data {tar} --val-data {few_scenes} --batch-size 8 --epochs 1"
    words = [*words.split(), "--save-every", "2", "--head-vocab", "seen", "--out", str(out)]
    assert command(*words).returncode == 0
    for name in ("final_epoch.pt", "epoch_1.pt"):
        (out / name).unlink()
    scenes = Scenes("tune", 32)
    write_shards(((scenes.read(row), [row]) for row in range(32)), tmp_path, "other")
    (tmp_path / "other-000000.tar").replace(tar)
    assert f"1 changed ({tmp_path.name}/train.tar)" in refused(*words)
    tar.write_bytes(few_scenes.read_bytes())
    assert "resuming from step_2.pt" in command(*words).stdout
