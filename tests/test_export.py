"""An exported model is the model: in plain open_clip, in DataComp's hands and in CLIP_benchmark."""

import importlib.util
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused
from PIL import Image
from safetensors import safe_open

from superclip.data.coco import CocoFolder
from superclip.data.geometry import plan, render
from superclip.errors import UserError
from superclip.evaluate import evaluate
from superclip.evaluation.config import EvalConfig
from superclip.export import ExportConfig, export, main
from superclip.model.factory import build_clip, model_config, tokenizer
from superclip.model.weights import load_checkpoint

TEXTS = ["a red heart above a bicycle", "Two dogs, and a cat!", "sky " * 60]


def export_of(checkpoint: Path, out: Path, to: str = "open_clip") -> Path:
    return export(ExportConfig(checkpoint, to, out))[0]  # pyright: ignore[reportArgumentType]


def altered(run: Path, out: Path, mode: str = "crop", name: str = "scenes-vit", **config) -> Path:
    """The run's checkpoint with another preprocessing or architecture, freshly drawn where the
    weights have to be others."""
    content = torch.load(run / "final_epoch.pt", weights_only=True)
    if name != "scenes-vit" or config:
        content["model_config"] = model_config(name) | config
        clip = build_clip(content["model_config"], seed=1)
        size = clip.visual.image_size[0]
        content |= {"state_dict": clip.state_dict(), "token_head": None}
        content["preprocess"]["size"], content["config"]["model"]["model"] = size, name
    content["preprocess"]["mode"] = mode
    out.parent.mkdir(exist_ok=True)
    torch.save(content, out)
    return out


def drawn_pictures(folder: Path) -> list[Path]:
    """JPEGs of wide, tall and square shapes."""
    rng = np.random.default_rng(0)
    sizes = [(97, 61), (64, 131), (90, 90), (400, 123)]
    paths = [folder / f"{width}.jpg" for width, _ in sizes]
    for path, (width, height) in zip(paths, sizes):
        rough = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
        rough.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return paths


def assert_same_features(checkpoint: Path, name: str, pictures: list[Path], pretrained=None):
    """Ours and plain open_clip's, each by its own reader and tokenizer, to 1e-5."""
    ours = load_checkpoint(checkpoint)
    opened: Any = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    theirs, preprocess = opened[0].eval(), opened[2]
    size, mode = ours.preprocess.size, ours.preprocess.mode
    bytes_of = [(path.read_bytes(), Image.open(path).size) for path in pictures]
    pixels = np.stack([render(data, plan(*sides, size, mode)) for data, sides in bytes_of])
    batch = torch.stack([preprocess(Image.open(path)) for path in pictures])
    with torch.no_grad():
        for a, b in (
            (ours.model.encode_image(torch.from_numpy(pixels)), theirs.encode_image(batch)),
            (
                ours.model.encode_text(tokenizer(ours.model_config)(TEXTS)),
                theirs.encode_text(open_clip.get_tokenizer(name)(TEXTS)),
            ),
        ):
            assert torch.allclose(a, F.normalize(b, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_plain_open_clip_sees_and_reads_the_same(tiny_run, tmp_path, mode):
    checkpoint = altered(tiny_run, tmp_path / "run" / "final_epoch.pt", mode)
    folder = export_of(checkpoint, tmp_path / "out")
    assert_same_features(checkpoint, f"local-dir:{folder}", drawn_pictures(tmp_path))


def test_on_photographs_too(tiny_run, tmp_path, real_data):
    source = CocoFolder(real_data / "coco", "val")
    pictures = [Path(source.where(row)) for row in range(12)]
    for mode in ("crop", "squash", "pad"):
        checkpoint = altered(tiny_run, tmp_path / mode / "final_epoch.pt", mode)
        folder = export_of(checkpoint, tmp_path / mode / "out")
        assert_same_features(checkpoint, f"local-dir:{folder}", pictures)


def test_other_architectures(tiny_run, tmp_path):
    """QuickGELU, and a text tower under its own name."""
    for number, config in enumerate(({"quick_gelu": True}, {"custom_text": True})):
        checkpoint = altered(tiny_run, tmp_path / f"{number}.pt", "crop", "scenes-vit", **config)
        folder = export_of(checkpoint, tmp_path / str(number))
        assert_same_features(checkpoint, f"local-dir:{folder}", drawn_pictures(tmp_path))
    plain = load_checkpoint(altered(tiny_run, tmp_path / "plain.pt", "crop", "small-vit"))
    assert plain.facts["activation"] == "GELU"


def test_a_hugging_face_tokenizer_lies_in_the_folder(tiny_run, tmp_path):
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*marks, *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    kept = tmp_path / "tokenizer"
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(kept)
    text = model_config("scenes-vit")["text_cfg"]
    text |= {"vocab_size": len(words), "hf_tokenizer_name": str(kept)}
    checkpoint = altered(tiny_run, tmp_path / "run" / "final_epoch.pt", text_cfg=text)
    folder = export_of(checkpoint, tmp_path / "out")
    assert_same_features(checkpoint, f"local-dir:{folder}", drawn_pictures(tmp_path))
    before = tokenizer({"text_cfg": text})(TEXTS)
    shutil.rmtree(kept)
    after = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(after, before) and len(after.unique()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-B-32-quickgelu"])
def test_a_name_of_open_clips_opens_the_checkpoint_itself(tiny_run, tmp_path, name):
    checkpoint = altered(tiny_run, tmp_path / "final_epoch.pt", "crop", name)
    assert_same_features(checkpoint, name, drawn_pictures(tmp_path), str(checkpoint))
    folder = export_of(checkpoint, tmp_path / "out", "datacomp")
    assert not (folder / "open_clip_config.json").exists()
    info = pickle.loads((folder / "info.pkl").read_bytes())
    assert info["scale_config"]["model"] == name
    assert_same_features(checkpoint, name, drawn_pictures(tmp_path), info["checkpoint"])


def test_the_token_head_travels_with_its_facts(tiny_run, tmp_path):
    folder = export_of(tiny_run / "final_epoch.pt", tmp_path / "out")
    head = load_checkpoint(tiny_run / "final_epoch.pt").model.token_head
    assert head is not None
    with safe_open(folder / "token_head.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "patches", "vocabulary": "49408"}
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(held) == set(head.state_dict())
    assert all(torch.equal(held[name], tensor) for name, tensor in head.state_dict().items())


def test_the_card_says_how_and_what_and_what_not(tiny_run, tmp_path, few_scenes):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    checkpoint = run / "final_epoch.pt"
    card = (export_of(checkpoint, tmp_path / "before") / "README.md").read_text()
    assert "Not evaluated" in card and "intervals above" not in card
    asked = EvalConfig((checkpoint,), tasks=("retrieval",), val_data=str(few_scenes), bootstrap=100)
    [result] = evaluate(asked)["results"]
    [file] = run.glob("eval_*.json")
    shutil.copy(file, run / "eval_stranger.json")
    text = (run / "eval_stranger.json").read_text()
    sha = load_checkpoint(checkpoint).sha256
    (run / "eval_stranger.json").write_text(text.replace(sha, "0" * 64))
    card = (export_of(checkpoint, tmp_path / "after") / "README.md").read_text()
    scores = [line for line in card.splitlines() if line.startswith("| retrieval: ")]
    assert len(scores) == len(result["rows"])  # and not those of the stranger
    assert f"{100 * result['rows'][0]['value']:.2f} %" in scores[0] and "| 32 |" in scores[0]
    config = json.loads((run / "run.json").read_text())
    for told in (
        "`--head-vocab seen`",
        "`--train-num-samples 256`",
        "Seed 0",
        "0.0005 at its peak",
        "| pairs per step | 32 |",
        f"| optimizer steps, whole run | {config['total_steps']} |",
        config["commit"],
        f"torch {config['versions']['torch']}",
        config["data_sha256"],
        sha,
        "generated drawings only",
        'create_model_and_transforms("local-dir:DIR")',
    ):
        assert told in card, told
    assert str(tmp_path) not in card and "--out" not in card


def test_datacomp_finds_what_it_reads(tiny_run, tmp_path):
    """The steps of mlfoundations/datacomp's evaluate.py and eval_utils/wds_eval.py."""
    checkpoint = tiny_run / "final_epoch.pt"
    folder = export_of(checkpoint, tmp_path / "run 1", "datacomp")
    data = (folder / "info.pkl").read_bytes()
    executing = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"}
    assert not executing & {opcode.name for opcode, _, _ in pickletools.genops(data)}
    info = pickle.loads(data)
    assert Path(info["checkpoint"]) == folder / "checkpoints" / "epoch_1.pt"
    name = info["scale_config"]["model"]
    assert_same_features(checkpoint, name, drawn_pictures(tmp_path), str(info["checkpoint"]))
    held = torch.load(folder / "checkpoints" / "epoch_latest.pt", weights_only=True)
    assert set(held) == {"epoch", "name", "state_dict"} and held["epoch"] == 1
    clip = load_checkpoint(checkpoint).model.clip
    clip.load_state_dict(held["state_dict"])  # strict: open_clip's keys and no other
    params = dict(line.split(": ", 1) for line in (folder / "params.txt").read_text().splitlines())
    assert params["model"] == "scenes-vit" and params["batch_size"] == "32"
    assert params["lr"] == "0.0005" and params["epochs"] == "1" and params["name"] == "run 1"
    log = (folder / "out.log").read_text().splitlines()
    assert all(line.startswith("- | INFO | ") for line in log)
    assert "Train Epoch: 0 [256/256 (100%)]" in "\n".join(log)
    assert any("Eval Epoch: 1 " in line for line in log)


def test_the_command_says_how_to_open_and_overwrites_nothing_unasked(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--ckpt", str(tiny_run / "final_epoch.pt"), "--out", str(out)]
    main(words)
    assert f'"local-dir:{out}"' in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "--overwrite" in refused("superclip.export", *words)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_only_exports_are_replaced(tiny_run, tmp_path):
    checkpoint, out = tiny_run / "final_epoch.pt", tmp_path / "out"
    export_of(checkpoint, out)
    _, opening = export(ExportConfig(checkpoint, "datacomp", out, overwrite=True))
    assert f"evaluate.py --train_output_dir {out}" in opening and (out / "params.txt").exists()
    (out / "eval_results.jsonl").write_text("of a benchmark\n")
    with pytest.raises(UserError, match="eval_results"):
        export(ExportConfig(checkpoint, "open_clip", out, overwrite=True))
    (out / "eval_results.jsonl").unlink()
    (out / "mine" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 'mine', of no export"):
        export(ExportConfig(checkpoint, "open_clip", out, overwrite=True))
    (out / "mine" / "empty").rmdir()
    (out / "mine").rmdir()
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link"):
        export(ExportConfig(checkpoint, "open_clip", out, overwrite=True))
    theirs = tmp_path / "theirs" / "params.txt"
    theirs.parent.mkdir()
    theirs.write_text("of a training of open_clip")
    with pytest.raises(UserError, match="params"):
        export(ExportConfig(checkpoint, "open_clip", theirs.parent, overwrite=True))
    with pytest.raises(UserError, match="is a file"):
        export(ExportConfig(checkpoint, "open_clip", theirs))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_checkpoint_leaves_no_folder(tiny_run, tmp_path):
    torch.save(load_checkpoint(tiny_run / "final_epoch.pt").model.clip.state_dict(), tmp_path / "a")
    (tmp_path / "b").write_bytes((tiny_run / "final_epoch.pt").read_bytes()[:5000])
    for name, words in (("none", "does not exist"), ("a", "not a superclip"), ("b", "cut short")):
        with pytest.raises(UserError, match=words):
            export(ExportConfig(tmp_path / name, "open_clip", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None,
    reason="clip_benchmark is not installed (pip install clip-benchmark)",
)
def test_clip_benchmark_finds_the_same_numbers(tiny_run, real_data):
    words = ["--ckpt", str(tiny_run / "final_epoch.pt"), "--coco", str(real_data / "coco")]
    if np.lib.NumpyVersion(np.__version__) < "2.4.0":  # with which its accuracies fail
        words += ["--zeroshot", str(real_data / "imagenette" / "val")]
    script = [sys.executable, str(ROOT / "scripts" / "agree.py"), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) in (8, 11) and all(row.endswith("  equal") for row in rows), done.stdout
