"""Mistakes and accidents that a first attack found: one line, status 2, nothing lost."""

import fcntl
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import command, refused
from PIL import Image

from superclip.config import is_scenes, train_config
from superclip.data.shards import Shards
from superclip.data.sources import open_source
from superclip.errors import UserError, check_writable, replacing
from superclip.evaluate import main as evaluate_main

WORDS = "superclip.train --train-num-samples 256 --batch-size 32 --head-vocab seen --log-every 4"


def test_a_diverged_model_has_no_recall(tiny_run, tmp_path):
    content = torch.load(tiny_run / "final_epoch.pt", weights_only=True)
    content["state_dict"]["visual.proj"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pt")
    line = refused("superclip.evaluate", "--ckpt", str(tmp_path / "nan.pt"), "--num", "100")
    assert "visual.proj is not finite" in line and not list(tmp_path.glob("*.json"))


def test_a_kill_before_the_final_file_is_mended(tiny_run, tmp_path):
    for name in ("run.json", "metrics.jsonl", "epoch_1.pt"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    (tmp_path / "final_epoch.pt").write_bytes(b"cut")
    done = command(*WORDS.split(), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    a, b = (
        torch.load(d / "final_epoch.pt", weights_only=True)["state_dict"]
        for d in (tiny_run, tmp_path)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "metrics.jsonl").read_text() == (tiny_run / "metrics.jsonl").read_text()


def test_overwrite_with_a_mistake_deletes_nothing(tiny_run, tmp_path):
    for name in ("run.json", "final_epoch.pt"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    words = [*WORDS.split(), "--out", str(tmp_path), "--overwrite"]
    assert "did you mean" in refused(*words, "--model", "scenes-vitt")
    assert "larger than the data" in refused(*words, "--batch-size", "9999")
    assert (tmp_path / "final_epoch.pt").exists()


def test_a_reader_that_leaves_or_a_full_disk_loses_no_report(tiny_run, tmp_path):
    """`| head -1` and a full /dev/full: what was measured is written all the same."""
    words = ["-m", "superclip.evaluate", "--ckpt", str(tiny_run / "final_epoch.pt")]
    words = [sys.executable, *words, "--num", "60", "--tasks", "retrieval"]
    at = tmp_path / "piped.json"
    with subprocess.Popen([*words, "--out", str(at)], stdout=-1, stderr=-1, text=True) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        said = run.stderr.read()
    assert run.returncode == 0 and "error" not in said, said
    assert json.loads(at.read_text())["results"][0]["rows"]
    with open("/dev/full", "w") as full:
        at = tmp_path / "full.json"
        done = subprocess.run([*words, "--out", str(at)], stdout=full, stderr=-1, text=True)
    assert done.returncode == 2 and json.loads(at.read_text())["results"]
    line = done.stderr.strip().splitlines()[-1]
    assert line == "error: standard output: No space left on device; the files are written"


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("before")
    with pytest.raises(OSError) as caught, replacing(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--num x", "--num takes a whole number, not 'x'"),
        ("--effect much", "--effect takes a number, not 'much'"),
        ("--ckpt", "--ckpt is empty"),
        ("--ckpt --num 50", "--ckpt is empty"),
        ("--ckpt a.pt --ckpt b.pt", "--ckpt is given twice; give it once, with all its items"),
        ("--ckpt /dev/null", "/dev/null is no file"),
        ("--ckpt .", "a checkpoint's name is empty"),
        ("--ckpt superclip", "superclip is no file; name a checkpoint"),
        ("--ckpt no/seed*.pt", "does not exist; leave a pattern unquoted"),
    ],
)
def test_flags_that_cannot_be_read(words, said):
    with pytest.raises(UserError) as caught:
        evaluate_main(words.split())
    assert said in str(caught.value)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (tmp_path / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another process" in refused(*WORDS.split(), "--out", str(tmp_path))


def test_a_strangers_record_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("my own notes")
    assert "no run.json" in refused(*WORDS.split(), "--out", str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "my own notes"


def test_names_of_scenes():
    assert is_scenes("scenes:val") and not is_scenes("scenes/val-000000.tar")
    with pytest.raises(UserError, match="did you mean 'val'"):
        open_source("scenes:vall")


def test_root_without_coco_is_refused(tiny_run, tmp_path):
    ckpt = str(tiny_run / "final_epoch.pt")
    line = refused("interp.sweep", "--ckpt", ckpt, "--root", "x", "--out", str(tmp_path / "o"))
    assert "--root goes with --data coco" in line


def test_output_below_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_writable(tmp_path / "file" / "x" / "y.json", "--out")
    check_writable(tmp_path / "new" / "y.json", "--out")
    assert "is a file" in refused(*WORDS.split(), "--out", str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"width": 10**30},
        {"captions": "a dog"},
        {"captions": [None]},
        {"boxes": {"xywh": [[0, 0, float("nan"), 5]], "categories": ["dog"], "iscrowd": [0]}},
        {"boxes": {"xywh": [[0, 0, 0, 5]], "categories": ["dog"], "iscrowd": [0]}},
    ],
)
def test_facts_inside_shards_are_checked(change, tmp_path):
    facts = {"schema": 1, "key": "1", "captions": ["a dog"], "width": 8, "height": 8} | change
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.png", picture.getvalue()), ("1.json", json.dumps(facts).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"1: broken facts"):
        Shards(str(tmp_path / "a.tar")).read(0)


@pytest.mark.parametrize(
    "values",
    [
        {"aug_scale": 0.5},
        {"aug_scale": [0.5]},
        {"loss": ["a"]},
        {"beta1": 2.0},
        {"eps": -1.0},
        {"wd": -1.0},
        {"lr": float("inf")},
        {"threads": 0},
        {"seed": 2**70},
        {"train_num_samples": 10**13},
        {"val_data": ""},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UserError):
        train_config(values)


@pytest.mark.parametrize("field", ["id", "image_id"])
def test_ids_that_are_lists_are_no_coco(field, tmp_path):
    (tmp_path / "images").mkdir()
    annotation = {"id": 1, "image_id": 1, "caption": "a dog"} | {field: [1]}
    images = [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}]
    text = json.dumps({"images": images, "annotations": [annotation]})
    (tmp_path / "captions.json").write_text(text)
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": []})
    )
    with pytest.raises(UserError, match=f"not a COCO captions file.*{field}"):
        open_source(f"coco:{tmp_path}:all")
