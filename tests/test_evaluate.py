"""The command: one checkpoint, two arms, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused
from PIL import Image

from superclip.errors import UserError
from superclip.evaluate import compare_arms, evaluate
from superclip.evaluation.config import EvalConfig


@pytest.fixture
def model(tiny_run, tmp_path):
    """Writes a checkpoint that differs from the trained one as it is told to."""
    whole = torch.load(tiny_run / "final_epoch.pt", weights_only=True)

    def write(name: str, noise: float = 0.0, **config) -> Path:
        torch.manual_seed(hash(name) % 1000 if noise else 0)
        content = dict(whole)
        content["config"] = whole["config"] | config
        content["facts"] = whole["facts"] | {"init_sha256": str(config.get("seed", 0))}
        content["state_dict"] = {
            k: v + noise * v.std() * torch.randn_like(v) if v.ndim == 2 else v
            for k, v in whole["state_dict"].items()
        }
        path = tmp_path / name / "final_epoch.pt"
        path.parent.mkdir()
        torch.save(content, path)
        return path

    return write


def asked(*ckpt: Path, **more) -> EvalConfig:
    return EvalConfig(ckpt=ckpt, num=60, pool=60, bootstrap=100, **more)


def test_scenes_bring_retrieval_classes_and_compositional_checks(model, capsys):
    path = model("a")
    report = evaluate(asked(path))
    assert [r["task"] for r in report["results"]] == ["retrieval", "zeroshot", "compositional"]
    written = next(path.parent.glob("eval_val-*.json"))  # --num is in its name
    assert json.loads(written.read_text()) == json.loads(json.dumps(report))
    shown = capsys.readouterr().out
    assert "text-to-image mAP@10" in shown and "ceiling, category-blind model" in shown
    assert "a model that sees no picture: absent object" in shown  # others are too few to say
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(asked(path))
    assert evaluate(asked(path, overwrite=True)) == report


def test_two_checkpoints_and_three_seeds(model, capsys):
    one, other = model("one"), model("other", noise=3.0, loss="superclip")
    report = compare_arms(asked(one, against=(other,), tasks=("retrieval",)))
    first = report["differences"][0]
    assert first["test"] == "McNemar by picture" and first["name"] == "image-to-text R@1"
    assert all("descriptive" in row["verdict"] for row in report["differences"])
    values = report["values"]["retrieval image-to-text R@1"]
    assert first["value"] == pytest.approx(values[0][0] - values[1][0])

    arms = [
        [model(f"{arm}{seed}", noise=noise, seed=seed) for seed in (2, 0, 1)]
        for arm, noise in (("x", 0.1), ("y", 0.2))
    ]
    report = compare_arms(asked(*arms[0], against=tuple(arms[1]), tasks=("retrieval",)))
    assert report["paired"] and [c["seed"] for c in report["first"]] == [0, 1, 2]
    assert {row["verdict"] for row in report["differences"]} == {"descriptive"}
    assert "descriptive" in capsys.readouterr().out


def test_arms_that_are_no_arms_are_refused(model, tiny_run):
    a, b = model("a"), model("b", noise=0.1)
    c = model("c", noise=0.1, seed=1, save_every=3)
    d = model("d", noise=0.1, seed=2, optim={**json_of(tiny_run)["optim"], "lr": 1.0})
    with pytest.raises(UserError, match="the same seed"):
        compare_arms(asked(a, b, against=(c,)))
    with pytest.raises(UserError, match=r"not of one recipe \(lr: None -> 1.0\)"):
        compare_arms(asked(a, c, d, against=(b,)))
    second = {**json_of(tiny_run)["model"], "init_from": "a/final_epoch.pt"}  # a later stage's
    stages = [
        model(f"s{seed}", noise=0.1, seed=seed, model=second | {"init_from": f"{seed}.pt"})
        for seed in (1, 2)
    ]
    assert len(compare_arms(asked(*stages, against=(b,), tasks=("retrieval",)))["first"]) == 2
    with pytest.raises(UserError, match="share a checkpoint"):
        compare_arms(asked(a, against=(a,)))
    other_data = model("e", data={**json_of(tiny_run)["data"], "data_seed": 7})
    with pytest.raises(UserError, match="different data for retrieval; --data-seed N"):
        compare_arms(asked(a, against=(other_data,), tasks=("retrieval",)))
    same = asked(a, against=(other_data,), tasks=("retrieval",), data_seed=3)
    assert len(compare_arms(same)["differences"]) == 12
    part = [model(f"p{k}", noise=0.1 * k, seed=k) for k in range(1, 4)]
    rest = [model(f"q{k}", noise=0.3 * k, seed=k) for k in range(2, 5)]
    with pytest.raises(UserError, match=r"seed\(s\) 2, 3 .* in both arms, others in one only"):
        compare_arms(asked(*part, against=tuple(rest), tasks=("retrieval",)))
    with pytest.raises(UserError, match="one at a time"):
        evaluate(asked(a, b))


def test_only_reports_are_replaced(model, tmp_path):
    (tmp_path / "run.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="is no report of this command"):
        evaluate(asked(model("a"), out=tmp_path / "run.json", overwrite=True))
    assert (tmp_path / "run.json").read_text() == '{"config": {}}'


def json_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["config"]


def test_a_checkpoint_without_a_text_tower_is_refused_in_one_line(tiny_run, tmp_path):
    content = torch.load(tiny_run / "final_epoch.pt", weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if k.startswith("visual.")}
    torch.save(content, tmp_path / "vision.pt")
    said = refused("superclip.evaluate", "--ckpt", str(tmp_path / "vision.pt"))
    assert "has no text tower" in said


@pytest.mark.parametrize(
    "part, value",
    [
        ("facts", {}),
        ("preprocess", {"size": 80}),
        ("model_config", [1]),
        ("epoch", 1),
        ("size", 64),
    ],
)
def test_checkpoints_of_odd_shape_are_refused(part, value, model, tmp_path):
    content = torch.load(model("odd"), weights_only=True)
    content |= (
        {part: value} if part != "size" else {"preprocess": {**content["preprocess"], part: value}}
    )
    torch.save(content, tmp_path / "odd.pt")
    if part == "epoch":  # nothing odd about it
        assert (
            evaluate(asked(tmp_path / "odd.pt", tasks=("retrieval",)))["checkpoint"]["epoch"] == 1
        )
        return
    with pytest.raises(UserError, match="no checkpoint that training wrote"):
        evaluate(asked(tmp_path / "odd.pt"))
    with pytest.raises(UserError, match="is a folder"):
        evaluate(asked(model("whole"), out=tmp_path, overwrite=True))


def test_nothing_is_measured_before_everything_is_known(tiny_run, capsys):
    """A wrong template is refused although retrieval comes first."""
    ckpt = tiny_run / "final_epoch.pt"
    with pytest.raises(UserError, match="--templates 'opnai' is no file"):
        evaluate(asked(ckpt, zeroshot="scenes", templates="opnai"))
    assert "R@1" not in capsys.readouterr().out
    with pytest.raises(UserError, match="name is empty"):
        EvalConfig(ckpt=(Path(),))


def test_the_training_data_itself_is_what_the_run_saw(tiny_run, tmp_path):
    own = {"ckpt": (tiny_run / "final_epoch.pt",), "tasks": ("retrieval",), "split": "train"}
    own |= {"bootstrap": 100, "out": tmp_path / "seen.json"}
    [found] = evaluate(EvalConfig(**own))["results"]
    assert found["rows"][0]["pictures"] == 256  # of 115 200 that scenes could make
    with pytest.raises(UserError, match=r"--num 300: .* first 256 pictures"):
        evaluate(EvalConfig(**own | {"num": 300, "out": tmp_path / "more.json"}))


def test_idle_options_of_data_with_a_size_of_their_own(tiny_run, tmp_path):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), {"a": "red", "b": "blue"}[name]).save(
            tmp_path / "data" / name / "x.png"
        )
    only = {"tasks": ("zeroshot",), "zeroshot": str(tmp_path / "data")}
    for option in ({"num": 2}, {"data_seed": 1}, {"split": "train"}):
        with pytest.raises(UserError, match=f"--{next(iter(option)).replace('_', '-')}.*nothing"):
            evaluate(EvalConfig(ckpt=(tiny_run / "final_epoch.pt",), **only, **option))
    shutil.copytree(tmp_path / "data", tmp_path / "more")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "more" / "a" / "y.png")
    with pytest.raises(UserError, match=r"holds pictures of --probe .*a/x\.png"):
        both = {"probe": str(tmp_path / "data"), "probe_test": str(tmp_path / "more")}
        evaluate(asked(tiny_run / "final_epoch.pt", **both))
    with pytest.raises(UserError, match="--probe-test is the same data"):
        both = str(tmp_path / "data")
        evaluate(asked(tiny_run / "final_epoch.pt", probe=both, probe_test=both))


def test_plain_weights_on_either_side(model, tmp_path):
    """An arm of another trainer's file, under --model; ours brings its own configuration."""
    ours, other = model("ours"), model("other", noise=0.2)
    state = torch.load(other, weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "plain.pt")
    config = asked(
        ours, against=(tmp_path / "plain.pt",), model="scenes-vit", data_seed=0, val_data="scenes"
    )
    report = compare_arms(dataclasses.replace(config, tasks=("retrieval",)))
    assert report["first"][0]["loss"] == "superclip" and report["second"][0]["loss"] is None


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tasks": ("probe",)}, "--tasks probe needs --probe"),
        ({"zeroshot": "x", "tasks": ("retrieval",)}, "leaves zeroshot out"),
        ({"templates": "openai"}, "--templates goes with --zeroshot"),
        ({"images": Path("x")}, "--images goes with --compositional"),
        ({"pretrained": "openai"}, "goes with --model"),
        ({"probe_test": "x"}, "--probe-test goes with --probe"),
        ({"effect": -1.0}, "--effect"),
        ({"effect": 1.0}, "--effect goes with --against"),
        ({"split": "train", "val_data": "scenes:val"}, "--split train changes nothing"),
        ({"images": Path("x"), "compositional": ("scenes:val",)}, "--images goes with"),
        ({"tasks": ("retrieval", "retrieval")}, "names one twice"),
        ({"templates": "", "zeroshot": "x"}, "--templates is empty"),
        (
            {"classnames": Path("no/such/file"), "zeroshot": "scenes"},
            "--classnames .*: No such file",
        ),
        ({"val_data": "scenes::scenes:val"}, "joins generated scenes"),
        ({"val_data": "coco"}, "write coco:FOLDER"),
        ({"data_seed": -1}, "--data-seed -1 must lie in"),
        ({"num": 10**12}, "at most"),
        ({"device": "meta"}, "can't compute"),
        ({"tasks": ("zeroshot",), "pool": 20}, "--pool changes nothing for zeroshot"),
        ({"tasks": ("compositional",), "protocol": "flickr"}, "--protocol changes nothing"),
        ({"compositional": ("scenes:val", "more.json")}, "stands alone"),
        ({"model": "ViT-B-32"}, "brings its own configuration and preprocessing"),
        ({"compositional": ("x.json",), "tasks": ("compositional",)}, "--images DIR"),
        ({"zeroshot": "no/such/folder"}, "no labelled data"),
        ({"protocol": "coco-5k"}, "5000 pictures"),
    ],
)
def test_requests_that_cannot_be_met_name_the_way_out(options, said, tiny_run):
    with pytest.raises(UserError, match=said):
        evaluate(EvalConfig(**{"ckpt": (tiny_run / "final_epoch.pt",), "num": 60} | options))
