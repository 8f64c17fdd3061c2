"""Lenses: against naive readings, by hand, with a word planted at a layer, and as a command."""

import importlib
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from open_clip.transformer import VisionTransformer
from reference import lens as naive

from interp.config import LensConfig
from interp.hooked import HookedVisionTransformer
from interp.lens import choose_words, open_lens, read_layers, render
from interp.lenses import FORMS
from interp.lenses.emergence import (
    auc_values,
    category_values,
    onset,
    patch_measures,
    r2_values,
    unit_band,
)
from interp.lenses.logit import PENALTIES, Lens, fit, read, word_ranks, word_scores
from interp.sweep import main as sweep_command
from interp.swept import open_swept
from superclip.errors import UserError
from superclip.model.superclip import SuperCLIP, TokenHead

command_of = importlib.import_module("interp.lens")

POOLS = {
    "class": {},
    "average": {"pool_type": "avg"},
    "average first": {"pool_type": "avg", "final_ln_after_pool": True},
}


def noisy(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if parameter.ndim == 1 else noise / 4)
    return module.double().eval()


@pytest.fixture(scope="module", params=POOLS)
def visual(request):
    return noisy(VisionTransformer(24, 8, 16, 3, 2, 4.0, output_dim=12, **POOLS[request.param]), 0)


@pytest.fixture(scope="module")
def images():
    return torch.randn(
        5, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def token_lens(head, pieces=((0, 2), (1,))):
    columns = [4, 1, 0]
    weight, bias = head.linear.weight.detach()[columns], head.linear.bias.detach()[columns]
    return Lens(head.norm, weight, bias, pieces, True)


@pytest.mark.parametrize("source", ["patches", "pooled"])
def test_every_reading_is_the_output_of_the_tower_that_ends_there(visual, images, source):
    pictures, patches = read(HookedVisionTransformer(visual), images, source)
    assert pictures.shape[:2] == (5, 4) and patches.shape[:3] == (5, 4, 9)
    for image, own, of_patches in zip(images[:2], pictures, patches):
        for layer in range(4):
            expected = naive.reading(visual, image, layer, source)
            torch.testing.assert_close(own[layer], expected, rtol=0, atol=1e-10)
        expected = naive.patch_reading(visual, image, 2, 4, source)
        torch.testing.assert_close(of_patches[2, 4], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("source", ["patches", "pooled"])
def test_the_last_reading_gives_the_logits_of_the_model_and_leaves_nothing(visual, images, source):
    width = 16 if source == "patches" else 12
    head = noisy(TokenHead(width, 9, source, torch.tensor([0, 2, 3, 5, 8])), 2)
    clip = torch.nn.Module()
    clip.visual, clip.encode_image = visual, lambda pixels: visual(pixels)
    model = SuperCLIP(clip, (0.5,) * 3, (0.25,) * 3, head).double()
    pixels = (images.abs() * 80).to(torch.uint8)
    images = model.normalise(pixels)
    visual.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features, means = model.encode_patches(pixels)
    hidden = means if source == "patches" else clip.encode_image(images)
    tower = HookedVisionTransformer(visual)
    readings = read(tower, images, source)[0]
    lens = token_lens(head)
    forms = fit(lens, readings)
    logits = head(hidden)[:, [4, 1, 0]]
    torch.testing.assert_close(lens.logits(readings[:, -1]), logits, rtol=0, atol=1e-10)
    scores = forms.scores(readings)[:, 0, -1]
    for row, own in zip(logits.tolist(), scores, strict=True):
        says = naive.log_probabilities(row, range(3))
        assert own.tolist() == pytest.approx([(says[0] + says[2]) / 2, says[1]], abs=1e-10)
    assert visual.training and not tower.list_hooks()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.encode_patches(pixels)[0], features)
    visual.eval()


def test_forms_by_hand():
    generator = torch.Generator().manual_seed(3)
    readings = torch.randn(7, 3, 4, dtype=torch.float64, generator=generator)
    head = noisy(TokenHead(4, 5), 4)
    forms = fit(token_lens(head), readings)
    x, mean = readings[:, 1], readings[:, 1].mean(dim=0)
    tuned = x @ forms.weight[1] + forms.bias[1]
    logits = head(x)[:, [4, 1, 0]]
    by_hand = [
        logits.log_softmax(1),
        (logits - logits.mean(dim=0)).log_softmax(1),
        head(tuned)[:, [4, 1, 0]].log_softmax(1),
    ]
    expected = torch.stack([(s[:, 0] + s[:, 2]) / 2 for s in by_hand], dim=1)
    torch.testing.assert_close(forms.scores(readings)[:, :, 1, 0], expected)
    texts = F.normalize(torch.randn(2, 4, dtype=torch.float64, generator=generator), dim=1)
    cosine = Lens(partial(F.normalize, dim=-1), texts, None, ((0,), (1,)), False)
    found = fit(cosine, readings).scores(readings)[:, :, 1, 1]
    for k, form in enumerate((x, x - mean, tuned)):
        torch.testing.assert_close(found[:, k], F.cosine_similarity(form, texts[1:]))
    errors = forms.errors(readings).numpy()
    last = readings[:, -1]
    total = (last - last.mean(dim=0)).square().sum(dim=1).numpy()
    values = r2_values(errors, total)
    for k, foretold in enumerate((x, x - mean + last.mean(dim=0), tuned)):
        assert values[:, k, 1].mean() == pytest.approx(naive.r2(foretold, last, last.mean(dim=0)))
    assert values[:, :, -1] == pytest.approx(1)
    step, weights = 1e-6, np.ones(7)
    for picture in range(7):  # what a little more of one picture does to R^2
        weights[:] = 1 + step * (np.arange(7) == picture)
        moved = 1 - np.tensordot(weights, errors, 1) / (weights @ total)
        spread = 7 * (moved - values.mean(axis=0)) / step
        np.testing.assert_allclose(values[picture] - values.mean(axis=0), spread, atol=1e-4)


def test_the_tuned_map_is_the_ridge_that_leaves_the_least_error_out():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, 3, dtype=torch.float64, generator=generator)
    y = x @ torch.randn(3, 3, dtype=torch.float64, generator=generator)
    y = y + 0.8 * torch.randn(11, 3, dtype=torch.float64, generator=generator)
    penalties = PENALTIES * float(11 * x.var(dim=0, unbiased=False).mean())
    best = min(penalties, key=lambda penalty: naive.left_out_error(x, y, penalty))
    assert penalties[0] < best < penalties[-1], "the example chooses nothing"
    lens = Lens(torch.nn.Identity(), torch.eye(3).double(), None, ((0,),), False)
    forms = fit(lens, torch.stack([x, y], dim=1))
    weight, bias = naive.ridge(x, y, best)
    torch.testing.assert_close(forms.weight[0], weight)
    torch.testing.assert_close(forms.bias[0], bias)
    assert torch.equal(forms.weight[1], torch.eye(3).double())


def test_ranks_with_ties_and_all_pieces_of_a_word():
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0, 1.0], [0.0, 2.0, 5.0, 5.0, 1.0]])
    pieces = ((1,), (0, 3), (2, 4, 1))
    assert word_scores(scores, pieces).tolist() == [[1, 1.5, 1], [2, 2.5, pytest.approx(8 / 3)]]
    found = word_ranks(scores, pieces)
    for row, ranks in zip(scores.tolist(), found, strict=True):
        for own, (mean, least) in zip(pieces, ranks.tolist(), strict=True):
            each = [naive.rank(row, place) for place in own]
            assert mean == pytest.approx(np.mean(each)) and least == min(each)
    assert found[0, 0].tolist() == [3, 3] and found[1, 1].tolist() == [pytest.approx(3.25), 1.5]


def test_auc_and_its_variance_equal_the_naive_ones():
    rng = np.random.default_rng(0)
    holds = rng.random(19) < 0.4
    scores = rng.integers(0, 5, (19, 2, 3)) + holds[:, None, None] * np.arange(3.0)
    scores[:, 1, 0] = 0.25 + 1e-9 * rng.random(19)  # alike up to rounding
    values = auc_values(scores, holds)
    for form, layer in np.ndindex(2, 3):
        own = np.zeros(19) if (form, layer) == (1, 0) else scores[:, form, layer]
        found = values[:, form, layer]
        assert found.mean() == pytest.approx(naive.auc(own, holds))
        sides = [
            (found[side].var(ddof=1) * side.mean() ** 2 / side.sum()) for side in (holds, ~holds)
        ]
        assert sum(sides) == pytest.approx(naive.auc_variance(own, holds))
    assert (values[:, 1, 0] == 0.5).all()


def test_bands_cover_and_are_not_empty_where_sides_do_not_overlap():
    rng = np.random.default_rng(1)
    holds = np.arange(60) < 5
    true, missed = np.array([0.5, 0.5, 0.76025, 0.92135]), 0  # Phi(shift / sqrt 2)
    for run in range(200):
        scores = rng.normal(size=(60, 1)) + rng.normal(size=(60, 4))
        scores += holds[:, None] * np.array([0, 0, 1, 2]) * np.sqrt(2)
        band = unit_band(auc_values(scores, holds), holds.astype(np.int64), 5, 199, run)
        missed += ((band.low > true) | (band.high < true)).any()
    assert missed <= 10  # 5 % of 200; without Student's t there are 19
    apart = np.where(holds, 1.0, 0.0)[:, None] * [1, -1, 0]
    band = unit_band(auc_values(apart, holds), holds.astype(np.int64), 5, 199)
    limit = (0.025 / 3) ** (1 / 5)
    assert band.low == pytest.approx([limit, 0, 0.5]) and band.high == pytest.approx(
        [1, 1 - limit, 0.5]
    )


def test_means_over_categories_by_hand():
    values = np.array([1.0, 3.0, 5.0, 10.0])
    image, category = np.array([4, 7, 7, 9]), np.array([0, 0, 2, 2])
    found = category_values(values[:, None], image, category)
    # Categories' means 2 and 7.5; three pictures, so rows weigh 3 / 2 / 2 of their deviation.
    assert found[:, 0] == pytest.approx(4.75 + 0.75 * np.array([-1, 1 - 2.5, 2.5]))
    assert found.mean() == pytest.approx((2 + 7.5) / 2)


def test_patch_measures_equal_the_naive_ones():
    rng = np.random.default_rng(2)
    maps, prior = rng.integers(0, 4, (2, 2, 1, 6)) / 4.0
    own = np.array([[1, 0.5, 0, 0, 0, 0], [0, 0, 0, 0.25, 1, 0]])
    others = np.array([[0, 0, 0, 1, 0, 0.5], [0.0] * 6])
    valid = np.array([[1, 1, 1, 1, 0.5, 1], [1.0] * 6])
    found = patch_measures(maps, prior, own, others, valid)
    for row in range(2):
        inside, outside = valid[row] * own[row], valid[row] * (1 - own[row])
        score = naive.weighted_auroc(maps[row, 0], inside, outside)
        assert found["auroc"][row, 0] == pytest.approx(score)
        blind = naive.weighted_auroc(prior[row, 0], inside, outside)
        assert found["gain"][row, 0] == pytest.approx(score - blind)
    among = naive.weighted_auroc(maps[0, 0], valid[0] * own[0], valid[0] * others[0])
    assert found["specificity"][0, 0] == pytest.approx(among)
    assert np.isnan(found["specificity"][1, 0])


WRITES = 2


@pytest.fixture(scope="module")
def planted():
    """A tower whose third MLP alone copies a mark in one patch to where the head reads its word.

    Dimensions come in pairs +v, -v, so that no LayerNorm carries the mark from one to another.
    """
    visual = VisionTransformer(16, 8, 8, 4, 2, 1.0, output_dim=8)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        visual.conv1.weight[0], visual.conv1.weight[2] = 1 / 384, -1 / 384  # 192 pixels: +-.5
        visual.positional_embedding[:, 4:] = torch.tensor([1.0, -1, 1, -1])
        mlp = visual.transformer.resblocks[WRITES].mlp
        mlp.c_fc.weight[0, 0], mlp.c_fc.weight[1, 0] = 1, -1  # gelu(z) - gelu(-z) = z
        mlp.c_proj.weight[1, :2] = torch.tensor([1.0, -1])
        mlp.c_proj.weight[3, :2] = torch.tensor([-1.0, 1])
        head = TokenHead(8, 3)
        head.linear.weight.zero_()
        head.linear.weight[0, 1] = 1
    return HookedVisionTransformer(visual.double().eval()), head.double()


def marked(n, seed):
    """Pictures with one patch that is bright where they hold the word, but for one in eight."""
    rng = np.random.default_rng(seed)
    holds, place = rng.random(n) < 0.4, rng.integers(0, 4, n)
    images = torch.zeros(n, 3, 16, 16, dtype=torch.float64)
    for k, patch in enumerate(place):
        row, column = 8 * (patch // 2), 8 * (patch % 2)
        bright = holds[k] != (k % 8 == 0)
        images[k, :, row : row + 8, column : column + 8] = 1.0 if bright else -1.0
    return images, holds, place


def test_a_word_written_at_a_known_layer_emerges_there(planted):
    tower, head = planted
    lens = Lens(head.norm, head.linear.weight.detach(), head.linear.bias.detach(), ((0,),), True)
    forms = fit(lens, read(tower, marked(60, 0)[0], "patches")[0])
    images, holds, place = marked(90, 1)
    pictures, patches = read(tower, images, "patches")
    with torch.no_grad():
        scores = forms.scores(pictures)[..., 0].numpy()
        maps = forms.scores(patches)[..., 0].numpy()
    values = auc_values(scores, holds)
    auc = values.mean(axis=0)
    stratum = holds.astype(np.int64)
    band = unit_band(values, stratum, int(holds.sum()), 199)
    for k, form in enumerate(FORMS):
        written = 0 if form == "tuned" else WRITES + 1  # a linear map foretells it at once
        assert (auc[k, :written] == 0.5).all() and (auc[k, written:] > 0.8).all()
        found = onset(values[:, k], band.low[k], stratum, 199)
        assert (found.estimate, found.low, found.high) == (written, written, written)
    total = (pictures[:, -1] - forms.mean[-1]).square().sum(dim=1).numpy()
    r2 = r2_values(forms.errors(pictures).numpy(), total).mean(axis=0)
    assert r2[2] == pytest.approx(1) and (r2[0, : WRITES + 1] < 0.9).all()
    own = np.eye(4)[place]
    bright = holds & (np.arange(90) % 8 != 0)
    measured = patch_measures(maps, maps[::-1], own, 1 - own, np.ones((90, 4)))
    assert measured["auroc"][:, 0, : WRITES + 1] == pytest.approx(0.5)
    assert measured["specificity"][bright][:, 0, WRITES + 1 :] == pytest.approx(1)
    blind = onset(np.full((90, 5), 0.5), np.full(5, 0.5), stratum, 199)
    assert (blind.estimate, blind.low, blind.high) == (5, 5, 5)


def test_a_class_token_before_the_first_layer_says_nothing():
    visual = noisy(VisionTransformer(24, 8, 16, 3, 2, 4.0, output_dim=12), 0)
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(40, 3, 24, 24, dtype=torch.float64, generator=generator)
    readings = read(HookedVisionTransformer(visual), pixels, "pooled")[0]
    texts = F.normalize(torch.randn(2, 12, dtype=torch.float64, generator=generator), dim=1)
    forms = fit(Lens(partial(F.normalize, dim=-1), texts, None, ((0,), (1,)), False), readings)
    values = auc_values(forms.scores(readings)[..., 0].numpy(), np.arange(40) < 10)
    assert (values[:, :, 0] == 0.5).all() and (values[:, :, 1:].std(axis=0) > 0.1).all()


def test_attention_pooling_is_refused():
    pooler = VisionTransformer(24, 8, 16, 1, 2, 4.0, output_dim=16, attentional_pool=True)
    with pytest.raises(UserError, match="attn_pool"):
        HookedVisionTransformer(pooler)


def test_words_are_chosen_whole():
    told = [" a cup on snow ", " two cups  left of a tree ", " a cup "]
    assert choose_words(" Cup,left  of,cup", told, []) == ["cup", "left of"]
    assert choose_words(None, told, ["tree", "dog", "cup"]) == ["cup", "tree"]
    with pytest.raises(UserError, match="did you mean 'cup'"):
        choose_words("cupp", told, [])
    with pytest.raises(UserError, match="no caption"):
        choose_words("snow two", told, [])  # one caption's end and the next one's start
    for spec in ("", " , "):
        with pytest.raises(UserError, match="names no word"):
            choose_words(spec, told, ["cup"])


@pytest.fixture(scope="module")
def swept_folder(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("lens") / "sweep"
    words = f"--ckpt {tiny_run / 'final_epoch.pt'} --out {out} --num 160 --untrained 0 --draws 99"
    sweep_command([*words.split(), "--gallery", "0"])
    return out


@pytest.fixture
def config(tiny_run, swept_folder):
    return LensConfig(tiny_run / "final_epoch.pt", swept_folder, draws=99)


def test_the_command_writes_what_it_prints(tiny_run, swept_folder, config, capsys):
    words = ["--ckpt", str(tiny_run / "final_epoch.pt"), "--results", str(swept_folder)]
    command_of.main([*words, "--draws", "99", "--concepts", "red,a red,left of"])
    report = json.loads((swept_folder / "lens.json").read_text())
    assert (swept_folder / "lens.png").read_bytes().startswith(b"\x89PNG")
    assert render(report) in capsys.readouterr().out
    assert report["pieces"] == {"red": ["red"], "a red": ["a", "red"]}
    assert list(report["left_out"]) == ["left of"] and "left out: left of " in render(report)
    assert report["layers"] == ["embed", "L0", "L1", "L2", "L3"] and report["reads"] == "patches"
    assert report["masked"]["special"] == 3 and report["patches"] == {}
    for row in report["concepts"]:
        assert row["with"] + row["without"] == report["n"] and min(row["with"], row["without"]) >= 5
        assert (row["rank_min"]["n"], row["rank_without"]["n"]) == (row["with"], row["without"])
        for form in FORMS:
            for name in ("auc", "rank_mean", "rank_min", "rank_without"):
                low, mid, high = (row[name][form][side] for side in ("low", "estimate", "high"))
                assert len(mid) == 5 and all(a <= b <= c for a, b, c in zip(low, mid, high))
    apart, same = (report["concepts"][k] for k in (1, 0))
    assert apart["rank_min"]["raw"]["estimate"][-1] < apart["rank_mean"]["raw"]["estimate"][-1]
    assert same["rank_min"] == same["rank_mean"]
    assert report["r2"]["tuned"]["estimate"][-1] == pytest.approx(1)
    again = read_layers(open_swept(config), replace(config, concepts="red,a red,left of"))
    assert report.pop("asked")["concepts"] == "red,a red,left of"
    assert json.loads(json.dumps(again)) == report
    assert "--overwrite" in refused("interp.lens", *words)


def test_models_without_a_token_head_read_texts(config):
    swept = open_swept(config)
    swept.model.token_head = None
    with pytest.raises(UserError, match="no token head; use --lens texts"):
        read_layers(swept, replace(config, lens="tokens"))
    report = read_layers(swept, config)
    assert (report["lens"], report["reads"]) == ("texts", "pooled") and len(report["prompts"]) == 8
    assert all(
        row["auc"][form]["estimate"][0] == 0.5 for row in report["concepts"] for form in FORMS
    )
    assert report["candidates"] == 12 and len(report["concepts"]) >= 8  # all categories
    assert set(report["patches"]) >= {"auroc", "gain"}
    assert "cosine" in render(report) and "patches: auroc" in render(report)


def test_maps_and_boxes_belong_together(config):
    swept = open_swept(replace(config, batch_size=7))
    words = ["umbrella", "red", "star"]
    lens, source, facts = open_lens(swept, "auto", words, [("a red cup",), ("an umbrella",)])
    unsaid = swept.model.token_head.linear.out_features - 3 - 6  # a, red, cup, an, umbrella, star
    assert facts["candidates"] == 6 and facts["masked"] == {"special": 3, "unsaid": unsaid}
    images = torch.cat(list(swept.batches(swept.rows("validation"), "all")))
    pictures, patches = read(swept.tower, images, source)
    forms = fit(lens, pictures)
    results = swept.results
    boxes = command_of._boxes(swept, results.manifest["categories"], words)
    found = command_of._validate(swept, forms, source, boxes)
    with torch.no_grad():
        maps = forms.scores(patches).double().numpy()
        np.testing.assert_allclose(found["scores"], forms.scores(pictures), atol=1e-5)
    expected = []
    for place, row in enumerate(results.rows("validation")):
        here = {
            results.manifest["categories"][c]: cover.astype(float)
            for i, c, cover in zip(
                results.category_image, results.category_id, results.category_coverage, strict=True
            )
            if i == row
        }
        for name in sorted(here.keys() & {"umbrella", "star"}):
            others = [cover for other, cover in here.items() if other != name]
            expected.append(
                (place, words.index(name), here[name], np.max([0 * here[name], *others], 0))
            )
    assert len(expected) == len(boxes["image"]) > 8
    expected.sort(key=lambda of: of[0])
    for k, (place, word, own, others) in enumerate(expected):
        assert (boxes["image"][k], boxes["word"][k]) == (place, word)
        assert (boxes["own"][k] == own).all() and (boxes["others"][k] == others).all()
        assert (boxes["valid"][k] == results.valid[results.rows("validation")[place]]).all()
        np.testing.assert_allclose(found["maps"][k], maps[place, ..., word], atol=1e-5)
        rest = np.delete(maps[..., word], place, axis=0).mean(axis=0)
        np.testing.assert_allclose(found["prior"][k], rest, atol=1e-5)


def test_a_mean_over_words_is_no_surer_than_its_rarest_word():
    """Two words that all readings tell without a mistake, with 6 and 20 of 60 pictures."""
    n, places = 60, 4
    holds = {"rare": np.arange(n) < 6, "often": np.arange(n) >= 40}
    scores = np.stack([np.where(h, 2.0, 1.0) for h in holds.values()], axis=1)
    shape = (n, len(FORMS), places, 2)
    found = {
        "scores": np.broadcast_to(scores[:, None, None], shape),
        "ranks": np.ones((*shape, 2)),
        "errors": np.full((n, len(FORMS), places), 0.5),
        "total": np.ones(n),
        "maps": np.broadcast_to(np.eye(4)[0], (12, len(FORMS), places, 4)),
        "prior": np.zeros((12, len(FORMS), places, 4)),
    }
    word = np.array([0] * 5 + [1] * 7)
    boxes = {
        "image": np.arange(12),
        "word": word,
        "own": np.tile(np.eye(4)[0], (12, 1)),
        "others": np.tile(np.eye(4)[1], (12, 1)),
        "valid": np.ones((12, 4)),
    }
    facts = {"layers": ["in", "L0", "L1", "L2"], "candidates": 2}
    report = command_of._statistics(found, boxes, holds, facts, (99, 0))

    def limit(few):
        return pytest.approx((0.025 / (len(FORMS) * places)) ** (1 / few))

    def lows(of):
        return [low for form in FORMS for low in of[form]["low"]]

    rare, often = report["concepts"]
    assert lows(rare["auc"])[0] == limit(6) and lows(often["auc"])[0] == limit(20)
    assert set(lows(report["mean"]["auc"])) == set(lows(rare["auc"]))
    assert lows(report["patches"]["auroc"])[0] == limit(5)  # the rarer category's pictures


def test_bad_words_are_named(config, monkeypatch):
    swept = open_swept(config)
    with pytest.raises(UserError, match=r"--concepts umbrela: .*did you mean 'umbrella'"):
        read_layers(swept, replace(config, concepts="red,umbrela"))
    head = swept.model.token_head
    assert head is not None and head.vocab_ids is not None
    red = swept.encoder.tokenize("red")[1]
    columns = head.vocab_ids != int(red)
    fewer = TokenHead(head.linear.in_features, head.vocabulary, "patches", head.vocab_ids[columns])
    swept.model.token_head = fewer
    with pytest.raises(UserError, match=r"--concepts red: .*no column for its piece 'red'"):
        open_lens(swept, "auto", ["blue", "red"], [])
    monkeypatch.setattr(command_of, "FEWEST", 40)
    with pytest.raises(UserError, match=r"no word can be judged. 40 .*; left out: red \d+ / \d+"):
        read_layers(swept, replace(config, concepts="red"))
