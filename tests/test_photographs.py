"""The commands of the README on real photographs, with a small tower."""

import json

import pytest
from conftest import command, refused

SIZE = ["--model", "small-vit", "--batch-size", "16", "--threads", "1", "--head-vocab", "seen"]


@pytest.fixture(scope="module")
def shards(real_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("coco") / "shards"
    root = str(real_data / "coco")
    done = command("superclip.pack", "coco", "--root", root, "--out", str(out), "--per-shard", "50")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("photographs") / "run"
    pattern = str(shards / "train-{000000..000002}.tar")
    done = command(
        *("superclip.train", "--train-data", pattern, "--epochs", "1", "--out", str(out), *SIZE)
    )
    assert done.returncode == 0, done.stderr
    return out


def test_held_out_photographs_are_known_from_the_checkpoint(trained):
    done = command("superclip.evaluate", "--ckpt", str(trained / "final_epoch.pt"))
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / "eval_val.json").read_text())
    [result] = report["results"]
    rows = {row["measure"]: row for row in result["rows"]}
    assert rows["image-to-text R@1"]["queries"] == 119
    assert rows["text-to-image R@1"]["queries"] == 595
    assert rows["text-to-image R@1"]["chance"] == pytest.approx(1 / 119)
    words = (
        "--split",
        "train",
        "--protocol",
        "first-caption",
        "--out",
        str(trained / "first.json"),
    )
    done = command("superclip.evaluate", "--ckpt", str(trained / "final_epoch.pt"), *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((trained / "first.json").read_text())
    row = report["results"][0]["rows"][0]
    assert row["candidates"] == row["queries"] == 129


def test_sweep_of_boxes_on_photographs(trained, real_data, tmp_path):
    ckpt, root = str(trained / "final_epoch.pt"), str(real_data / "coco")
    words = ["--ckpt", ckpt, "--untrained", "1", "--draws", "199", "--metric", "legacy-mass"]
    data = ["--data", "coco", "--root", root]
    out = tmp_path / "sweep"
    done = command("interp.sweep", *words, *data, "--out", str(out))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "results.json").read_text())
    assert manifest["tower"]["grid"] == [7, 7] and manifest["counts"]["trained_on"] == 0
    assert manifest["boxes"]["lost_to_crop"] > 0 and manifest["boxes"]["crowd"] > 0
    done = command(
        *("interp.ablate", "--ckpt", ckpt, "--results", str(out), *data),
        *("--units", "champion", "--kinds", "mean", "--sets", "0", "--draws", "99"),
    )
    assert done.returncode == 0, done.stderr
    line = refused(
        "interp.sweep", *words, *data, "--split", "train", "--out", str(tmp_path / "none")
    )
    assert "trained on 1" in line


def test_shards_give_the_sweep_the_same_pictures_as_the_folder(trained, real_data, tmp_path):
    ckpt, root = str(trained / "final_epoch.pt"), str(real_data / "coco")
    words = ["--ckpt", ckpt, "--untrained", "0", "--draws", "99"]
    for name, data in (("folder", ["--data", "coco", "--root", root]), ("shards", [])):
        done = command("interp.sweep", *words, *data, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    folder, packed = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("folder", "shards")
    )
    assert folder["images_sha256"] == packed["images_sha256"]
