"""A second run that begins with a first one's weights: positions, heads, configurations, chains."""

import json
import shutil

import pytest
import torch
from conftest import command, refused
from torch.nn.functional import interpolate

from superclip.config import TrainConfig
from superclip.errors import UserError
from superclip.flags import all_stages, parse_train, read_recipe, recipes, second_stage
from superclip.model.factory import build_clip, model_config, reduced
from superclip.model.weights import begin_with, read_tensors
from superclip.train import main

STAGE_TWO = """
loss = "superclip"
image_reduction = "random:0.5"
train_num_samples = 24
lr = 1e-4
warmup = 1
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory, few_scenes):
    """A run on 48 px and 7 tokens, and the second one that follows it in the same command."""
    out = tmp_path_factory.mktemp("short")
    (out / "two.toml").write_text(STAGE_TWO)
    words = "superclip.train --train-num-samples 24 --batch-size 12 --threads 1 --head-vocab seen"
    words = [*words.split(), "--image-reduction", "resize:48", "--context-length", "7"]
    words += ["--text-reduction", "random", "--stage-two", str(out / "two.toml")]
    words += ["--val-data", str(few_scenes), "--out", str(out / "run")]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    return out / "run", words, done.stdout


def test_one_command_trains_both_and_again_does_nothing(short):
    run, words, said = short
    assert said.count("done: ") == 2
    first, second = (json.loads((p / "run.json").read_text()) for p in (run, run / "stage2"))
    assert second["config"]["model"]["init_from"] == str(run / "final_epoch.pt")
    assert second["config"]["data"]["text_reduction"] == "truncate"
    assert second["config"]["model"]["context_length"] is None
    assert second["config"]["optim"]["lr"] == 1e-4
    for kept in ("val_data", "train_data"):
        assert second["config"]["data"][kept] == first["config"]["data"][kept]
    assert second["config"]["seed"] == first["config"]["seed"]
    assert second["config"]["optim"]["global_batch_size"] == 12
    assert command(*words).stdout.count("holds this run, finished") == 2


def test_steps_and_captions_are_counted_anew(short):
    run, _, _ = short
    both = read_tensors(run / "stage2" / "epoch_1.pt"), read_tensors(run / "epoch_1.pt")
    assert both[0]["state_dict"]["positional_embedding"].shape[0] == 20
    assert both[1]["state_dict"]["positional_embedding"].shape[0] == 7
    assert both[0]["training"]["step"] == both[1]["training"]["step"] == 2  # counted anew
    assert both[0]["training"]["loss"]["samples"] == 24  # IDF counts, too


def test_only_positions_change_and_the_class_place_does_not(short):
    """A 3 x 3 run in a 6 x 6 and a 14 x 14 tower, and in one of its own size."""
    held = read_tensors(short[0] / "final_epoch.pt")["state_dict"]
    for side in (3, 6, 14):
        config = model_config("scenes-vit")
        config["vision_cfg"]["image_size"] = 16 * side
        config["text_cfg"]["context_length"] = 7 if side == 3 else 20
        clip = build_clip(config, seed=1)
        begin_with(clip, short[0], config)
        for name, tensor in clip.state_dict().items():
            if side == 3 or not name.endswith("positional_embedding"):
                assert torch.equal(tensor, held[name]), name
        grid, old = clip.visual.positional_embedding, held["visual.positional_embedding"]
        assert grid.shape[0] == side**2 + 1 and torch.equal(grid[0], old[0])
        if side > 3:
            planes = old[1:].T.reshape(1, -1, 3, 3)
            how = {"mode": "bicubic", "antialias": True}
            wanted = interpolate(planes, (side, side), **how)
            torch.testing.assert_close(grid[1:], wanted[0].flatten(1).T)
            text = held["positional_embedding"].T[None]
            wanted = interpolate(text, 20, mode="linear")
            torch.testing.assert_close(clip.positional_embedding, wanted[0].T)


def test_the_head_comes_along(short):
    first, second = (read_tensors(p / "final_epoch.pt") for p in (short[0], short[0] / "stage2"))
    a, b = (c["token_head"]["state_dict"]["linear.weight"] for c in (first, second))
    assert a.shape == b.shape and (a - b).abs().max() < 0.01  # a fresh one differs by 0.1 and more
    assert "begins anew" not in short[2]


def test_other_architectures_are_refused(short, tmp_path):
    words = ["superclip.train", "--train-num-samples", "24", "--batch-size", "12", "--out"]
    said = refused(*words, str(tmp_path), "--init-from", str(short[0]), "--model", "small-vit")
    assert "another architecture (vision_cfg: layers, width" in said
    assert "--model scenes-vit" in said
    said = refused(*words, str(tmp_path), "--init-from", str(short[0]), "--pretrained", "openai")
    assert "leave one out" in said
    said = refused(*words, str(tmp_path), "--init-from", str(tmp_path / "nothing"))
    assert "nothing is no checkpoint and no run's folder" in said
    torch.save({"schema": 1, "a": torch.ones(1)}, tmp_path / "x.pt")
    said = refused(*words, str(tmp_path / "run"), "--init-from", str(tmp_path / "x.pt"))
    assert "no checkpoint of this version" in said


def test_mistakes_of_the_second_stage_show_before_the_first(tmp_path):
    words = ["--out", str(tmp_path / "run"), "--stage-two", str(tmp_path / "two.toml")]
    for text, told in (("lrr = 1", "did you mean 'lr'"), ("out = 'x'", "leave it")):
        (tmp_path / "two.toml").write_text(text)
        with pytest.raises(UserError, match=told):
            main(words)
    with pytest.raises(UserError, match=r"--stage-two nowhere.toml is no file and no recipe"):
        main(["--stage-two", "nowhere.toml"])
    for text, told in (
        ('init-from = "x"', "'init-from': write options flat"),
        ('[model]\ninit_from = "x"', "'model': write options flat"),
        ('image_reduction = "resize:83"', "don't tile"),
        ('image_reduction = "grid:0.25"', "windows must tile"),
        ('model = "scenes-vit-s"', "another architecture .vision_cfg: layers, width"),
        ('train_data = "/nope.tar"', "/nope.tar"),
        (f'stage_two = "{tmp_path}/two.toml"', "does a file name an earlier one"),
    ):
        (tmp_path / "two.toml").write_text(text)
        with pytest.raises(UserError, match=told):
            main(words)
    assert not (tmp_path / "run").exists()


def test_stages_have_folders_of_their_own(tmp_path):
    (tmp_path / "two.toml").write_text("")
    for out, wanted in (("run", "run/stage2"), ("stage1", "stage1/stage2"), ("x/stage2", None)):
        words = ["--out", str(tmp_path / out), "--stage-two", str(tmp_path / "two.toml")]
        following = second_stage(parse_train(words))
        assert following is not None
        assert following.out == tmp_path / (wanted or "x/stage2/stage2")


def test_another_optimizer_leaves_the_firsts_numbers_behind(tmp_path):
    (tmp_path / "two.toml").write_text('optimizer = "sgd"')
    words = ["--wd", "0.3", "--beta2", "0.95", "--stage-two", str(tmp_path / "two.toml")]
    following = second_stage(parse_train(words))
    assert following is not None and following.optim.wd != 0.3


def test_a_second_stage_of_other_weights_is_told(short, tmp_path):
    """By their hash, so that another name of the same file, or another folder, is the same."""
    words = [*short[1]]
    moved = tmp_path / "moved"
    shutil.copytree(short[0], moved)
    words[words.index("--out") + 1] = "moved"
    assert command(*words, cwd=tmp_path).stdout.count("holds this run, finished") == 2
    held = read_tensors(moved / "final_epoch.pt")
    held["state_dict"]["logit_scale"] += 1
    torch.save(held, moved / "final_epoch.pt")
    said = refused(*words, cwd=tmp_path)
    assert "moved/stage2 began with other weights than moved/final_epoch.pt holds now" in said


def test_another_activation_is_another_architecture(short):
    config = model_config("scenes-vit") | {"quick_gelu": True}
    with pytest.raises(UserError, match=r"another architecture .model: quick_gelu"):
        begin_with(build_clip(config), short[0], config)


def test_blocks_run_forward_twice_in_bf16_on_a_cpu(few_scenes, tmp_path):
    """Recomputation must find the attention kernel of the forward pass: equal weights."""
    words = ["--train-num-samples", "24", "--batch-size", "12", "--loss", "clip", "--threads", "1"]
    words += ["--precision", "amp_bf16", "--val-data", str(few_scenes), "--device", "cpu"]
    main([*words, "--out", str(tmp_path / "plain")])
    main([*words, "--grad-checkpointing", "--out", str(tmp_path / "twice")])
    one, other = (
        read_tensors(tmp_path / name / "final_epoch.pt")["state_dict"]
        for name in ("plain", "twice")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_was_switched_off_stays_off(tmp_path):
    (tmp_path / "two.toml").write_text("epochs = 1")
    words = ["--grad-clip-norm", "None", "--stage-two", str(tmp_path / "two.toml")]
    following = second_stage(parse_train(words))
    assert following is not None and following.optim.grad_clip_norm is None


def test_positions_freeze_and_thaw(tmp_path, few_scenes):
    """Sin-cos ones stay as made unless told to learn; learnable ones stay if frozen."""
    small = ["--train-num-samples", "24", "--batch-size", "12", "--threads", "1", "--loss", "clip"]
    small += ["--val-data", str(few_scenes), "--warmup", "0"]
    moved = {}
    for model, way in (
        ("scenes-vit-gap", None),
        ("scenes-vit-gap", "learnable"),
        ("scenes-vit", None),
        ("scenes-vit", "frozen"),
    ):
        out = tmp_path / f"{model}-{way}"
        more = [] if way is None else ["--image-positions", way]
        main([*small, "--model", model, "--out", str(out), *more])
        held = read_tensors(out / "final_epoch.pt")["state_dict"]["visual.positional_embedding"]
        moved[model, way] = not torch.equal(
            held, build_clip(model_config(model)).visual.positional_embedding
        )
    assert list(moved.values()) == [False, True, True, False]


def test_the_pooling_of_clipas_towers():
    """Averages of patches alone, normed before or after; the sin-cos table in MAE's form."""
    gap = build_clip(model_config("scenes-vit-gap")).visual
    x = torch.randn(2, 26, 128)
    torch.testing.assert_close(gap._pool(x)[0], gap.ln_post(x)[:, 1:].mean(1))
    config = model_config("scenes-vit-gap")
    large = model_config("clipa-l16")["vision_cfg"]
    config["vision_cfg"]["final_ln_after_pool"] = large["final_ln_after_pool"]
    after = build_clip(config).visual
    torch.testing.assert_close(after._pool(x)[0], after.ln_post(x[:, 1:].mean(1)))
    table, w = gap.positional_embedding, 128
    assert (table[0] == 0).all() and not isinstance(gap.ln_pre, torch.nn.LayerNorm)
    for patch in (0, 7, 24):
        y, xx = divmod(patch, 5)
        omega = 10_000.0 ** (-torch.arange(w // 4, dtype=torch.float64) / (w // 4))
        wanted = torch.cat([f(p * omega) for p in (xx, y) for f in (torch.sin, torch.cos)])
        torch.testing.assert_close(table[patch + 1], wanted.float(), atol=1e-6, rtol=0)


PUBLISHED = {  # tokens of a picture and of a text, pairs, rate, warm-up; section 9.5
    "clipa-b16-i50t16": [(50, 16, 65536, 2.048e-3, 782), (197, 16, 8192, 2.56e-5, 3072)],
    "clipa-l16-i17t16": [(17, 16, 32768, 1.024e-3, 1563), (197, 16, 7168, 2.24e-5, 3571)],
    "clipa-l16-i37t8": [(37, 8, 32768, 1.024e-3, 1563), (197, 32, 7168, 2.24e-5, 3571)],
    "clipa-h14-v2": [
        (37, 8, 65536, 2.048e-3, 3200),
        (180, 32, 32768, 5.12e-5, 800),
        (346, 32, 16384, 6.4e-6, 1600),
    ],
    "clipa-bigg14-v2": [(37, 8, 65536, 1.024e-3, 3200), (154, 32, 16384, 2.56e-5, 1600)],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_stages(name):
    config: TrainConfig | None = parse_train(["--recipe", name, "--out", "logs/x"])
    for number, (image, text, batch, lr, warmup) in enumerate(PUBLISHED[name], 1):
        assert config is not None
        architecture = reduced(model_config(config.model.model), config.model)
        vision = architecture["vision_cfg"]
        side = vision["image_size"] // vision["patch_size"]
        reduction = config.model.reduction
        assert 1 + (side**2 if reduction is None else reduction.kept(side)) == image
        assert architecture["text_cfg"]["context_length"] == text
        optim = config.optim
        assert (optim.global_batch_size, config.lr, optim.warmup) == (batch, lr, warmup)
        assert config.out.as_posix() == ("logs/x" if number == 1 else f"logs/x/stage{number}")
        config = second_stage(config)
    assert config is None
    chained = [n for n in recipes() if n.startswith(name)]
    assert len(chained) == len(PUBLISHED[name])


def test_what_a_recipe_of_the_second_stage_only_repeats_is_the_firsts():
    words = [
        "--recipe",
        "clipa-l16-i37t8",
        "--train-data",
        "scenes",
        "--model",
        "scenes-vit",
        "--wd",
        "0.3",
    ]
    first, second = all_stages(words)
    for one in (first, second):
        assert (one.data.train_data, one.model.model, one.optim.wd) == ("scenes", "scenes-vit", 0.3)
        assert one.data.val_data is None  # that of the recipe's own data
    own = read_recipe("clipa-l16-i37t8-224")
    assert second.lr == own["lr"] != first.lr
    assert second.model.context_length == own.get("context_length")
    kept = all_stages(["--recipe", "clipa-l16-i37t8", "--val-data", "coco:mine"])
    assert [one.data.val_data for one in kept] == ["coco:mine"] * 2


def test_a_mistake_says_of_which_stage_it_is(tmp_path):
    (tmp_path / "two.toml").write_text('train_data = "/nope.tar"')
    with pytest.raises(UserError, match=r"stage 2 \(.*two.toml\): .*/nope.tar"):
        main(["--out", str(tmp_path / "run"), "--stage-two", str(tmp_path / "two.toml")])
