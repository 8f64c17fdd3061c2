"""The sweep end to end: bytes, splits, planted heads, bad input."""

import dataclasses
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import command, refused

from interp import removal
from interp.ablate import main as ablate
from interp.analysis import analyse, plain
from interp.causal.direct import direct_effects
from interp.causal.findings import Judge
from interp.collect import FEWEST, SALIENCY
from interp.config import AblateConfig
from interp.heads import Head
from interp.results import METRICS, SweepResults, images_sha256
from interp.stats.splits import assign_split
from interp.sweep import main as sweep_main
from interp.swept import open_swept
from superclip.errors import UserError

WORDS = "--num 220 --untrained 2 --draws 199 --gallery 4 --threads 1"


def sweep(run, out, *more):
    ckpt = str(run / "final_epoch.pt")
    done = command("interp.sweep", "--ckpt", ckpt, *WORDS.split(), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def swept(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "results"
    return out, sweep(tiny_run, out, "--metric", "legacy-mass")


def test_two_sweeps_write_identical_bytes(tiny_run, swept, tmp_path):
    first, printed = swept
    assert (
        sweep(tiny_run, tmp_path / "again", "--metric", "legacy-mass").replace(
            str(tmp_path / "again"), str(first)
        )
        == printed
    )
    for name in ("results.npz", "results.json", "findings.json", "heads.csv"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_results_hold_what_the_schema_says(swept):
    results = SweepResults.load(swept[0])
    n, layers, heads, p = results.maps.shape
    assert (layers, heads, p) == (4, 4, 25) and results.maps.dtype == np.float16
    np.testing.assert_allclose(results.maps.astype(float).sum(-1), 1, atol=5e-3)
    counts = results.manifest["counts"]
    assert counts["discovery"] + counts["validation"] == n
    assert (
        counts["listed"]
        == 220
        == n
        + sum(
            counts[k]
            for k in ("confirm_set_aside", "trained_on", "without_object", "near_duplicates")
        )
    )
    names = [assign_split(key) for key in results.image_ids]
    assert "confirm" not in names
    assert [("discovery", "validation").index(s) for s in names] == results.split.tolist()
    assert set(results.metrics) == {*METRICS, "legacy_mass"}
    assert results.saliency.shape == (n, len(SALIENCY), p)
    assert results.untrained_maps.shape == (n, 2, p)
    assert results.manifest["untrained"][0]["own_initialisation"]
    assert results.manifest["images_sha256"] == images_sha256(results.image_ids, results.coverage)
    assert results.gallery_pixels.shape == (4, 3, 80, 80)


def test_manifest_tells_no_clock_host_or_path(swept):
    text = (swept[0] / "results.json").read_text()
    assert not re.search(r"/|\d\d:\d\d", json.dumps(json.loads(text))), text


def test_square_pictures_make_legacy_mass_a_centre_rule(swept):
    """A scene's box holds its cell's centre, so here the two measures nearly agree."""
    results = SweepResults.load(swept[0])
    legacy, sound = results.metrics["legacy_mass"], results.metrics["in_box_mass"]
    assert np.corrcoef(legacy.ravel(), sound.ravel())[0, 1] > 0.95


def planted(results: SweepResults, head: Head, strength: float) -> SweepResults:
    """The same sweep with one head that puts extra attention on the objects of its own picture."""
    maps = results.maps.astype(np.float64)
    target = results.coverage / results.coverage.sum(1, keepdims=True)
    mixed = (1 - strength) * maps[:, head.layer, head.index] + strength * target
    maps[:, head.layer, head.index] = mixed
    return replace(results, maps=maps.astype(np.float16))


def test_a_planted_head_is_found(swept):
    results = SweepResults.load(swept[0])
    findings = analyse(planted(results, Head(2, 1), 0.15))
    assert findings.champion == Head(2, 1)
    assert findings.verdict.p[0] <= 0.01
    assert findings.verdict.validation[0].low > 0.08
    untrained = [b for b in findings.baselines if b.kind == "untrained"]
    assert len(untrained) == 2 and all(b.difference.low > 0 for b in untrained)
    assert findings.selectivity.estimate > 0.4


def test_shuffled_boxes_find_nothing(swept):
    results = SweepResults.load(swept[0])
    rng = np.random.default_rng(0)
    order = np.arange(len(results.split))
    for label in np.unique(results.stratum):
        rows = np.flatnonzero(results.stratum == label)
        order[rows] = rng.permutation(rows)
    found = analyse(replace(results, coverage=results.coverage[order]))
    assert found.verdict.discovery.p_adjusted.min() > 0.01
    assert found.verdict.validation[0].low < 0.005


def test_findings_are_plain_values(swept):
    results = SweepResults.load(swept[0])
    assert json.loads((swept[0] / "findings.json").read_text()) == json.loads(
        json.dumps(plain(analyse(results)))
    )


def test_patch_queries_are_another_kind(tiny_run, tmp_path):
    text = sweep(tiny_run, tmp_path / "p", "--kind", "patches", "--untrained", "0")
    assert "mean over patch queries" in text
    assert SweepResults.load(tmp_path / "p").manifest["kind"] == "patches"


def test_plain_open_clip_weights_need_a_name_and_data(tiny_run, tmp_path):
    weights = torch.load(tiny_run / "final_epoch.pt", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "plain.pt")
    words = ["--ckpt", str(tmp_path / "plain.pt"), "--model", "scenes-vit", "--untrained", "1"]
    assert "give --data" in refused("interp.sweep", *words)
    out = tmp_path / "out"
    flags = ("--data", "scenes", "--num", "220", "--draws", "99", "--out", str(out))
    done = command("interp.sweep", *words, *flags)
    assert done.returncode == 0, done.stderr
    assert SweepResults.load(out).manifest["checkpoint"]["loss"] == "unknown"
    flags = ("--data", "scenes", "--results", str(out), "--kinds", "mean", "--units", "champion")
    done = command("interp.ablate", *words[:4], *flags, "--draws", "99")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "ablation.json").read_text())
    assert "token AP" not in report["intact"] and len(report["sentences"]) == 1


def test_ablation_of_the_champion(tiny_run, swept):
    out = swept[0]
    words = "--units champion,random:2,L0H0,L0H1+L2H0,mlps,attributed:1 --sets 3 --draws 199"
    words += " --resamples 2 --threads 1 --downstream"
    ckpt = str(tiny_run / "final_epoch.pt")
    done = command("interp.ablate", "--ckpt", ckpt, "--results", str(out), *words.split())
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "ablation.json").read_text())
    rows = report["units"]
    assert {row["kind"] for row in rows} == {"zero", "mean", "resample"}
    champion = json.loads((out / "findings.json").read_text())["champion"]["head"]
    assert [r["unit"] for r in rows if r["role"] == "champion"] == [champion] * 3
    assert len([r for r in rows if r["family"] == "mlp"]) == 12
    assert report["sets"]["margin"]["of"] == 4 and len(report["sentences"]) == 3
    assert all(champion in said and said in done.stdout for said in report["sentences"])
    assert report["n"] == SweepResults.load(out).manifest["counts"]["validation"]
    heads = {r["unit"] for r in rows if r["family"] == "head"}
    assert heads == set(report["estimates"]["mean"]["heads"])
    fit = report["estimates"]["mean"]["attribution"]["plain"]
    assert fit["overall"]["heads"] == len(heads) and len(fit["layers"]) == 1
    assert f"{len(heads)} head(s): Pearson" in done.stdout
    assert all(Head.parse(r["head"]).layer > 0 for r in report["downstream"])
    line = refused("interp.ablate", "--ckpt", ckpt, "--results", str(out))
    assert "--overwrite" in line
    for units, said in (
        ("L9H0", "4 layers of 4"),
        ("best", "(known: L11H5, L3H1+L2H0, attentions, attributed:K, champion, heads,"),
        ("random:x", "random:K"),
        ("random:²", "random:K"),
        ("top:17", "K from 1 to 16"),
        ("heads,random:3", "3 other heads are asked for, 0 are not named"),
        ("L0", "--units L0: 'L0' is not a head"),
        ("", "--units ''"),
        ("L0H1+L0H1", "names a head twice"),
        ("L0H1+L7H0", "--units L7H0: the tower has 4 layers of 4"),
    ):
        with pytest.raises(UserError) as told:
            ablate(["--ckpt", ckpt, "--results", str(out), "--overwrite", "--units", units])
        assert said in str(told.value)


def test_a_finished_bank_is_not_computed_again(tiny_run, swept):
    """Other draws, the same bank: its parts stay the files they were; all heads bring agreement."""
    out, ckpt = swept[0], str(tiny_run / "final_epoch.pt")
    words = ["--kinds", "zero", "--sets", "0", "--draws", "99", "--threads", "1", "--overwrite"]
    reports = []
    for draws in ("99", "199"):
        done = command(
            "interp.ablate", "--ckpt", ckpt, "--results", str(out), *words, "--seed", "0"
        )
        assert done.returncode == 0, done.stderr
        words[words.index("--draws") + 1] = draws
        stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("bank-zero-*/*")}
        reports.append((json.loads((out / "ablation.json").read_text()), stamps))
    assert reports[0][1] == reports[1][1] and len(reports[0][1]) > 1
    fits = reports[0][0]["estimates"]["zero"]["attribution"]
    assert fits["plain"]["overall"]["heads"] == 16 and fits["integrated"]["images"] == 58
    ranks = sorted(row["rank"] for row in reports[0][0]["units"])
    assert len(ranks) == 16 and ranks[0] == 1


def test_nothing_is_overwritten_unasked(tiny_run, swept):
    ckpt = str(tiny_run / "final_epoch.pt")
    line = refused("interp.sweep", "--ckpt", ckpt, "--out", str(swept[0]))
    assert "--overwrite" in line


def test_bad_input_gets_one_line(tiny_run, tmp_path):
    ckpt = str(tiny_run / "final_epoch.pt")
    cases = [
        (("--ckpt", str(tmp_path / "none.pt")), "does not exist"),
        (("--ckpt", ckpt, "--num", "30"), f"{FEWEST} are needed"),
        (("--ckpt", ckpt, "--data", "scenes:val", "--num", "30"), "give more pictures"),
        (("--ckpt", ckpt, "--data", "coco"), "--root"),
        (("--ckpt", ckpt, "--data", "scenes:train", "--num", "200"), "are needed"),
        (("--pretrained", "openai"), "--model"),
    ]
    for words, said in cases:
        out = tmp_path / "out"
        with pytest.raises(UserError) as told:
            sweep_main([*words, "--out", str(out), "--untrained", "0"])
        assert said in str(told.value)
        assert not out.exists(), "something half-written stays behind"


def test_damaged_results_are_refused(swept, tmp_path):
    for name in ("results.json", "results.npz"):
        (tmp_path / name).write_bytes((swept[0] / name).read_bytes())
    (tmp_path / "results.npz").write_bytes((swept[0] / "results.npz").read_bytes()[:5000])
    with pytest.raises(UserError, match="can't be read"):
        SweepResults.load(tmp_path)
    (tmp_path / "results.npz").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        SweepResults.load(tmp_path)
    (tmp_path / "results.npz").write_bytes((swept[0] / "results.npz").read_bytes())
    other = json.loads((swept[0] / "results.json").read_text()) | {"images_sha256": "0" * 64}
    (tmp_path / "results.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="of other pictures than results"):
        SweepResults.load(tmp_path)
    manifest = json.loads((swept[0] / "results.json").read_text()) | {"schema": 7}
    (tmp_path / "results.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="schema 7"):
        SweepResults.load(tmp_path)


def test_an_edit_by_hand_is_told(swept, tmp_path):
    results = SweepResults.load(swept[0])
    results.save(tmp_path / "a")
    assert SweepResults.load(tmp_path / "a").manifest == results.manifest
    manifest = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "a" / "results.json").write_text(json.dumps(manifest | {"draws": 99999}))
    with pytest.raises(UserError, match="were edited since the sweep"):
        SweepResults.load(tmp_path / "a")
    better = {"in_box_mass": results.metrics["in_box_mass"] + np.float32(0.1)}
    dataclasses.replace(results, metrics=results.metrics | better).save(tmp_path / "b")
    (tmp_path / "b" / "results.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="were edited since the sweep"):
        SweepResults.load(tmp_path / "b")
    old = {k: v for k, v in manifest.items() if k != "content_sha256"}
    (tmp_path / "b" / "results.json").write_text(json.dumps(old))
    assert SweepResults.load(tmp_path / "b").manifest == results.manifest  # of older sweeps


def test_what_a_head_writes_is_told_by_pictures_that_did_not_choose_it(
    tiny_run, swept, monkeypatch
):
    monkeypatch.setattr(removal, "FEW", 2)  # so few that a draw of all would often hold none
    config = AblateConfig(ckpt=tiny_run / "final_epoch.pt", results=swept[0], draws=199)
    opened = open_swept(config)
    answers, names = removal.questions(opened), opened.results.manifest["categories"]
    words = removal._words(opened, answers, Judge(199, 0))
    assert set(words) == {f"L{layer}H{head}" for layer in range(4) for head in range(4)}

    def gaps(split):
        """By category, of L1H2, with loops."""
        (images,) = [torch.cat(list(opened.batches(opened.rows(split), split)))]
        with torch.no_grad():
            effects = direct_effects(opened.tower, images, answers.classes).heads[:, 1, 2].numpy()
        shown, found = opened.present(split), {}
        for k, name in enumerate(names):
            with_it = [e[k] for e, s in zip(effects, shown) if s[k]]
            others = [e[k] for e, s in zip(effects, shown) if not s[k]]
            if min(len(with_it), len(others)) >= 2:
                found[name] = np.mean(with_it) - np.mean(others)
        return found

    chosen, judged = gaps("discovery"), gaps("validation")
    told = sorted(set(chosen) & set(judged), key=lambda name: -chosen[name])[:3]
    assert [row["word"] for row in words["L1H2"]] == told
    for row in words["L1H2"]:
        assert row["difference"]["estimate"] == pytest.approx(judged[row["word"]], abs=1e-6)
        assert row["difference"]["low"] < row["difference"]["estimate"] < row["difference"]["high"]
