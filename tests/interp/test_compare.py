"""Comparing two checkpoints: likeness against loops and by hand, the null, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from reference import likeness as naive
from sweeps import small_sweep

from interp.ablate import main as ablate
from interp.compare import SHOWN, main, matching_said, render, said
from interp.comparison import (
    Side,
    Tower,
    contrast,
    influence,
    match,
    open_sides,
    refuse_unlike,
    removal,
    see,
)
from interp.config import CompareConfig
from interp.heads import Head
from interp.stats.likeness import (
    assignment,
    cka_shuffled,
    cka_values,
    correlation_values,
    jensen_shannon,
    map_correlations,
    neighbours,
    u_centred,
)
from interp.sweep import main as sweep
from interp.swept import open_swept
from superclip.errors import UserError


def some_maps(seed=0, shape=(12, 3), p=6):
    return np.random.default_rng(seed).dirichlet(np.ones(p), shape).astype(np.float16)


def test_correlations_equal_the_loops():
    first, second = some_maps(0), some_maps(1)
    second[:, 1] = first[:, 2]
    found = map_correlations(first, second)
    for h, k in np.ndindex(3, 3):
        assert found[h, k] == pytest.approx(naive.correlation(first[:, h], second[:, k]), abs=1e-12)
    assert found[2, 1] == pytest.approx(1) and found[2].argmax() == 1
    values = correlation_values(first, second)
    assert values.shape == (12, 3)
    np.testing.assert_allclose(values.mean(0), np.diag(found), atol=1e-12)
    flat = np.full((12, 1, 4), 0.25, np.float16)
    assert not map_correlations(flat, some_maps(p=4)[:, :1]).any()
    assert not correlation_values(flat, flat).any()


def test_spread_of_a_correlation_is_that_over_images():
    rng = np.random.default_rng(0)
    first = rng.dirichlet(np.ones(5), (400, 1))
    second = 0.5 * first + 0.5 * rng.dirichlet(np.ones(5), (400, 1))
    error = correlation_values(first, second).std(ddof=1) / 400**0.5
    pieces = [
        naive.correlation(first[r, 0], second[r, 0])
        for r in (rng.integers(0, 400, 400) for _ in range(400))
    ]
    assert error == pytest.approx(np.std(pieces), rel=0.15)


def test_assignment_is_the_best_of_all():
    for seed in range(5):
        likeness = np.random.default_rng(seed).normal(size=(5, 5))
        assert tuple(assignment(likeness)) == naive.best_pairing(likeness)


def test_divergence_by_hand_and_by_loops():
    p, q = np.array([[[1.0, 0.0]]]), np.array([[[0.5, 0.5]]])
    assert jensen_shannon(p, q)[0, 0] == pytest.approx(1.5 - 0.75 * np.log2(3))
    assert jensen_shannon(p, p[..., ::-1])[0, 0] == pytest.approx(1)
    first, second = some_maps(0), some_maps(1)
    assert not jensen_shannon(first, first).any()
    found = jensen_shannon(first, second)
    for i, h in np.ndindex(12, 3):
        assert found[i, h] == pytest.approx(naive.divergence(first[i, h], second[i, h]), abs=1e-12)


def test_neighbours_are_others_of_the_stratum():
    stratum = np.array([0, 1, 0, 1, 1, 0])
    other = neighbours(stratum)
    assert sorted(other) == list(range(6)) and (other != np.arange(6)).all()
    assert (stratum[other] == stratum).all()


def test_cka_and_its_jackknife_equal_the_loops():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)) + 3
    y = np.concatenate([x[:, :2], rng.normal(size=(9, 5))], axis=1)
    grams = u_centred(x), u_centred(y)
    for gram in grams:
        np.testing.assert_allclose(gram.sum(1), 0, atol=1e-10)
        assert not np.diag(gram).any()
    assert (grams[0] * grams[1]).sum() / (9 * 6) == pytest.approx(naive.hsic(x, y))
    values, without = cka_values(*grams), np.array(naive.without_each(naive.cka, x, y))
    assert values.mean() == pytest.approx(naive.cka(x, y))
    np.testing.assert_allclose(values - values.mean(), 8 * (without.mean() - without), atol=1e-10)
    # Rao: the standard error of the mean is the jackknife's.
    jackknife = np.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    assert values.std(ddof=1) / 3 == pytest.approx(jackknife)


def test_cka_is_one_up_to_rotation_and_zero_for_the_unrelated():
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(2, 40, 100))
    turned = 7 * x @ np.linalg.qr(rng.normal(size=(100, 100)))[0] + 2
    np.testing.assert_allclose(cka_values(u_centred(x), u_centred(turned)), 1)
    unrelated = cka_values(u_centred(x), u_centred(other)).mean()
    assert abs(unrelated) < 0.1 and naive.plain_cka(x, other) > 0.6
    shuffled = cka_shuffled(u_centred(x), u_centred(x), 200, 0)
    assert abs(shuffled.mean()) < 0.02 and 0 < np.quantile(shuffled, 0.95) < 0.1
    constant = u_centred(np.full((40, 3), 0.1, np.float32))
    assert not constant.any() and not cka_values(constant, u_centred(x)).any()
    assert not cka_shuffled(constant, u_centred(x), 3, 0).any()


CONFIG = CompareConfig(ckpts=(Path(__file__),) * 2, draws=199)


def test_verdicts_need_band_and_p():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 60, 3))
    first[:, 1] += 2
    rows = contrast(first, second, np.zeros(60, int), CONFIG)
    assert [row["verdict"] for row in rows] == ["", "higher", ""]
    assert rows[1]["estimate"] == pytest.approx((first - second)[:, 1].mean())
    back = contrast(second, first, np.zeros(60, int), CONFIG)
    assert back[1]["verdict"] == "lower" and back[1]["first"] == rows[1]["second"]
    told = {"first": "L0H0", "second": "L0H2"}
    (line,) = said([told | {"excess": row} for row in rows])
    assert line.endswith("(n = 60): higher in L0H0 (L0H2)")
    (line,) = said([told | {"excess": rows[0]}])
    assert line.endswith("no difference is shown in any head")


@pytest.mark.slow
def test_two_sweeps_of_the_same_heads_differ_in_five_percent():
    """Heads that ground alike, with noise of their own: max-T over 12 heads, 60 pictures."""
    rng, n, heads, p = np.random.default_rng(0), 60, 12, 16
    stratum, valid = np.arange(n) % 3, np.ones((n, p))
    rejects = called = 0
    for _ in range(1000):
        coverage = np.eye(p)[rng.integers(0, p, n)] * rng.uniform(0.2, 1, (n, 1))
        blind, grounded = rng.dirichlet(np.ones(p), (n, heads)), rng.uniform(0, 1, (heads, 1))
        shared = blind + grounded * coverage[:, None]
        pair = []
        for _ in range(2):
            maps = shared + rng.dirichlet(np.full(p, 0.3), (n, heads))
            maps /= maps.sum(-1, keepdims=True)
            pair.append(influence(maps, coverage, valid, stratum))
        rows = contrast(*pair, stratum, CONFIG)
        rejects += min(row["p_adjusted"] for row in rows) <= 0.05
        called += any(row["verdict"] for row in rows)
    print(f"max-T rejects in {rejects} of 1000, a verdict in {called}")
    assert 30 <= rejects <= 70 and called <= rejects


def tower(results, name="tower"):
    return Tower(name, name, results)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "patches"}, "another kind of attention than one: patches, not class"),
        ({"tower": {"geometry": "squash"}}, "another geometry than one: squash, not crop"),
        ({"tower": {"grid": [2, 8]}}, r"another grid than one: \[2, 8\], not \[4, 4\]"),
        ({"tower": {"layers": 5}}, "another layers than one: 5, not 2"),
        ({"split": {"salt": "t"}}, "another split"),
        ({"images_sha256": "0"}, "another set of boxes than one: 0, not"),
        ({"data": {"sha256": "0"}}, "another set of data than one: 0, not d"),
    ],
)
def test_sweeps_of_another_kind_are_refused_with_the_difference(change, said):
    results = small_sweep()
    held = {
        k: v | change[k] if isinstance(change.get(k), dict) else change.get(k, v)
        for k, v in results.manifest.items()
    }
    other = Side("two", "two", replace(results, manifest=held), None)  # pyright: ignore
    with pytest.raises(UserError, match=f"two has {said}"):
        refuse_unlike(tower(results, "one"), other)
    if "layers" in change.get("tower", {}):  # beside, a tower may be of any depth
        refuse_unlike(tower(results, "one"), tower(other.results))


def test_other_pictures_are_refused_with_the_difference():
    results = small_sweep()
    fewer = replace(results, image_ids=results.image_ids[1:])
    with pytest.raises(UserError, match="another number of pictures than one: 71, not 72"):
        refuse_unlike(tower(results, "one"), tower(fewer))
    renamed = np.where(results.image_ids == "picture-003", "x", results.image_ids)
    with pytest.raises(UserError, match="its own than one: x, not picture-003"):
        refuse_unlike(tower(results, "one"), tower(replace(results, image_ids=renamed)))


WORDS = "--num 120 --draws 99 --gallery 0 --threads 1"
SHIFT = [1, 2, 3, 0]


def variant(source, out, change=None, seed=0):
    """A checkpoint made of another one's weights, swept; `change` works on the state in place."""
    content = torch.load(source, weights_only=True)
    if change is not None:
        change(content["state_dict"])
    content["config"]["seed"] = seed
    if seed:
        content["facts"]["init_sha256"] = f"{seed}"
    out.mkdir()
    torch.save(content, out / "final_epoch.pt")
    untrained = "1" if out.name == "one" else "0"
    words = ["--ckpt", str(out / "final_epoch.pt"), "--untrained", untrained]
    sweep([*words, *WORDS.split()])
    return out / "final_epoch.pt"


def noisy(seed, size=0.02):
    def change(state):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in state.items():
            if name.startswith("visual.transformer") and tensor.ndim == 2:
                tensor += size * torch.randn(tensor.shape, generator=generator)

    return change


def shifted(state):
    """The same function, head h of every layer in the place of head SHIFT[h]."""
    order = torch.tensor(SHIFT).argsort()
    for name, tensor in state.items():
        if name.startswith("visual.") and ".attn.in_proj" in name:
            heads = tensor.unflatten(0, (3, 4, -1))[:, order]
            tensor.copy_(heads.flatten(0, 2))
        elif name.startswith("visual.") and name.endswith(".attn.out_proj.weight"):
            tensor.copy_(tensor.unflatten(1, (4, -1))[:, order].flatten(1, 2))


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Checkpoints with their sweeps: one, the same with its heads in other places, and noisy."""
    out = tmp_path_factory.mktemp("compare")
    source = tiny_run / "final_epoch.pt"
    yield {
        "one": variant(source, out / "one"),
        "shifted": variant(source, out / "shifted", shifted),
        "noisy": variant(source, out / "noisy", noisy(0)),
        "seed": variant(source, out / "seed", noisy(1, 0.1), seed=1),
        "noisy seed": variant(source, out / "noisy-seed", noisy(2, 0.1), seed=1),
    }


def compared(capsys, *words):
    capsys.readouterr()
    main([*map(str, words), "--draws", "99", "--threads", "1"])
    printed = capsys.readouterr().out
    path = re.search(r"report: (.*)", printed)[1]
    with open(path) as file:
        report = json.load(file)
    assert render(report) in printed
    return report, printed


def test_heads_in_other_places_are_found_and_nothing_else_differs(runs, capsys):
    report, printed = compared(
        capsys, runs["one"], runs["shifted"], "--also", runs["noisy"].parent / "sweep"
    )
    assert report["matching"] == {
        "by_index": False,
        "shared_start": True,
        "same_index": 0,
        "alike": 16,
    }
    assert "heads matched by optimal assignment: the same initial weights" in matching_said(report)
    for row in report["heads"]:
        first, second = Head.parse(row["first"]), Head.parse(row["second"])
        assert second == Head(first.layer, SHIFT[first.index])
        assert row["r"]["estimate"] == pytest.approx(1, abs=1e-3)
        assert row["jsd"]["estimate"] < 1e-4 < row["jsd_other"]["estimate"]
        for name in ("excess", "mass", "direct"):
            assert row[name]["estimate"] == pytest.approx(0, abs=1e-3) and not row[name]["verdict"]
    for row in report["cka"]["rows"]:
        if row["pair"] == "first and second":
            assert row["estimate"] == pytest.approx(1, abs=1e-4)
    assert report["cka"]["shuffled_95"] < 0.5
    for row in report["differences"]:
        assert row["value"] == pytest.approx(0, abs=1e-3)
    assert report["chance"]["image-to-text R@1"] == pytest.approx(1 / report["n"])
    assert report["no_removal"] == "first" and "interp.ablate beside the first's sweep" in printed
    assert [row["tower"] for row in report["towers"]][2].startswith("superclip scenes-vit ")
    words = runs["one"], runs["shifted"], "--also", runs["noisy"].parent / "sweep"
    (path,) = (runs["one"].parent / "sweep").glob("compare-*.json")
    before = path.stat().st_mtime_ns
    assert compared(capsys, *words)[0] == report  # it is opened, not computed again
    assert path.stat().st_mtime_ns == before
    compared(capsys, *words, "--overwrite")
    assert path.stat().st_mtime_ns > before


def test_index_is_kept_and_numbers_are_those_of_sweep_and_ablation(runs, capsys):
    pair = [runs["one"], runs["noisy"]]
    for path in pair:
        words = "--kinds mean --sets 0 --draws 99 --threads 1 --max-memory 0.5"
        ablate(["--ckpt", str(path), *words.split()])
    report, printed = compared(capsys, *pair)
    tables = [line for line in printed.splitlines() if line.startswith("L")]
    assert len(tables) == 2 * SHOWN and max(map(len, tables)) < 130  # maps, then effects
    assert all(f"{told}: " in printed for told in ("80 % at", "power(2)", "moved", "removal"))
    assert report["matching"]["by_index"] and report["no_removal"] is None
    assert all(row["first"] == row["second"] for row in report["heads"])
    for name, path in zip(("first", "second"), pair):
        folder = path.parent / "sweep"
        ablated = json.loads((folder / "ablation.json").read_text())
        findings = json.loads((folder / "findings.json").read_text())
        units = {row["unit"]: row["margin"]["estimate"] for row in ablated["units"]}
        direct = ablated["estimates"]["mean"]["heads"]
        for row, found in zip(report["heads"], findings["heads"]):
            assert row["excess"][name] == pytest.approx(found["validation_excess"])
            assert row["mass"][name] == pytest.approx(found["in_box_mass"])
            assert row["removal"][name] == pytest.approx(units[row[name]], abs=1e-6)
            own = direct[row[name]]["direct"]["estimate"]
            assert row["direct"][name] == pytest.approx(own, abs=1e-6)
        champion = findings["champion"]["head"]
        (own,) = (h["validation_excess"] for h in findings["heads"] if h["head"] == champion)
        assert report["differences"][0][name] == pytest.approx(own)
    (untrained,) = json.loads((pair[0].parent / "sweep/results.json").read_text())["untrained"]
    assert untrained["own_initialisation"] and report["towers"][-1]["head"] == untrained["head"]
    pairs = {"first and second", "first and its start", "second and its start"}
    assert {row["pair"] for row in report["cka"]["rows"]} == pairs
    assert all(row["moved_first"]["estimate"] > 0 for row in report["heads"])
    sides = open_sides(CompareConfig(ckpts=tuple(pair)))
    (pair[1].parent / "sweep" / "ablation.json").write_text("{")  # damaged counts as missing
    assert removal(sides[0][0], sides[1][0]) == ((), "second")


def test_index_says_nothing_where_initial_weights_differ(runs):
    sides = open_sides(CompareConfig(ckpts=(runs["one"], runs["seed"])))
    order, how = match(sides[0][0], sides[1][0])
    assert not how["by_index"] and not how["shared_start"]
    assert (np.sort(order, axis=1) == np.arange(4)).all()


def test_seeds_are_the_outer_level(runs, capsys):
    first, second = [runs["seed"], runs["one"]], [runs["noisy"], runs["noisy seed"]]
    report, printed = compared(capsys, *first, "--against", *second)
    assert report["paired"] and "heads" not in report and "cka" not in report
    assert [facts["seed"] for facts in report["first"]] == [0, 1]
    for row in report["differences"]:
        assert row["test"] == "t over seeds and pictures" and row["verdict"] == "descriptive"
        assert row["seeds"] == [2, 2]
    names = [row["tower"] for row in report["towers"]][:4]
    assert names == [f"{side}, seed {k}" for side in ("first", "second") for k in (0, 1)]
    assert "heads of different seeds do not match" in printed


def test_the_model_is_left_as_it_was(runs):
    sides = open_sides(CompareConfig(ckpts=(runs["one"], runs["noisy"])))
    side = sides[0][0]
    swept = open_swept(replace(CONFIG, ckpt=side.checkpoint.path, results=side.folder))
    (images,) = swept.pictures([swept.rows("validation")[:4]])
    before = {k: v.clone() for k, v in swept.model.state_dict().items()}
    with torch.no_grad():
        output = swept.tower(images)
        seen = see(swept, True)
        assert torch.equal(swept.tower(images), output)
    assert not swept.tower.list_hooks() and not swept.model.training
    for name, tensor in swept.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in swept.model.parameters())
    assert seen.streams.shape[:3] == (4, 2, len(swept.rows("validation")))
    assert seen.direct.shape == (len(swept.rows("validation")), 4, 4)


def test_mistakes_are_one_line(runs, tiny_run, tmp_path):
    one = runs["one"]
    assert "name two, or the seeds of two sides" in refused("interp.compare", str(one))
    for words, told in (
        ([one], r"1 checkpoint\(s\) named; name two"),
        ([one, one, one], r"3 checkpoint\(s\) named"),
        ([one, one], "both sides hold the same checkpoint"),
        ([one, tmp_path / "no.pt"], "no.pt does not exist"),
        ([one, tiny_run / "final_epoch.pt"], "is not swept; run python -m interp.sweep --ckpt .*"),
        ([one, runs["noisy"], "--kind", "patches"], "is not swept; .*--kind patches"),
        ([one, runs["noisy"], "--against", runs["shifted"]], "the first side: .* the same seed"),
        ([one, runs["noisy"], "--also", tmp_path], "holds no results.json"),
        ([one, "--against", runs["noisy"], runs["noisy seed"]], "in both arms"),
        ([one, runs["noisy"], "--ckpt", one], r"unknown option --ckpt; \(known: against, also"),
        ([one, runs["noisy"], "--data", "scenes:train"], "not the data that was swept"),
    ):
        with pytest.raises(UserError, match=told):
            main(list(map(str, words)))
    torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="plain open_clip weights go with --also"):
        main([str(one), str(tmp_path / "plain.pt")])
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep").symlink_to(one.parent / "sweep")
    (other / "final_epoch.pt").symlink_to(runs["noisy"])
    with pytest.raises(UserError, match=r"the sweep of another checkpoint; run .* --overwrite"):
        main([str(runs["shifted"]), str(other / "final_epoch.pt")])
