import copy
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from torch.nn import BatchNorm2d

from superclip.errors import UserError
from superclip.model.factory import (
    RESIZE_MODES,
    activation_name,
    build_clip,
    load_pretrained,
    model_config,
    preprocess_for,
    special_ids,
    tokenizer,
    unlike_published,
    vocabulary_size,
)
from superclip.model.superclip import SuperCLIP, TokenHead
from superclip.model.weights import (
    load_checkpoint,
    newest_checkpoint,
    read_tensors,
    state_sha256,
    steps_of,
)
from superclip.training.utilization import pair_flops

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def clip():
    return build_clip(model_config("scenes-vit")).eval()


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    return images, tokenizer(model_config("scenes-vit"))(["a red cup", "a blue anchor in the snow"])


def test_features_are_open_clips_own(clip, inputs):
    images, tokens = inputs
    pixels = (images / 255 - 0.5) / 0.5
    expected = clip(pixels, tokens)
    for head in (None, TokenHead(128, 49408)):
        out = SuperCLIP(clip, MEAN, STD, head)(images, tokens)
        torch.testing.assert_close(out.image_features, expected["image_features"])
        torch.testing.assert_close(out.text_features, expected["text_features"])
        torch.testing.assert_close(out.scale, expected["logit_scale"])


COMPILED = """
import torch
from superclip.model.factory import build_clip, model_config
from superclip.model.superclip import SuperCLIP, TokenHead
clip, head = build_clip(model_config("scenes-vit")), TokenHead(128, 49408)
plain, compiled = (SuperCLIP(clip, (0.5,) * 3, (0.5,) * 3, head) for _ in range(2))
compiled.compile_towers(backend="aot_eager")
inputs = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8), torch.ones(2, 20, dtype=int)
for checkpointing in (False, True):
    clip.set_grad_checkpointing(checkpointing)
    for a, b in zip(vars(plain(*inputs)).values(), vars(compiled(*inputs)).values()):
        torch.testing.assert_close(a, b)
print("equal")
"""


def test_towers_compile_as_one_graph_each():
    """`fullgraph` makes a graph break an error. Its own process: the tests' type checks would be
    such a break."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_head_reads_the_mean_patch_after_the_final_norm(clip, inputs):
    images, tokens = inputs
    head = TokenHead(128, 49408)
    out = SuperCLIP(clip, MEAN, STD, head)(images, tokens)
    seen = []
    handle = clip.visual.ln_post.register_forward_hook(lambda m, i, o: seen.append(o))
    clip.encode_image((images / 255 - 0.5) / 0.5)
    handle.remove()
    expected = head.norm(seen[0][:, 1:].mean(1))
    torch.testing.assert_close(out.token_hidden, expected)
    torch.testing.assert_close(head.linear(out.token_hidden), head(seen[0][:, 1:].mean(1)))


def test_pooled_head_reads_the_projected_feature(clip, inputs):
    images, tokens = inputs
    out = SuperCLIP(clip, MEAN, STD, TokenHead(128, 49408, "pooled"))(images, tokens)
    torch.testing.assert_close(out.token_hidden, clip.encode_image((images / 255 - 0.5) / 0.5))


def test_equal_seeds_give_equal_weights_whatever_was_drawn_before():
    config = model_config("scenes-vit")
    first = state_sha256(build_clip(config, 3).state_dict())
    torch.rand(5)
    assert state_sha256(build_clip(config, 3).state_dict()) == first
    assert state_sha256(build_clip(config, 4).state_dict()) != first


def test_special_ids_are_padding_start_and_end(inputs):
    _, tokens = inputs
    pad, start, end = special_ids(tokenizer(model_config("scenes-vit")))
    assert (tokens[:, 0] == start).all() and (tokens == end).any(1).all() and tokens[0, -1] == pad


def test_quickgelu_mismatch_names_the_right_model(clip):
    with pytest.raises(UserError, match="use --model ViT-B-32-quickgelu"):
        load_pretrained(clip, "ViT-B-32", model_config("ViT-B-32"), "openai")
    with pytest.raises(UserError, match="did you mean 'openai'"):
        load_pretrained(clip, "ViT-B-32-quickgelu", model_config("ViT-B-32-quickgelu"), "openia")


def test_local_weights_are_loaded_or_refused(clip, tmp_path):
    config = model_config("scenes-vit")
    torch.save(build_clip(config, 5).state_dict(), tmp_path / "w.pt")
    target = build_clip(config)
    load_pretrained(target, "scenes-vit", config, str(tmp_path / "w.pt"))
    assert state_sha256(target.state_dict()) == state_sha256(build_clip(config, 5).state_dict())
    torch.save(build_clip(model_config("small-vit")).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not fit scenes-vit"):
        load_pretrained(target, "scenes-vit", config, str(tmp_path / "other.pt"))


def test_activation_is_recorded(clip):
    config = model_config("scenes-vit") | {"quick_gelu": True}
    assert activation_name(clip.visual) == "GELU"
    assert activation_name(build_clip(config).visual) == "QuickGELU"


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="did you mean 'ViT-B-32-quickgelu'"):
        model_config("ViT-B-32-quickgel")
    with pytest.raises(UserError, match="captioning models"):
        model_config("coca_ViT-B-32")


def test_preprocessing_defaults_are_openais():
    found = preprocess_for(model_config("scenes-vit"), "squash")
    assert (found.size, found.mode, found.mean) == (80, "squash", open_clip.OPENAI_DATASET_MEAN)


@pytest.mark.parametrize("ours", ["crop", "squash", "pad"])
def test_published_weights_see_pictures_as_they_did(ours):
    config, tag = model_config("scenes-vit"), {"resize_mode": RESIZE_MODES[ours]}
    found = preprocess_for(config, None, tag)
    assert found.mode == ours and unlike_published(found, tag) is None
    bilinear = unlike_published(found, tag | {"interpolation": "bilinear"})
    assert bilinear is not None and "bilinear" in bilinear
    other = "squash" if ours == "crop" else "crop"
    told = unlike_published(preprocess_for(config, other, tag), tag)
    assert told is not None and f"--resize {ours}" in told
    assert preprocess_for(config, None).mode == "crop"
    assert unlike_published(preprocess_for(config, None), None) is None


def test_a_hugging_face_vocabulary_is_its_tokenizers():
    config = {"text_cfg": {"hf_tokenizer_name": "some/encoder"}}
    assert vocabulary_size(config, SimpleNamespace(tokenizer=range(250_002))) == 250_002
    assert vocabulary_size({"text_cfg": {"vocab_size": 7}}, None) == 7
    assert vocabulary_size({"text_cfg": {}}, None) == 49_408


def test_counting_operations_leaves_running_statistics_alone():
    """Also where the last map is a single value, which batch norm refuses to train on."""
    config = model_config("scenes-vit")
    for size in (64, 32):
        vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": size, "patch_size": None}
        clip = build_clip({**config, "vision_cfg": vision})
        model = SuperCLIP(clip, MEAN, STD).train()
        before = copy.deepcopy(model.state_dict())
        assert pair_flops(model, size, config["text_cfg"]["context_length"]) > 1e6
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(m.track_running_stats for m in model.modules() if isinstance(m, BatchNorm2d))


def test_checkpoint_opens_in_plain_open_clip(tiny_run, inputs, tmp_path):
    """The weights are exactly open_clip's; our own JSON models open by configuration."""
    images, tokens = inputs
    found = load_checkpoint(tiny_run / "final_epoch.pt")
    plain = open_clip.CLIP(**found.model_config)
    open_clip.load_checkpoint(plain, str(tiny_run / "final_epoch.pt"), weights_only=True)
    plain.eval()
    pixels = found.model.normalise(images)
    with torch.no_grad():
        expected = plain.encode_image(pixels, normalize=True)
        torch.testing.assert_close(found.model.encode_image(images), expected)
        expected = plain.encode_text(tokens, normalize=True)
        torch.testing.assert_close(found.model.encode_text(tokens), expected)
    assert set(found.facts) >= {"activation", "init_sha256", "data_sha256", "commit"}


TRAP = Path(tempfile.gettempdir()) / f"superclip-trap-{os.getpid()}"


class Trap:
    def __reduce__(self):
        return (Path.touch, (TRAP,))


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    path = tmp_path / "trap.pt"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(UserError, match="refused, nothing in it was run"):
        read_tensors(path)
    assert not TRAP.exists()
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError):
        read_tensors(tmp_path / "raw.pt")
    assert not TRAP.exists()


def test_damaged_checkpoints_get_one_line(tiny_run, tmp_path):
    whole = (tiny_run / "final_epoch.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "cut.pt")
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    content = read_tensors(tiny_run / "final_epoch.pt")
    torch.save(content | {"schema": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="schema 99"):
        load_checkpoint(tmp_path / "new.pt")
    other = build_clip(model_config("small-vit")).state_dict()
    torch.save(content | {"state_dict": other}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"state_dict": other}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="need --model NAME"):
        load_checkpoint(tmp_path / "plain.pt")


def test_steps_of_an_epoch_without_a_sound_run_json(tiny_run, tmp_path):
    """256 pictures in batches of 32: the file itself counts 8 steps."""
    epoch = tmp_path / "epoch_1.pt"
    shutil.copy(tiny_run / "epoch_1.pt", epoch)
    for text in (None, "[]", "null", '{"steps_per_epoch": null}', "cut"):
        if text is not None:
            (tmp_path / "run.json").write_text(text)
        assert steps_of(epoch) == 8
    (tmp_path / "run.json").write_text('{"steps_per_epoch": 12}')
    assert steps_of(epoch) == 12
    (tmp_path / "run.json").unlink()
    torch.save({"state_dict": {}}, epoch)
    with pytest.raises(UserError, match="no count of steps"):
        steps_of(epoch)


def test_newest_checkpoint_is_numeric(tmp_path):
    (tmp_path / "run.json").write_text('{"steps_per_epoch": 10}')
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_2.pt", "step_95.pt"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path).name == "epoch_10.pt"
    (tmp_path / "step_101.pt").touch()
    assert newest_checkpoint(tmp_path).name == "step_101.pt"
    (tmp_path / "final_epoch.pt").touch()
    assert newest_checkpoint(tmp_path).name == "final_epoch.pt"
    with pytest.raises(UserError, match="no checkpoint"):
        newest_checkpoint(tmp_path / "empty")


def test_operations_of_a_pair_are_those_of_the_architecture():
    """By hand, in multiplications: patches, then in each layer 12 width^2 a token and 2 width a
    pair of tokens, then the projection."""

    def tower(tokens, width, layers, out):
        return layers * (12 * tokens * width**2 + 2 * tokens**2 * width) + width * out

    clip = build_clip(model_config("scenes-vit")).eval()
    vision, text = (model_config("scenes-vit")[f"{part}_cfg"] for part in ("vision", "text"))
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    by_hand = patches * vision["width"] * 3 * vision["patch_size"] ** 2
    by_hand += tower(patches + 1, vision["width"], vision["layers"], 128)
    by_hand += tower(text["context_length"], text["width"], text["layers"], 128)
    model = SuperCLIP(clip, MEAN, STD, TokenHead(128, 49408)).eval()
    found = pair_flops(model, vision["image_size"], text["context_length"])
    assert found == pytest.approx(6 * (by_hand + 128 * 49408), rel=1e-6)
    assert not model.training
