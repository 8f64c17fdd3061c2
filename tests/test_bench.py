"""Every subcommand of scripts/bench.py runs at toy size and prints its table; nothing is timed."""

import importlib
import json
import os

import pytest
import torch
from conftest import ROOT, refused

LABELS = {
    "sweep --model scenes-vit --batch-size 2 --stratum 4 --looped 2": [
        "scenes-vit: sweep / plain forward",
        "forward with attention rows",
        "metrics",
        "scenes-vit: scoring, loops / ours",
        "without patch_auroc",
    ],
    "token-loss --model scenes-vit --batch-size 2": ["scenes-vit: SuperCLIP / CLIP", "CLIP step"],
    "scenes --num 4": ["picture and graph", "with caption and boxes (Record)"],
    "loader --num 4 --batch-size 2": ["ours / open_clip_train", "open_clip_train"],
}


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; the thread settings it makes are undone."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    threads = torch.get_num_threads()
    yield importlib.import_module("bench")
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
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert "1 threads; 2 rounds" in printed and report["machine"]["threads"] == 1


def test_the_loader_bench_reads_shards_that_are_given(bench, tmp_path, capsys):
    """Ours and open_clip_train's count the same pictures, or the bench itself fails."""
    from superclip.data.shards import write_shards

    write_shards(((bench.photograph(row), [row]) for row in range(4)), tmp_path, "train")
    shards = str(tmp_path / "train-000000.tar")
    bench.main(["loader", "--shards", shards, "--num", "4", "--batch-size", "2", "--rounds", "1"])
    assert f"4 pictures a round ({shards}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds only 4 pictures"):
        bench.main(["loader", "--shards", shards, "--num", "6", "--batch-size", "2"])


def test_sides_take_turns_and_costs_are_combined_round_by_round(bench):
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    costs = bench.interleave(sides, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(series) for series in costs.values()] == [3, 3]
    a, b = [bench.Cost(3, 8), bench.Cost(4, 6)], [bench.Cost(1, 2), bench.Cost(2, 2)]
    assert bench.ratio(a, b) == [(3, 4), (2, 3)]
    assert bench.total([a, b]) == [(4, 10), (6, 8)]


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
    series = [bench.Cost(1, 3), bench.Cost(9, 3), bench.Cost(2, 3)]
    row = bench.Row("label", "ratio", series, target)
    assert row.verdict == verdict
    assert row.spread("wall") == (2, 1, 9)


def test_a_mistake_is_one_line():
    assert "--rounds 0" in refused("scripts.bench", "scenes", "--rounds", "0")
    assert "no multiple" in refused("scripts.bench", "loader", "--num", "65")
