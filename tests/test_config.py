import itertools
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, refused

from superclip.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    differences,
    to_dict,
    train_config,
)
from superclip.errors import UserError
from superclip.evaluation.config import EvalConfig
from superclip.flags import parse_train, recipes
from superclip.loss_options import LOSS_OPTIONS, SuperClipOptions


def test_defaults_are_superclip_on_scenes():
    config = parse_train([])
    assert (config.loss, config.data.train_data, config.epochs) == ("superclip", "scenes", 1)
    assert config.options == SuperClipOptions()


def test_precedence_defaults_recipe_file_flags(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("lr = 2e-3\nwd = 0.3\n[data]\nworkers = 2\n")
    recipe = parse_train(["--recipe", "scenes-clip"])
    assert recipe.loss == "clip" and recipe.optim.decay == 0.1
    config = parse_train(["--recipe", "scenes-clip", "--config", str(file), "--wd", "0.4"])
    assert (config.loss, config.lr, config.optim.wd) == ("clip", 2e-3, 0.4)
    assert config.data.workers == 2


def test_a_run_record_is_a_config_file(tmp_path):
    config = parse_train(["--loss", "clip", "--aug-scale", "0.4", "1.0", "--lr", "1e-3"])
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config), "commit": "x"}))
    assert parse_train(["--config", str(tmp_path / "run.json")]) == config


def test_a_record_does_not_allow_what_its_run_was_once_allowed(tmp_path):
    config = parse_train(["--overwrite", "--out", "there"])
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    found = parse_train(["--config", str(tmp_path / "run.json")])
    assert str(found.out) == "there" and not found.overwrite


@pytest.mark.parametrize("nested", [False, True])
def test_another_loss_leaves_a_files_temperature_behind(nested, tmp_path):
    recipe = ["--recipe", "fastclip-v3-cc3m", "--train-data", "scenes"]
    before = parse_train(recipe)
    assert before.optim.lr_tau is not None
    path = tmp_path / "run.json"
    held = to_dict(before)
    path.write_text(
        json.dumps({"config": held} if nested else {"loss": "fastclip-v3", "lr_tau": 0.1})
    )
    found = parse_train(["--config", str(path), "--loss", "clip"])
    assert (found.optim.lr_tau, found.optim.lr_tau_schedule) == (None, "cosine")


@pytest.mark.parametrize(
    ("recipe", "line", "words"),
    [
        ("superclip-b16-512m", 'optimizer = "sgd"', ["--optimizer", "sgd"]),
        ("small-batch-clip", 'loss = "superclip"', ["--loss", "superclip"]),
    ],
)
def test_a_file_changes_a_recipes_loss_or_optimizer_as_a_flag_does(recipe, line, words, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(line)
    begin = ["--recipe", recipe, "--train-data", "scenes"]
    assert parse_train([*begin, "--config", str(path)]) == parse_train([*begin, *words])


def test_round_trip_through_plain_values():
    config = parse_train(["--token-weight", "0.5", "--out", "somewhere"])
    assert train_config(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_parse(name):
    assert parse_train(["--recipe", name]).loss in LOSS_OPTIONS


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion"])
def test_another_optimizer_leaves_a_recipes_own_behind(optimizer, tmp_path):
    recipe = parse_train(["--recipe", "small-batch-sogclr", "--optimizer", optimizer])
    (tmp_path / "run.json").write_text(
        json.dumps({"config": to_dict(parse_train(["--recipe", "small-batch-sogclr"]))})
    )
    record = parse_train(["--config", str(tmp_path / "run.json"), "--optimizer", optimizer])
    assert recipe == record
    assert (recipe.optim.optimizer, recipe.optim.eps, recipe.optim.wd) == (optimizer, 1e-6, None)
    assert recipe.optim.epochs == 30


def test_fastclip_v2_reads_adams_numbers_whatever_the_towers_take():
    words = "--loss fastclip-v2 --optimizer sgd --beta1 0.5"
    assert parse_train(words.split()).optim.beta1 == 0.5


def test_flat_names_do_not_collide():
    parts = [ModelConfig, DataConfig, OptimConfig, TrainConfig]
    for options in LOSS_OPTIONS.values():
        flat = [f.name for part in [*parts, options] for f in fields(part)]
        flat.remove("model")  # the section; the flag is ModelConfig's
        names = [name for name in flat if name not in ("options", "data", "optim")]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--loss clp", "did you mean 'clip'"),
        ("--lrr 1", "did you mean 'lr'"),
        ("--loss clip --token-loss bce", "belongs to --loss superclip"),
        ("--lr 0", "--lr 0.0 must be above 0"),
        ("--lr", "--lr"),
        ("--batch-size x", "--batch-size"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--precision fp8", "amp_bf16"),
        ("--recipe nope", "--recipe list"),
        ("--config nope.toml", "nope.toml"),
        ("--token-weight 0", "use --loss clip"),
        ("--aug-scale 0.9 0.5", "low <= high"),
        ("--epochs 0", "--epochs 0"),
        ("--accum-freq 0", "--accum-freq"),
        ("--train-num-samples 0", "--train-num-samples"),
        ("--global-batch-size 0", "at least 1"),
        ("--max-skip-rate 2", "in [0, 1]"),
        ("--reader-timeout 0", "above 0"),
        ("--track mlflow", "tensorboard, wandb"),
        ("--keep-last 0", "at least 1"),
        ("--save-every-minutes -1", "time span"),
        ("--train-data a.tar::b.tar --train-data-weights 1", "each of the 2 source(s)"),
        ("--on-nonfinite ignore", "stop"),
        ("--loss clip --lr-tau 0 --lr-tau-schedule const", "--lr-tau 0 holds the temperature"),
        ("--loss sogclr --lr-tau 0.1", "keeps constant temperatures"),
        ("--loss isogclr --lr-tau-schedule const", "keeps individual temperatures"),
        ("--loss vicreg --init-scale 10", "vicreg has no temperature"),
        ("--loss neuclip --npn-repetition 0 --npn-lr 0.1", "takes none of its steps"),
        ("--loss clip --optimizer sgd --beta1 0.5", "nothing that --optimizer sgd reads"),
        ("--loss clip --optimizer lion --eps 1e-8", "nothing that --optimizer lion reads"),
        ("--lr-min 1e-3", "--lr-min 0.001 is above --lr 0.0005"),
    ],
)
def test_mistakes_become_one_line(words, said):
    with pytest.raises(UserError) as caught:
        parse_train(words.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_config_files_are_checked(tmp_path):
    file = tmp_path / "c.toml"
    for text, said in (
        ("lrr = 1", "did you mean 'lr'"),
        ("lr = 'fast'", "not a float"),
        ("lr = true", "not a float"),
        ("precision = 'fp8'", "fp8"),
        ("lr = ", "neither TOML"),
        ("loss = 'clip'\ntoken_loss = 'bce'", "token_loss"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(said)):
            parse_train(["--config", str(file)])


def test_differences_name_what_decides_the_result_only():
    old = parse_train([])
    assert differences(old, parse_train(["--workers", "3", "--log-every", "7"])) == []
    found = differences(old, parse_train(["--lr", "1e-3", "--token-loss", "bce"]))
    assert found == ["token_loss: idf -> bce", "lr: None -> 0.001"]


def test_eval_config_checks():
    with pytest.raises(UserError, match="--num 0"):
        EvalConfig(num=0)


COMMANDS = {
    "superclip.train": ["--token-weight", "--resize", "--accum-freq"],
    "superclip.evaluate": ["--protocol", "--pool"],
    "superclip.pack": ["coco", "scenes"],
    "interp.sweep": ["--kind", "--untrained", "--metric"],
    "interp.ablate": ["--units", "--sets", "--kinds"],
    "interp.relevance": ["--methods", "--draws"],
    "interp.lens": ["--concepts", "--lens"],
    "interp.patch": ["--pairs", "--tau", "--every-patch"],
    "interp.circuit": ["--faithfulness", "--kind", "--edges"],
    "interp.compare": ["--against", "--also", "--kind"],
    "interp.report": ["--challenger"],
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_teaches_and_touches_no_torch(name):
    probe = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{name}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'matplotlib', 'transformer_lens'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in COMMANDS[name]:
        assert word in done.stdout


def test_unknown_flag_of_a_command_is_one_line():
    assert "did you mean 'kind'" in refused("interp.sweep", "--kin", "class")


def test_the_global_batch_is_dealt_out_whole():
    for ranks, batch in itertools.product((1, 2, 3, 4, 6), (None, 1, 7, 64)):
        options = OptimConfig(global_batch_size=48, batch_size=batch)
        whole, micro, accum = options.dealt(ranks)
        assert (whole, micro * accum * ranks) == (48, 48) and (batch is None or micro <= batch)
    with pytest.raises(UserError, match="use 1, 2, 3, 4, 6, 8, 12, 16, 24, 48 of them"):
        OptimConfig(global_batch_size=48).dealt(5)
