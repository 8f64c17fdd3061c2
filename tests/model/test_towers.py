"""Any timm image tower with any Hugging Face text tower, without a network."""

import contextlib
import dataclasses
import io
import json
import shutil

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import command
from reference.hf_towers import image_folder, text_folder
from transformers import AutoModel, AutoTokenizer

from interp.hooked.tower import HookedVisionTransformer
from superclip.config import ModelConfig, to_dict, train_config
from superclip.data.scenes import Scenes
from superclip.errors import UserError
from superclip.export import ExportConfig, export
from superclip.model.adopt import adopt_towers
from superclip.model.factory import build_clip, model_config, special_ids, tokenizer
from superclip.model.grid import grid_width, pooled_and_mean
from superclip.model.superclip import SuperCLIP
from superclip.model.towers import image_tower
from superclip.model.weights import load_checkpoint, state_sha256
from superclip.train import main as train

TEXTS = ["a red heart above a bicycle", "the airplane", "yellow " * 60, ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Image tower and text tower, as --image-tower and --text-tower take them."""
    root = tmp_path_factory.mktemp("towers")
    return image_folder(root / "resnet"), text_folder(root / "distilbert")


def options(folders, **more):
    image, text = folders
    return ModelConfig(image_tower=f"timm/{image}", text_tower=f"hf/{text}", embed_dim=16, **more)


@pytest.fixture(scope="module")
def adopted(folders):
    return adopt_towers(options(folders), seed=0)


def test_image_tower_is_timms_own_with_a_linear_head(folders, adopted):
    config, clip, facts = adopted
    assert config["vision_cfg"] == {"timm_model_name": "test_resnet", "image_size": 64}
    assert (facts["mean"], facts["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    plain = timm.create_model(f"local-dir:{folders[0]}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(pixels) @ clip.visual.head.proj.weight.T
        torch.testing.assert_close(clip.eval().encode_image(pixels), expected)
    assert clip.visual.head.proj.bias is None


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_text_tower_is_transformers_own_with_a_linear_head(folders, pooling):
    config, clip, _ = adopt_towers(options(folders, text_pooling=pooling, context_length=9), 0)
    tokens = tokenizer(config)(TEXTS)
    theirs = AutoTokenizer.from_pretrained(folders[1])
    padded = theirs(TEXTS, padding="max_length", truncation=True, max_length=9, return_tensors="pt")
    assert torch.equal(tokens, padded.input_ids)
    assert (tokens[2] != 0).all() and tokens[2, -1] == theirs.sep_token_id  # cut, its end kept
    plain = AutoModel.from_pretrained(folders[1]).eval()
    with torch.no_grad():
        rows = []
        for row in tokens:  # each by itself, without any padding
            states = plain(row[row != 0][None]).last_hidden_state[0]
            rows.append(states[0] if pooling == "cls" else states.mean(0))
        expected = torch.stack(rows) @ clip.text.proj.weight.T
        torch.testing.assert_close(clip.eval().encode_text(tokens), expected)
    assert special_ids(tokenizer(config)) == (0, 2, 3)
    assert tokenizer(config).decode([4]) == theirs.decode([4])


def test_the_configuration_alone_rebuilds_the_model(adopted):
    config, clip, _ = adopted
    again = build_clip(json.loads(json.dumps(config)), seed=5)
    again.load_state_dict(clip.state_dict())
    tokens = tokenizer(config)(TEXTS)
    assert torch.equal(again.eval().encode_text(tokens), clip.eval().encode_text(tokens))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.encode_image(pixels), clip.encode_image(pixels))


def test_weights_published_random_or_of_a_file(folders, adopted, tmp_path):
    torch.manual_seed(7)
    other = timm.create_model("test_resnet")
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pth")
    before = torch.random.get_rng_state()
    _, filed, _ = adopt_towers(options(folders, image_weights=str(tmp_path / "other.pth")), 0)
    assert torch.equal(filed.visual.trunk.conv1[0].weight, other.conv1[0].weight)
    fresh = options(folders, image_weights="random", text_weights="random")
    drawn = [adopt_towers(fresh, seed)[1].state_dict() for seed in (0, 0, 1)]
    hashes = [state_sha256(state) for state in drawn]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(before, torch.random.get_rng_state())
    assert fresh.from_scratch and not options(folders).from_scratch
    mine = adopted[1].state_dict()
    for name, same in (
        ("visual.head.proj.weight", True),
        ("text.proj.weight", True),
        ("visual.trunk.conv1.0.weight", False),
        ("text.transformer.embeddings.word_embeddings.weight", False),
    ):
        assert torch.equal(mine[name], drawn[0][name]) == same, name


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "mpnet"])
def test_other_encoders_leave_no_weight_without_gradient(folders, family, tmp_path):
    text = text_folder(tmp_path / family, family, max_position_embeddings=40)
    config, clip, _ = adopt_towers(options((folders[0], text), context_length=12), 0)
    clip.encode_text(tokenizer(config)(TEXTS)).square().sum().backward()
    assert [n for n, p in clip.text.named_parameters() if p.grad is None] == []


def test_a_decoder_needs_the_mean(folders, tmp_path):
    pair = folders[0], text_folder(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"reads forwards only.*--text-pooling mean"):
        adopt_towers(options(pair), 0)
    adopt_towers(options(pair, text_pooling="mean"), 0)


GRIDS = [
    ("test_resnet", 64, lambda t, x: t.forward_features(x).flatten(2).mean(2)),
    ("test_vit", 64, lambda t, x: t.forward_features(x)[:, 1:].mean(1)),
    ("test_convnext", 64, lambda t, x: t.forward_features(x).flatten(2).mean(2)),
    ("mobilenetv3_small_050", 64, lambda t, x: t.forward_features(x).flatten(2).mean(2)),
    ("test_mambaout", 64, lambda t, x: t.forward_features(x).flatten(1, 2).mean(1)),
]


@pytest.mark.parametrize("name,size,mean", GRIDS, ids=[g[0] for g in GRIDS])
def test_a_feature_grid_is_averaged_and_the_pooled_feature_unchanged(name, size, mean):
    visual = image_tower(name, 8, size).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        pooled, found = pooled_and_mean(visual, pixels)
        assert torch.equal(pooled, visual(pixels))
        torch.testing.assert_close(found, mean(visual.trunk, pixels))
    assert grid_width(visual) == found.shape[1]


def test_towers_without_a_grid_say_so():
    visual = image_tower("pit_ti_224", 8, 224).train()
    assert grid_width(visual) == 0 and visual.trunk.training
    with pytest.raises(UserError, match="ends in no feature grid"):
        pooled_and_mean(visual.eval(), torch.zeros(1, 3, 224, 224))
    native = build_clip(model_config("scenes-vit")).visual
    assert grid_width(native) == 128


def test_looking_for_a_grid_leaves_the_running_statistics(adopted):
    clip = adopted[1].train()
    before = state_sha256(clip.state_dict())
    assert SuperCLIP(clip, (0.5,) * 3, (0.5,) * 3).patch_width > 0
    assert clip.visual.trunk.training and state_sha256(clip.state_dict()) == before


def test_recomputed_activations_give_the_same_gradients(adopted):
    config, clip, _ = adopted
    model = SuperCLIP(clip, (0.5,) * 3, (0.5,) * 3).train()
    images, tokens = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), tokenizer(config)
    grads = []
    for checkpointing in (False, True, False):
        clip.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        out = model(images, tokens(TEXTS[:3]))
        (out.image_features @ out.text_features.T).square().sum().backward()
        grads.append({n: p.grad for n, p in clip.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    for name, value in grads[0].items():
        assert torch.equal(value, grads[1][name]) and torch.equal(value, grads[2][name]), name


# The whole command


WORDS = (
    "--embed-dim 16 --image-size 64 --context-length 20 --train-num-samples 128 "
    "--batch-size 32 --head-vocab seen --log-every 1 --save-every 2 --precision fp32"
)


def trained(*words: str) -> str:
    """What `superclip.train` prints, in this very process."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(list(words))
    return said.getvalue()


@pytest.fixture(scope="module")
def run(folders, few_scenes, tmp_path_factory):
    """A finished run; its folders of towers are gone afterwards, as on another machine."""
    out, copies = tmp_path_factory.mktemp("run") / "run", tmp_path_factory.mktemp("copies")
    for folder, name in zip(folders, ("resnet", "distilbert")):
        shutil.copytree(folder, copies / name)
    towers = ["--image-tower", f"timm/{copies}/resnet", "--text-tower", f"hf/{copies}/distilbert"]
    words = [*WORDS.split(), *towers, "--val-data", str(few_scenes)]
    assert "superclip timm/resnet + hf/distilbert on scenes" in trained(*words, "--out", str(out))
    cut = out.parent / "cut"
    cut.mkdir()
    for name in ("run.json", "step_2.pt"):  # killed after step 2
        shutil.copy(out / name, cut / name)
    assert "resuming from step_2.pt" in trained(*words, "--out", str(cut))
    shutil.rmtree(copies)
    return out, cut


def test_four_steps_are_two_a_restart_and_two(run):
    """Batch norm, dropout and the optimizer with them."""
    whole, cut = (torch.load(folder / "epoch_1.pt", weights_only=True) for folder in run)
    for part in ("state_dict", "token_head"):
        a, b = (content[part] for content in (whole, cut))
        a, b = (x.get("state_dict", x) for x in (a, b))
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    states = (content["training"]["optimizer"]["state"] for content in (whole, cut))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*map(dict.values, states)))


def test_a_checkpoint_opens_where_the_towers_are_not(run):
    found = load_checkpoint(run[0] / "final_epoch.pt")
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.preprocess.size == 64
    assert {"timm", "transformers", "tokenizers"} <= set(found.facts["versions"])
    scene = Scenes("val", 4).read(0)
    tokens = tokenizer(found.model_config)(list(scene.captions))
    features = found.model.encode_text(tokens)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert found.model.token_head is not None and found.model.token_head.source == "patches"
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pooled, means = found.model.encode_patches(images)
    assert pooled.shape == (2, 16) and means.shape == (2, found.model.patch_width)
    expected = F.normalize(found.model.clip.encode_image(found.model.normalise(images)), dim=1)
    torch.testing.assert_close(pooled, expected)


def test_interp_and_export_name_what_they_refuse(run, tmp_path):
    checkpoint = run[0] / "final_epoch.pt"
    with pytest.raises(UserError, match="TimmModel is not modelled; only open_clip's own"):
        HookedVisionTransformer(load_checkpoint(checkpoint).model.clip.visual)
    for to in ("open_clip", "datacomp"):
        with pytest.raises(UserError, match=f"--to {to}.*use --to superclip"):
            export(ExportConfig(checkpoint, to, tmp_path / "out"))  # pyright: ignore[reportArgumentType]
    folder, _ = export(ExportConfig(run[0] / "step_2.pt", "superclip", tmp_path / "out"))
    card = (folder / "README.md").read_text()
    assert "does not open in plain open_clip" in card and "library_name: superclip" in card
    assert str(run[0].parent) not in card and "/copies" not in card and "tmp/" not in card
    opened = load_checkpoint(folder / "final_epoch.pt").model.clip.state_dict()
    expected = torch.load(run[0] / "step_2.pt", weights_only=True)
    assert state_sha256(opened) == state_sha256(expected["state_dict"])
    assert "training" not in torch.load(folder / "final_epoch.pt", weights_only=True)


@pytest.mark.slow
def test_evaluation_of_such_a_checkpoint(run):
    words = "--tasks retrieval zeroshot compositional --num 100 --pool 50 --val-data scenes"
    done = command("superclip.evaluate", "--ckpt", str(run[0] / "final_epoch.pt"), *words.split())
    assert done.returncode == 0, done.stderr
    assert "timm/resnet + hf/distilbert (ReLU)" in done.stdout and "top-1" in done.stdout


# Mistakes


@pytest.mark.parametrize(
    "given,message",
    [
        ({"image_tower": "resnet50", "text_tower": "hf/x"}, "spell it timm/NAME"),
        ({"image_tower": "timm/resnet50", "text_tower": "hf/"}, "spell it hf/NAME"),
        ({"image_tower": "timm/resnet50"}, "go together"),
        ({"embed_dim": 64}, "--embed-dim goes with --image-tower"),
        ({"image_weights": "random"}, "--image-weights goes with --image-tower"),
        ({"model": "small-vit", "image_tower": "timm/x", "text_tower": "hf/x"}, "leave one out"),
        ({"pretrained": "openai", "image_tower": "timm/x", "text_tower": "hf/x"}, "leave one out"),
        ({"context_length": 2, "image_tower": "timm/x", "text_tower": "hf/x"}, "at least 3"),
    ],
)
def test_options_that_contradict_each_other(given, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**given)


def test_every_option_survives_the_checkpoint():
    towers = {"image_tower": "timm/x", "text_tower": "hf/x", "embed_dim": 8, "image_size": 64}
    more = {"image_weights": "random", "text_weights": "random", "text_pooling": "mean"}
    config = train_config(towers | more | {"context_length": 12})
    assert train_config(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UserError, match="'max' is not one of cls, mean"):
        train_config(towers | {"text_pooling": "max"})


def test_mistakes_are_named_with_the_way_out(folders, tmp_path):
    good, (image, text) = options(folders), folders

    def says(message, **changes):
        with pytest.raises(UserError, match=message) as caught:
            adopt_towers(dataclasses.replace(good, **changes), 0)
        assert "\n" not in str(caught.value)

    def broken(name, *missing, of=text):
        shutil.copytree(of, tmp_path / name)
        for file in missing:
            (tmp_path / name / file).unlink()
        return f"{'hf' if of is text else 'timm'}/{tmp_path / name}"

    says("timm knows no 'resnet5'; did you mean 'resnet50'", image_tower="timm/resnet5")
    says("unknown weights 'nope'", image_tower="timm/resnet50.nope")
    says("there is no folder", image_tower="timm//nowhere")
    says("there is no folder", text_tower="hf/./nowhere")
    says("config.json can't be read", image_tower=broken("i1", "config.json", of=image))
    says("No suitable checkpoints", image_tower=broken("i2", "model.safetensors", of=image))
    says("config.json can't be read", text_tower=broken("t1", "config.json"))
    says("no file named model.safetensors", text_tower=broken("t2", "model.safetensors"))
    says("has no tokenizer", text_tower=broken("t3", "tokenizer.json"))
    says("is no file", image_weights="nowhere.pth")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    says("does not fit test_resnet", image_weights=str(tmp_path / "vit.pth"))
    says("does not take 600 tokens.*end at 512", context_length=600)
    says(
        "does not fit|does not take pictures of 70",
        image_tower="timm/test_vit",
        image_weights="random",
        image_size=70,
    )
    says("no padding token", text_tower=f"hf/{text_folder(tmp_path / 'p', pad=False)}")
    says("no encoder", text_tower=f"hf/{text_folder(tmp_path / 't5', 't5')}")
    config = json.loads((text / "config.json").read_text())
    for name, change, message in (
        ("c1", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}, "never run"),
        ("c2", {"vocab_size": 20}, "belong to different models"),
        ("c3", {"n_layers": 3}, "weights lack 'transformer.layer.2"),
    ):
        where = broken(name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        says(message, text_tower=where)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, folders):
    """Told to be offline, its client asks for nothing; without a network it finds as little."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for changes, way_out in (
        ({"image_tower": "timm/test_resnet"}, "give --image-weights FILE"),
        ({"text_tower": "hf/nobody/nothing"}, "a local copy goes as hf/FOLDER"),
    ):
        with pytest.raises(UserError, match=f"can't be opened.*{way_out}") as caught:
            adopt_towers(dataclasses.replace(options(folders), **changes), 0)
        assert "\n" not in str(caught.value)
