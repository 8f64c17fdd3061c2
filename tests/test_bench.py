"""Every subcommand of scripts/bench.py runs at toy size and prints its table; nothing is timed."""

import importlib
import json
import mmap
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

PARTS = "core", "memory", "trainers"
LABELS = {
    "sweep --model scenes-vit --batch-size 2 --stratum 4 --looped 2": [
        "scenes-vit: sweep / plain forward",
        "forward with attention rows",
        "metrics",
        "scenes-vit: scoring, loops / ours",
        "without patch_auroc",
    ],
    "train --model scenes-vit --step-batch-size 2 --num 4 --batch-size 2": [
        "scenes-vit, steps: ours / open_clip_train",
        "tiny-vit-224, photographs: ours / open_clip_train",
        "SuperCLIP's time / CLIP's",
        "ours, superclip",
    ],
    "token-loss --model scenes-vit --step-batch-size 2": ["SuperCLIP's time / CLIP's"],
    "memory --steps 4 --model scenes-vit --batch-size 4": ["a tiny SuperCLIP's step"],
    "loader --num 4 --batch-size 2": ["ours / open_clip_train", "reading and decoding alone"],
    "features --num 4 --batch-size 2 --model scenes-vit": ["encoder", "loader and forward"],
    "ablate --model scenes-vit --batch-size 2": [
        "all tokens: sweep / loop",
        "class token: sweep / loop",
        "direct effects / forward",
        "attribution / forward",
        "one head at a time",
    ],
    "masks --model scenes-vit --batch-size 2 --keep 0.5": ["keep 0.5: share of the saving"],
    "retrieval --images 128 --share 2": ["rate of ranks / of the matrix product", "ranks"],
    "scenes --num 4": ["picture and graph", "with caption and boxes (Record)"],
}


@pytest.fixture
def bench(monkeypatch):
    """The script and its parts; the thread settings it makes are undone."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    threads = torch.get_num_threads()
    modules = {name: importlib.import_module(f"benches.{name}") for name in PARTS}
    yield SimpleNamespace(main=importlib.import_module("bench").main, **modules)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("words", LABELS, ids=lambda words: words.split()[0])
def test_a_subcommand_prints_its_table_and_writes_every_round(words, bench, tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main([*words.split(), "--rounds", "2", "--threads", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    rows = {row["label"].strip(): row for row in report["rows"]}
    for label in LABELS[words]:
        assert label in printed
        assert len(rows[label]["rounds"]) == 2
        for clock in ("wall", "cpu"):
            spread = rows[label][clock]
            assert spread["min"] <= spread["median"] <= spread["max"]
            # A share of the saving may be anything in a toy that is measured for moments.
            assert spread["min"] > 0 or "share of the saving" in label
    assert "1 threads; 2 rounds" in printed and report["machine"]["threads"] == 1


def test_benches_read_shards_that_are_given(bench, tmp_path, capsys):
    """Ours and open_clip_train's hand on the same pictures, or the bench itself fails."""
    from superclip.data.shard_writer import write_shards

    write_shards(((bench.trainers.photograph(row), [row]) for row in range(4)), tmp_path, "train")
    shards = str(tmp_path / "train-000000.tar")
    words = ["--shards", shards, "--batch-size", "2", "--rounds", "1", "--num"]
    small = ["--model", "scenes-vit", "--step-batch-size", "2", "--workers", "2"]
    for name in (["loader"], ["train", *small]):
        bench.main([*name, *words, "4"])
        assert f"4 pictures ({shards}" in capsys.readouterr().out
        with pytest.raises(ValueError, match="holds only 4 pictures"):
            bench.main([*name, *words, "8"])


def test_both_trainers_learn_from_the_same_batch(bench, tmp_path):
    """The peer that is timed really trains: its loop and ours change weights, with every batch."""
    from superclip.training.loop import fit

    setup = bench.trainers.Setup(tmp_path, bench.trainers.tiny_model(tmp_path, 32), 2, steps=3)
    peer, (run, state) = bench.trainers.Peer(setup), bench.trainers.our_run(setup, "clip")
    batches = list(bench.trainers.our_batches(run, 0, 3))
    theirs = [(state.model.normalise(batch.images), batch.tokens) for batch, _ in batches]
    for model, train, items in (
        (peer.model, peer.train, theirs),
        (state.model, lambda feed: fit(run, state, feed), batches),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        feed = bench.trainers.Feed(lambda items=items: items, setup)
        train(feed)
        assert all((a != b).any() for a, b in zip(before, model.parameters()))
        assert len(feed.waits) == 1
        with pytest.raises(AssertionError, match="2 of 3 batches"):
            train(bench.trainers.Feed(lambda items=items: items[:2], setup))
    assert state.step == 5


def test_the_token_term_on_paper_is_near_what_autograd_saves(bench):
    """34 bytes a token, channel and layer, against the saved tensors of a real bf16 forward."""
    from superclip.model.factory import build_clip, model_config

    config = model_config("scenes-vit")
    clip, held = build_clip(config), {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    count, (vision, text) = 64, (config["vision_cfg"], config["text_cfg"])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = clip(torch.zeros(count, 3, 80, 80), torch.zeros(count, 20, dtype=torch.long))
    for p in clip.parameters():
        held.pop(p.untyped_storage().data_ptr(), None)
    assert out is not None
    cells = 26 * vision["width"] * vision["layers"] + 20 * text["width"] * text["layers"]
    always = 16 * sum(p.numel() for p in clip.parameters())
    line = bench.memory.token_term("scenes-vit", 64)[0]
    assert f"CLIP step {(always + 34 * count * cells) / 1e9:.2f} GB" in line
    assert sum(held.values()) / (count * cells) == pytest.approx(34, rel=0.2)


def test_resident_memory_counts_what_is_touched(bench):
    before = bench.core.resident()
    with mmap.mmap(-1, 10**8) as block:
        block.write(b"1" * 10**8)
        assert 95 < bench.core.resident() - before < 250


def test_sides_take_turns(bench):
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    costs = bench.core.interleave(sides, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [series.shape for series in costs.values()] == [(3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (None, ""),
        (("<=", 4), "<= 4 met"),
        ((">=", 4), ">= 4 missed"),
        (("<=", 2), "<= 2 met by wall, missed by CPU"),
    ],
)
def test_the_verdict_is_that_of_the_median(bench, target, verdict):
    series = np.array([[1, 3], [9, 3], [2, 3]])
    row = bench.core.Row("label", "ratio", series, target)
    assert row.verdict == verdict
    assert row.spread("wall") == (2, 1, 9)


def test_a_mistake_is_one_line():
    assert "--rounds 0" in refused("bench", "scenes", "--rounds", "0", cwd=ROOT / "scripts")
    assert "no multiple" in refused("bench", "loader", "--num", "65", cwd=ROOT / "scripts")
    assert "for each reader" in refused(
        "bench", "train", "--num", "64", "--workers", "2", cwd=ROOT / "scripts"
    )
