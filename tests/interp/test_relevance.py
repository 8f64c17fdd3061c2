"""Relevance maps against loops and exact identities, and the league table end to end."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import metrics as naive_metrics
from reference import relevance as naive
from sweeps import PLANTED, small_sweep
from test_hooked import TOWERS, build, own, pictures

from interp.grounding import metrics
from interp.grounding.baselines import sharpen
from interp.grounding.metrics import PairScores
from interp.hooked import HookedVisionTransformer
from interp.lenses import relevance as lens
from interp.lenses.relevance import METHODS, READ_NO_TEXT, chefer, dense, legrad, methods_of
from interp.lenses.relevance import relevance as maps_of
from interp.relevance import league, main, render, specificity
from interp.results import SweepResults
from interp.sweep import main as sweep
from superclip.errors import UserError

SITE = "blocks.2.attn.hook_pattern"


def texts(n=3, seed=3, d=20):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tower():
    return HookedVisionTransformer(build())


@pytest.mark.parametrize(
    "name", ["quickgelu", "LayerScale", "avg", "norm after pool", "oblong grid", "oblong patch"]
)
def test_maps_equal_the_loops(name):
    tower = HookedVisionTransformer(build(**(TOWERS[name] | {"heads": 4})))
    images, vectors = pictures(tower.visual, n=2), texts(2)
    assert set(naive.METHODS) == set(METHODS)
    for method in methods_of(tower):
        found = METHODS[method](tower, images, vectors)
        assert found.shape == (2, tower.cfg.n_ctx - 1) and not found.requires_grad
        expected = naive.METHODS[method](tower.visual, images[1], vectors[1]).detach()
        assert expected.max() > expected.min(), method  # a flat map would prove nothing
        torch.testing.assert_close(found[1], expected, rtol=1e-10, atol=1e-10 * expected.max())
        maps = maps_of(tower, method, images, vectors)
        assert (maps >= 0).all() and torch.allclose(maps.sum(dim=-1), maps.new_ones(2))
        torch.testing.assert_close(maps * found.sum(dim=-1, keepdim=True), found)


def test_rollout_rows_sum_to_one_and_are_known_where_attention_is_uniform(tower):
    images = pictures(tower.visual)
    rows = lens.rollout(tower, images)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(3, 10, dtype=torch.float64))
    torch.testing.assert_close(
        lens.raw_attention(tower, images).sum(dim=-1), torch.ones(3, 10, dtype=torch.float64)
    )
    blind = HookedVisionTransformer(unseeing())
    # ((U + I) / 2)^3 = (1 - 1/8) U + I / 8, with U of rows 1 / 10
    expected = torch.full((10, 10), 7 / 80, dtype=torch.float64) + torch.eye(10) / 8
    torch.testing.assert_close(lens.rollout(blind, images)[0], expected)


def unseeing():
    """A tower whose every query looks everywhere alike."""
    visual = build()
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[:64] = 0
            block.attn.in_proj_bias[:64] = 0
    return visual


def test_uniform_attention_gives_finite_maps():
    tower = HookedVisionTransformer(unseeing())
    for method in METHODS:
        maps = maps_of(tower, method, pictures(tower.visual), texts())
        assert maps.isfinite().all(), method
        if method in READ_NO_TEXT:
            torch.testing.assert_close(maps, torch.full((3, 9), 1 / 9, dtype=torch.float64))


def test_a_map_without_mass_is_uniform(monkeypatch, tower):
    monkeypatch.setitem(METHODS, "attention", lambda tower, images, texts: torch.zeros(3, 9))
    assert (maps_of(tower, "attention", pictures(tower.visual), texts()) == 1 / 9).all()


def test_last_layer_gradients_are_differences_of_the_output(tower):
    """Of LeGrad and Chefer: entries of the pattern are moved by hand, and the cosine is watched."""
    images, vectors, step = pictures(tower.visual, n=1), texts(1), 1e-5
    pattern = tower.run_with_cache(images, names_filter=SITE)[1][SITE][0]  # head query key
    slope = torch.zeros(4, 10, dtype=torch.float64)

    def moved(pattern, hook, head, key, by):
        pattern[:, head, 0, key] += by
        return pattern

    for head, key in np.ndindex(4, 10):
        ends = []
        for by in (step, -step):
            with (
                torch.no_grad(),
                tower.hooks(fwd_hooks=[(SITE, partial(moved, head=head, key=key, by=by))]),
            ):
                ends.append(float(F.cosine_similarity(tower(images), vectors)))
        slope[head, key] = (ends[0] - ends[1]) / (2 * step)
    # Only the class token's row reaches the output: the other nine queries count as 0.
    by_slope = slope.clamp_min(0).mean(dim=0) / 10
    torch.testing.assert_close(
        legrad(tower, images, vectors, -1)[0], by_slope[1:], atol=1e-8, rtol=0
    )
    by_product = (slope * pattern[:, 0]).clamp_min(0).mean(dim=0)
    torch.testing.assert_close(chefer(tower, images, vectors)[0, 0], by_product, atol=1e-8, rtol=0)
    assert by_slope.max() > 1e-4 and not chefer(tower, images, vectors)[0, 1:].any()


def test_what_speaks_for_a_text_does_not_speak_for_its_opposite():
    tower = HookedVisionTransformer(build(heads=1))
    images, vectors = pictures(tower.visual), texts()
    for method in (chefer, legrad):
        for_it, against = method(tower, images, vectors), method(tower, images, -vectors)
        if method is legrad:  # last two layers summed: look at one
            for_it, against = (legrad(tower, images, t, -1) for t in (vectors, -vectors))
        assert (for_it * against == 0).all() and (for_it + against > 0).any()
    cam = [METHODS["gradcam"](tower, images, t) for t in (vectors, -vectors)]
    assert (cam[0] * cam[1] == 0).all() and (cam[0] + cam[1] > 0).all()


def test_maskclip_is_the_output_of_a_tower_whose_last_block_is_v_alone():
    """On a tower that averages patches, their mean is its feature; on any, by interventions."""
    tower = HookedVisionTransformer(build(pool_type="avg"))
    images, last = pictures(tower.visual), "blocks.2."
    kept = []
    hooks = [
        (last + "attn.hook_pattern", lambda p, hook: torch.eye(10).to(p).expand_as(p)),
        (last + "hook_resid_pre", lambda x, hook: kept.append(x)),
        (last + "hook_resid_mid", lambda x, hook: x - kept[0]),
        (last + "hook_mlp_out", lambda x, hook: torch.zeros_like(x)),
    ]
    with torch.no_grad(), tower.hooks(fwd_hooks=hooks):
        expected = tower(images)
    torch.testing.assert_close(dense(tower, images, "maskclip").mean(dim=1), expected)


def test_sclip_is_the_towers_own_output_where_queries_are_keys_and_attention_is_halved():
    visual = build(pool_type="avg")
    attn = visual.transformer.resblocks[-1].attn
    with torch.no_grad():
        attn.in_proj_weight[32:64] = attn.in_proj_weight[:32]
        attn.in_proj_bias[32:64] = attn.in_proj_bias[:32]
    tower = HookedVisionTransformer(visual)
    images = pictures(visual)
    with torch.no_grad(), tower.hooks(fwd_hooks=[(SITE, lambda pattern, hook: 2 * pattern)]):
        expected = tower(images)
    torch.testing.assert_close(dense(tower, images, "sclip").mean(dim=1), expected)


def test_start_layers_of_short_towers_and_texts_of_any_length():
    tower = HookedVisionTransformer(build(layers=1))
    images, vectors = pictures(tower.visual), texts()
    for last, every in (("chefer", "chefer-all"), ("legrad", "legrad-all")):
        found = [maps_of(tower, name, images, vectors) for name in (last, every)]
        assert torch.equal(*found)
        torch.testing.assert_close(maps_of(tower, last, images, 7 * vectors), found[0])
    assert maps_of(tower, "gradcam", images, vectors).isfinite().all()
    for method in READ_NO_TEXT:
        found = [maps_of(tower, method, images, t) for t in (vectors, vectors.flip(0))]
        assert torch.equal(*found)


def test_chunks_change_nothing(tower, monkeypatch):
    images, vectors = pictures(tower.visual), texts()
    whole = {name: maps_of(tower, name, images, vectors) for name in METHODS}
    monkeypatch.setattr(lens, "PATTERN_BUDGET", 2 * 3 * 4 * 10 * 10)
    for name, maps in whole.items():
        torch.testing.assert_close(maps_of(tower, name, images, vectors), maps)
    monkeypatch.setattr(lens, "PATTERN_BUDGET", 1)
    assert maps_of(tower, "legrad", images, vectors).shape == (3, 9)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_users_model_is_left_alone(tower, context, trainable):
    visual = copy.deepcopy(tower.visual)
    visual.requires_grad_(trainable)
    visual.conv1.requires_grad_(False)
    images, vectors = pictures(visual), texts()
    state, flags = (
        copy.deepcopy(visual.state_dict()),
        [p.requires_grad for p in visual.parameters()],
    )
    with torch.no_grad():
        before = own(visual, images)
    hooked = HookedVisionTransformer(visual)
    with context():
        inputs = pictures(visual), texts()
        found = {name: maps_of(hooked, name, *inputs) for name in METHODS}
    for name, maps in found.items():
        assert torch.equal(maps, maps_of(tower, name, images, vectors)), name
        assert not maps.requires_grad
    assert [p.requires_grad for p in visual.parameters()] == flags
    assert all(p.grad is None for p in visual.parameters()) and not visual.training
    assert all(torch.equal(state[key], value) for key, value in visual.state_dict().items())
    assert not hooked.list_hooks()
    with torch.no_grad():
        assert torch.equal(own(visual, images), before)


def test_single_precision_agrees(tower):
    single = HookedVisionTransformer(build(dtype=torch.float32))
    for name in METHODS:
        mine = maps_of(single, name, pictures(single.visual), texts().float())
        wide = maps_of(tower, name, pictures(tower.visual), texts())
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), wide, rtol=1e-3, atol=1e-4)


def test_bad_requests_are_named(tower):
    images = pictures(tower.visual)
    averaging = HookedVisionTransformer(build(pool_type="avg"))
    with pytest.raises(UserError, match="did you mean 'rollout'"):
        methods_of(tower, "attention,rolout")
    with pytest.raises(UserError, match="take legrad or legrad-all"):
        maps_of(averaging, "legrad-mean", images, texts())
    assert methods_of(averaging) == [m for m in METHODS if "mean" not in m]
    assert methods_of(tower, "sclip, rollout") == ["attention", "rollout", "sclip"]
    with pytest.raises(UserError, match=r"\[2, 20\], not \[3, 20\]"):
        maps_of(tower, "chefer", images, texts(2))
    with pytest.raises(UserError, match="layers 0 to 2"):
        chefer(tower, images, texts(), 3)
    with pytest.raises(UserError, match="not finite"):
        maps_of(tower, "maskclip", images * float("nan"), texts())


def test_specificity_equals_the_loops_and_is_zero_for_saliency():
    rng = np.random.default_rng(0)
    sweep = small_sweep()
    image = np.array([3, 3, 5, 8, 8, 8], np.int32)
    masks = rng.random((6, 16)).astype(np.float16)
    valid = rng.random((72, 16)).astype(np.float32)
    results = replace(sweep, category_image=image, category_coverage=masks, valid=valid)
    rows = np.array([0, 1, 3, 4, 5])  # picture 5 shows one category
    maps = rng.random((5, 2, 16))
    maps[:2, 1], maps[2:, 1] = maps[0, 1], maps[2, 1]  # the same for every name: saliency
    found = specificity(results, rows, maps)
    for at, (picture, members) in enumerate(((3, [0, 1]), (8, [2, 3, 4]))):
        for method in range(2):
            auroc, gap = naive.specificity(
                [maps[m, method] for m in members],
                [masks[rows[m]].astype(float) for m in members],
                valid[picture],
                naive_metrics.auroc,
            )
            np.testing.assert_allclose(found["category_auroc"][at, method], auroc)
            np.testing.assert_allclose(found["specificity"][at, method], gap, atol=1e-12)
    assert np.abs(found["specificity"][:, 1]).max() < 1e-12 < np.abs(found["specificity"]).min(0)[0]


def test_league_of_planted_maps():
    """One map that knows the boxes, one like the champion, one blind: scores, tests and words."""
    results = small_sweep()
    rng = np.random.default_rng(1)
    found = {"methods": np.array(["attention", "chefer", "sclip"])}
    for split in ("discovery", "validation"):
        found["pair_rows"], at = np.zeros(0, int), results.rows(split)
        blind = rng.dirichlet(np.full(16, 2.0), (len(at), 2))
        head = results.maps[at][:, *PLANTED].astype(float)
        found[split] = np.stack([blind[:, 0], results.coverage[at], head], 1).astype(np.float16)
    # Before training: attention as blind, chefer as good, sclip blind.
    found["untrained"] = np.stack([blind[:, 1], results.coverage[at], blind[:, 1]], 1)
    report = league(results, found, 199, 0)
    rows = {row["map"]: row for row in report["maps"]}
    champion = "champion L{}H{}".format(*PLANTED)
    assert list(rows) == [
        "attention", "chefer", "sclip", champion, "uniform", "centre Gaussian", "best fixed patch"
    ]  # fmt: skip
    at = results.rows("validation")
    pairs = PairScores(found["validation"], results.coverage[at], results.valid[at])
    excess = metrics.excess(pairs, results.stratum[at].astype(int)).mean(axis=0)
    for k, name in enumerate(found["methods"]):
        np.testing.assert_allclose(rows[name]["excess"]["estimate"], excess[k])
        sharp = sharpen(found["validation"][:, k].astype(float), rows[name]["power"])[:, None]
        sharp = PairScores(sharp, results.coverage[at], results.valid[at])
        expected = metrics.excess(sharp, results.stratum[at].astype(int)).mean()
        np.testing.assert_allclose(rows[name]["excess_at_power"]["estimate"], expected)
    assert rows["chefer"]["mass"]["estimate"] == rows["chefer"]["auroc"]["estimate"] == 1
    assert report["best_of_discovery"] == "chefer" and report["n"] == len(at)
    for name, score in (
        ("mass", "in_box_mass"),
        ("pointing", "pointing"),
        ("auroc", "patch_auroc"),
    ):
        swept = results.metrics[score][at][:, *PLANTED].astype(float).mean()
        assert abs(rows[champion][name]["estimate"] - swept) < 1e-6
        assert rows[champion][name] == rows["sclip"][name]
    assert rows["sclip"]["excess_minus_champion"]["low"] == 0
    assert rows["chefer"]["p_adjusted"] == 1 / 200 and rows["attention"]["p_adjusted"] > 0.05
    assert max(abs(rows["uniform"]["excess"][end]) for end in ("low", "high")) < 1e-12
    gained = {name: rows[name]["excess_minus_untrained"] for name in found["methods"]}
    assert gained["chefer"]["estimate"] == gained["chefer"]["high"] == 0
    assert (
        gained["sclip"]["low"] > 0 and gained["attention"]["low"] < 0 < gained["attention"]["high"]
    )
    said = render(report)
    assert "excess minus untrained, band above 0: sclip; below: -" in said
    assert "best method of discovery, by excess: chefer" in said
    assert f"excess minus attention, band above 0: chefer, sclip, {champion}; below: -" in said
    assert "0 pictures of several categories: too few" in said and "-0.000 " not in said
    coverage = results.coverage.copy()
    coverage[at[3]] = 1  # all object: no AUROC there
    report = league(replace(results, coverage=coverage), found, 199, 0)
    assert {row["auroc"]["n"] for row in report["maps"]} == {len(at) - 1}
    assert {row["mass"]["n"] for row in report["maps"]} == {len(at)}


@pytest.fixture(scope="module")
def swept(tiny_run, tmp_path_factory):
    """Folder of a sweep, and the words that every command needs to go on from it."""
    out = tmp_path_factory.mktemp("relevance") / "sweep"
    words = ["--ckpt", str(tiny_run / "final_epoch.pt"), "--draws", "99", "--threads", "1"]
    sweep([*words, "--num", "220", "--untrained", "0", "--out", str(out)])
    yield out, [*words, "--results", str(out)]


def test_command_end_to_end(swept, capsys):
    out, words = swept
    main(words)
    printed = capsys.readouterr().out
    results, report = SweepResults.load(out), json.loads((out / "relevance.json").read_text())
    counts = results.manifest["counts"]
    assert (report["n"], report["discovery_n"]) == (counts["validation"], counts["discovery"])
    assert report["checkpoint_sha256"] == results.manifest["checkpoint"]["sha256"]
    assert report["methods"] == list(METHODS)
    with np.load(out / "relevance.npz") as file:
        arrays = dict(file)
    assert arrays["validation"].shape == (report["n"], len(METHODS), 25)
    assert arrays["validation"].dtype == np.float16
    for name in ("discovery", "validation", "pairs"):
        np.testing.assert_allclose(arrays[name].astype(float).sum(-1), 1, atol=5e-3)
    raw = arrays["validation"][:, 0].astype(float)
    heads = results.maps[results.rows("validation")][:, -1].astype(float)
    stayed = 1 - results.class_mass[results.rows("validation")][:, -1].astype(float)
    mean = (heads * stayed[..., None]).mean(axis=1)
    np.testing.assert_allclose(raw, mean / mean.sum(-1, keepdims=True), atol=1e-3)
    again = json.loads(json.dumps(league(results, arrays, 99, 0)))
    assert {key: report[key] for key in again} == again
    shown = {row["map"]: row for row in report["maps"]}
    assert report["several_categories_n"] >= shown["sclip"]["specificity"]["n"] >= 20
    assert "specificity" not in shown["rollout"]
    assert "band above 0" in printed and "pictures of several categories" in printed
    first = [(out / f"relevance.{kind}").read_bytes() for kind in ("json", "npz")]
    main([*words, "--overwrite"])
    assert capsys.readouterr().out == printed
    assert [(out / f"relevance.{kind}").read_bytes() for kind in ("json", "npz")] == first
    with pytest.raises(UserError, match="--overwrite"):
        main(words)


def test_methods_can_be_chosen_and_mistakes_are_one_line(swept, tmp_path):
    results, words = SweepResults.load(swept[0]), swept[1]
    results.save(tmp_path / "some")
    at = ["--results", str(tmp_path / "some"), "--overwrite"]
    main([*words, *at, "--methods", "rollout"])
    report = json.loads((tmp_path / "some" / "relevance.json").read_text())
    assert report["methods"] == ["attention", "rollout"] and report["several_categories_n"] > 19
    assert not any("specificity" in row for row in report["maps"])
    with pytest.raises(UserError, match="did you mean 'maskclip'"):
        main([*words, *at, "--methods", "mask-clip"])
    stratum = np.where(results.split == 1, -1, results.stratum).astype(np.int16)
    replace(results, stratum=stratum).save(tmp_path / "few")
    with pytest.raises(UserError, match="no picture is of validation"):
        main([*words, "--results", str(tmp_path / "few")])
    assert not (tmp_path / "few" / "relevance.npz").exists()
