"""Every loss through the whole trainer: accumulation, restarts, ranks, optimizers."""

import copy
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from test_resume import equal, record

from superclip.config import owner_of_keys, train_config
from superclip.data.loader import collate
from superclip.errors import UserError
from superclip.flags import parse_train, read_recipe, recipes
from superclip.loss_options import LOSS_OPTIONS
from superclip.ops.world import World
from superclip.train import main
from superclip.training.build import build_run
from superclip.training.step import train_step

SMALL = {"neuclip": {"npn_num_protos": 20, "npn_restart_iter": 3}}
ALIKE = {"fastclip-v0", "fastclip-v1", "siglip"}
"""Whose state is kept as that of others in the quick suite."""
STATEFUL = sorted(set(LOSS_OPTIONS) - {"clip", "cyclip", "vicreg"})
RESTARTED = [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in STATEFUL]
VALUES = {"train_num_samples": 48, "batch_size": 12, "val_data": "scenes:val", "precision": "fp32"}


@pytest.fixture(autouse=True)
def _held_out(few_scenes):
    """What a run is evaluated on, for `words`, here and in the ranks' processes."""
    os.environ["FEW_SCENES"] = str(few_scenes)


def words(name, out, *more):
    own = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.get(name, {}).items()]
    own += ["--head-vocab", "seen"] if name == "superclip" else []
    size = "--train-num-samples 24 --global-batch-size 12 --epochs 2 --save-every 1 --log-every 1"
    size += f" --val-data {os.environ['FEW_SCENES']} --threads 1 --precision fp32"
    return [*f"--loss {name} {size}".split(), *own, *more, "--out", out]


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_micro_batches_and_the_whole_batch_give_one_gradient(name, tmp_path):
    """SGD without clipping exposes any wrong factor."""
    optim = {"optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "warmup": 0, "grad_clip_norm": None}
    own = SMALL.get(name, {}) | ({"head_vocab": "seen"} if name == "superclip" else {})
    values = VALUES | optim | own | {"loss": name, "out": str(tmp_path / "run")}
    run, state = build_run(train_config(values), World(), [])
    batch, found = collate([run.rows[(0, row, 0)] for row in range(12)])[0], []
    start = [p.detach().clone() for p in state.model.parameters()]
    for accum in (1, 3):
        plan = replace(run.plan, micro_batch=12 // accum, accum_freq=accum)
        after = copy.deepcopy(state)
        train_step(after, batch, replace(run, plan=plan))
        found.append([p.detach() for p in (*after.model.parameters(), *after.loss.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    moved = [not torch.equal(a, b) for a, b in zip(found[0], start)]
    assert sum(moved) >= len(start) - 1


def restarted(name, folder):
    """Train four steps; and two, and the rest by the same command."""
    whole, cut = f"{folder}/{name}", f"{folder}/{name}-cut"
    main(words(name, whole))
    os.makedirs(cut, exist_ok=True)
    if os.environ.get("RANK", "0") == "0":
        for file in ("run.json", "step_1.pt", "metrics.jsonl", "epoch_1.pt"):
            shutil.copy(f"{whole}/{file}", cut)


@pytest.mark.parametrize("name", RESTARTED)
def test_four_steps_equal_two_a_restart_and_two_more(name, tmp_path):
    restarted(name, tmp_path)
    main(words(name, f"{tmp_path}/{name}-cut"))
    hold_equal(name, tmp_path)


def hold_equal(name, folder):
    whole, cut = folder / name, folder / f"{name}-cut"
    a, b = (torch.load(d / "epoch_2.pt", weights_only=True) for d in (whole, cut))
    assert a["training"]["loss"]
    for part in ("state_dict", "training"):
        assert equal(a[part], b[part])
    assert record(cut) == record(whole)


def rank_main(rank, size, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank)}
    for k, name in enumerate(STATEFUL):
        for part in range(2):
            os.environ["MASTER_PORT"] = str(port + 2 * k + part)
            if part == 0:
                restarted(name, folder)
            else:
                main(words(name, f"{folder}/{name}-cut"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_restart_on_three_ranks_is_exact(tmp_path):
    port = 24_000 + os.getpid() % 20_000
    mp.spawn(rank_main, (3, port, str(tmp_path)), nprocs=3)
    for name in STATEFUL:
        hold_equal(name, tmp_path)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lamb", "lion"])
def test_every_optimizer_restarts_exactly(name, tmp_path, capsys):
    more = "--optimizer", name, "--lr-tau", "1e-4", "--lr-tau-schedule", "step_thresh"
    main(words("fastclip-v3", f"{tmp_path}/whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for file in ("step_3.pt", "epoch_2.pt", "final_epoch.pt"):
        (tmp_path / "cut" / file).unlink()
    main(words("fastclip-v3", f"{tmp_path}/cut", *more))
    told = capsys.readouterr().out
    assert "resuming from epoch_1.pt" in told and "ends within its warm-up of 50 steps" in told
    a, b = (torch.load(tmp_path / d / "epoch_2.pt", weights_only=True) for d in ("whole", "cut"))
    assert equal(a["training"], b["training"]) and equal(a["state_dict"], b["state_dict"])
    rates = {g["name"]: g["lr"] for g in a["training"]["optimizer"]["param_groups"]}
    assert rates["scale"] == 1e-4 and rates["decay"] < 1e-4


def test_the_temperature_of_some_losses_stays(tmp_path):
    for name, scale in (("sogclr", 100.0), ("fastclip-v2", 1 / 0.03), ("clip", None)):
        main(words(name, f"{tmp_path}/{name}"))
        kept = torch.load(tmp_path / name / "final_epoch.pt", weights_only=True)["state_dict"]
        stays = math.isclose(kept["logit_scale"].exp().item(), scale or 1 / 0.07, rel_tol=1e-6)
        assert stays == (scale is not None)


@pytest.mark.parametrize(
    "values,told",
    [
        ({"loss": "sogclr", "lr_tau": 1e-3}, "constant"),
        ({"loss": "fastclip-v2", "lr_tau_schedule": "step_thresh"}, "individual"),
        ({"loss": "clip", "optimizer": "lion", "momentum": 0.5}, "sgd"),
        ({"loss": "fastclip-v3", "rho": -1.0}, "--rho -1.0"),
        ({"loss": "sogclr", "gamma": 0.0}, "--gamma 0.0"),
        ({"loss": "isogclr", "tau_range": (0.5, 0.1)}, "--tau-range"),
        ({"loss": "neuclip", "npn_num_protos": 0}, "--npn-num-protos"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(values, told):
    with pytest.raises(UserError, match=told):
        train_config(values)


LIKE_ANOTHER = "cc12m", "laion400m", "dfn192m", "-224", "-336", "bigg14", "b16-i50", "l16-i17"
RECIPES = [
    pytest.param(name, marks=pytest.mark.slow) if any(p in name for p in LIKE_ANOTHER) else name
    for name in sorted(recipes())
]
"""Those that differ from another in numbers alone are tried with the slow tests."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_at_toy_size(name, tmp_path):
    """Its own options for two steps; data, model and sizes are of a toy."""
    values = read_recipe(name)
    values |= {"model": "scenes-vit", "train_data": "scenes", "train_num_samples": 24}
    values |= {"global_batch_size": 12, "epochs": 1, "precision": "fp32", "threads": 1}
    values |= {"val_data": os.environ["FEW_SCENES"], "log_every": 1, "out": str(tmp_path / "run")}
    values |= SMALL.get(values["loss"], {})
    towers = "image_tower", "text_tower", "image_size"  # tests/model/test_towers.py runs such
    if values.get("image_reduction", "").startswith("resize"):
        values["image_reduction"] = "resize:48"
    for key in ("pretrained", "aug_scale", "stage_two", *towers):
        values.pop(key, None)
    if "head_vocab" in owner_of_keys(values["loss"]):
        values["head_vocab"] = "seen"
    (tmp_path / "toy.json").write_text(json.dumps(values))
    main(["--config", str(tmp_path / "toy.json")])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_recipes_say_what_is_published_and_what_is_inferred(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_train(["--recipe", "list"])
    told = capsys.readouterr().out
    for name, path in recipes().items():
        assert name in told
        text = path.read_text()
        assert name.startswith("scenes") or ("ublished" in text and "20" in text.split("\n")[0])


def test_a_global_batch_of_one_has_no_negatives(tmp_path):
    with pytest.raises(UserError, match="no negatives"):
        main(["--loss", "sogclr", "--batch-size", "1", "--train-num-samples", "2",
              "--out", f"{tmp_path}/run"])  # fmt: skip


def test_a_run_of_an_older_layout_is_refused_by_its_version(tmp_path):
    main(words("clip", f"{tmp_path}/run"))
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "old")
    content = torch.load(tmp_path / "run" / "epoch_1.pt", weights_only=True)
    del content["training"]["schema"]
    torch.save(content, tmp_path / "old" / "epoch_1.pt")
    with pytest.raises(UserError, match="training state of schema 1; this version goes on from"):
        main(words("clip", f"{tmp_path}/old"))
