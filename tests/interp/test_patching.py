"""Activation patching: every cell against a whole forward pass, the pairs, and the command."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import refused
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from reference import patching as naive
from reference.towers import CONFIG, tiny_model
from sweeps import small_sweep
from test_causal_sweep import Peak

from interp.causal.pairs import Pair, box_pairs, filled, given_pairs, scene_pair, swapped, target
from interp.causal.patching import (
    DIRECTIONS,
    GROUPS,
    PARTS,
    margin_directions,
    patch_batch,
    shares,
)
from interp.collect import Subject
from interp.config import PatchConfig
from interp.hooked import HookedVisionTransformer
from interp.patch import _handover, main, make_pairs, patch, render
from interp.render import words
from interp.render.canvas import png
from interp.render.patching import caption, figure
from interp.swept import Swept
from superclip.data.batch import Boxes, Record
from superclip.data.loader import Preprocess
from superclip.data.scenes import CATEGORIES, COLOURS, Scenes
from superclip.data.sources import Mixture
from superclip.errors import UserError
from superclip.model.factory import preprocess_for

TOWERS = {
    "tok": {},
    "not square, LayerScale, QuickGELU": {
        "image_size": (24, 16), "ls_init_value": 0.7, "act_layer": QuickGELU, "no_ln_pre": True,
    },
    "avg": {"pool_type": "avg"},
    "avg, norm after pool, a rest at the edge": {
        "pool_type": "avg", "final_ln_after_pool": True, "image_size": (20, 27),
    },
}  # fmt: skip


def build(dtype=torch.float64, **changes):
    """A tower in which every parameter matters."""
    options = {
        "image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "heads": 2,
        "mlp_ratio": 3.0, "output_dim": 12,
    }  # fmt: skip
    visual = VisionTransformer(**(options | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in visual.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            is_gain = "gamma" in name or ("ln_" in name and name.endswith("weight"))
            parameter.copy_(float(is_gain) + scale * noise)
    return visual.to(dtype).eval()


def some_pairs(visual, n=3):
    """Pictures that differ in one to three patches, and directions."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = visual.grid_size
    clean = torch.randn(n, 3, *visual.image_size, generator=generator)
    objects = torch.zeros(n, rows * columns, dtype=torch.bool)
    for pair in range(n):
        objects[pair, torch.randperm(rows * columns, generator=generator)[: pair + 1]] = True
    grid = objects.unflatten(1, (rows, columns))
    changed = grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    noise = torch.randn(*clean.shape, generator=generator)
    corrupted = clean.clone()
    part = corrupted[:, :, : 8 * rows, : 8 * columns]
    part[:] = torch.where(changed[:, None], noise[:, :, : 8 * rows, : 8 * columns], part)
    directions = torch.randn(n, 12, generator=generator)
    dtype = visual.conv1.weight.dtype
    return clean.to(dtype), corrupted.to(dtype), objects, directions.to(dtype)


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_every_cell_is_a_whole_forward_pass(changes):
    visual = build(**changes)
    clean, corrupted, objects, directions = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    found = patch_batch(tower, clean, corrupted, objects, directions, every_patch=True)
    with torch.no_grad():
        for pair in range(len(clean)):
            given = clean[pair], corrupted[pair], objects[pair], directions[pair]
            expected, n = naive.cells(visual, *given), 0
            for direction, kind in enumerate(DIRECTIONS):
                for layer, head in np.ndindex(found.heads.shape[3:]):
                    for part, name in enumerate(PARTS):
                        value = found.heads[pair, direction, part, layer, head]
                        assert abs(value - expected[kind, "heads", name, layer, head]) < 1e-10
                        n += 1
                for entry in range(found.groups.shape[2]):
                    for group, name in enumerate(GROUPS):
                        value = found.groups[pair, direction, entry, group]
                        assert abs(value - expected[kind, "groups", entry, name]) < 1e-10
                        n += 1
                    for patch in range(objects.shape[1]):
                        value = found.patches[pair, direction, entry, patch]
                        assert abs(value - expected[kind, "patches", entry, patch]) < 1e-10
                        n += 1
            assert n == len(expected) and max(map(abs, expected.values())) > 1e-2


def test_a_cell_is_a_forward_with_plain_hooks():
    visual = build()
    clean, corrupted, objects, directions = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    found = patch_batch(tower, clean, corrupted, objects, directions)

    def metric(features):
        return (torch.nn.functional.normalize(features, dim=-1) * directions).sum(-1)

    with torch.no_grad():
        features, other = tower.run_with_cache(clean)
        start, gap = metric(tower(corrupted)), metric(features) - metric(tower(corrupted))
        for layer, head in np.ndindex(2, 2):

            def put(value, hook, at=(slice(None), slice(None), head)):
                value = value.clone()
                value[at] = other[hook.name][at]
                return value

            hook = (f"blocks.{layer}.attn.hook_z", put)
            moved = metric(tower.run_with_hooks(corrupted, fwd_hooks=[hook])) - start
            torch.testing.assert_close(found.heads[:, 0, 0, layer, head], moved, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.clean - found.corrupted, gap, rtol=0, atol=1e-10)


def test_everything_at_the_bottom_is_the_other_picture_and_nothing_is_nothing():
    visual = build()
    clean, corrupted, objects, directions = some_pairs(visual)
    tower, everything = HookedVisionTransformer(visual), torch.ones_like(objects)
    gap = (all_of := patch_batch(tower, clean, corrupted, everything, directions)).clean
    gap = gap - all_of.corrupted
    some = patch_batch(tower, clean, corrupted, objects, directions)
    none = patch_batch(tower, clean, corrupted, ~everything, directions)
    for direction in (0, 1):
        for found in (all_of, some):  # what differs below layer 0 is the object
            torch.testing.assert_close(found.groups[:, direction, 0, 1], gap, rtol=0, atol=1e-12)
            torch.testing.assert_close(found.groups[:, direction, -1, 0], gap, rtol=0, atol=1e-12)
        assert not none.groups[:, direction, :, 1].any() and not some.groups[:, :, 0, [0, 2]].any()
    same = patch_batch(tower, clean, clean, objects, directions, every_patch=True)
    assert not any(x.any() for x in (same.heads, same.groups, same.patches))


def test_pattern_and_value_together_are_z():
    """Where only one of them differs, it alone is z; the rest of z is what needs both."""
    visual = build()
    clean, corrupted, objects, directions = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    whole = patch_batch(tower, clean, corrupted, objects, directions).heads
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[:32] = 0  # no queries, no keys: patterns are all alike
    flat = patch_batch(tower, clean, corrupted, objects, directions).heads
    torch.testing.assert_close(flat[:, :, 2], flat[:, :, 0], rtol=0, atol=1e-12)
    assert not flat[:, :, 1].any() and (whole[:, :, 1:].sum(2) - whole[:, :, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"pool_type": "avg", "image_size": (40, 24)}])
def test_memory_is_bounded_and_changes_nothing(changes):
    visual = build(torch.float32, **changes)
    given = some_pairs(visual, 4)
    tower = HookedVisionTransformer(visual)
    found = patch_batch(tower, *given, every_patch=True)
    with pytest.raises(UserError, match="too small: a pair takes"):
        patch_batch(tower, *given, max_memory=1000)
    cfg = tower.cfg
    row = 4 * cfg.n_ctx * cfg.d_model * (4 + 3 * 3)
    for budget in (12 * row, 30 * row):
        with Peak([*given, *visual.parameters()]) as peak:
            bounded = patch_batch(tower, *given, every_patch=True, max_memory=budget)
        assert 0.3 * budget < peak.peak < 1.1 * budget, (peak.peak / budget, budget)
        for one, other in zip(found, bounded, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_tower_is_left_as_it_was():
    visual = build().train()
    before = {name: p.clone() for name, p in visual.named_parameters()}
    given = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    plain = visual(given[0])
    with torch.enable_grad():
        found = patch_batch(tower, *given)
    assert not found.heads.requires_grad and visual.training and not tower.list_hooks()
    assert torch.equal(visual(given[0]), plain)
    for name, parameter in visual.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert parameter.requires_grad


def test_bad_requests_are_named():
    visual = build()
    clean, corrupted, objects, directions = some_pairs(visual)
    tower = HookedVisionTransformer(visual)
    with pytest.raises(UserError, match=r"need objects \[3, 9\]"):
        patch_batch(tower, clean, corrupted, objects[:, :4], directions)
    with pytest.raises(UserError, match="corrupted pictures"):
        patch_batch(tower, clean, corrupted[:2], objects, directions)
    with (
        tower.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)], reset_hooks_end=True),
        pytest.raises(UserError, match="hooks are on the tower"),
    ):
        try:
            patch_batch(tower, clean, corrupted, objects, directions)
        finally:
            tower(clean)


def test_directions_by_hand():
    texts = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-3.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    clean = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    corrupted = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = margin_directions(features, texts, clean, corrupted)
    # Given; the hardest of what is not true of it; likewise.
    expected = torch.tensor([[2.0, 0.0], [0.5 - 0.6, 0.5 - 0.8], [1.0, -1.0]])
    torch.testing.assert_close(found, expected)
    for own, other in ((~clean[:, [0] * 4], corrupted), (clean | True, corrupted & False)):
        with pytest.raises(UserError, match="wrong of it"):
            margin_directions(features, texts, own, other)


def test_shares_are_ratios_of_means():
    rng = np.random.default_rng(0)
    gap = rng.uniform(0.01, 1, 200)
    effects = np.stack([0.3 * gap, 0 * gap, 0.5 * gap + rng.normal(0, 0.1, 200)], 1)[:, None]
    band, test = shares(effects, gap, 999)
    np.testing.assert_allclose(band.estimate[0], (effects / gap.mean()).mean(0)[0])
    np.testing.assert_allclose(band.low[0, :2], [0.3, 0], atol=1e-12)  # exact in every pair
    assert band.low[0, 2] < 0.5 < band.high[0, 2] and band.n == 200
    assert (test.p_adjusted[0] == [1 / 1000, 1, 1 / 1000]).all()


def covered(within, seeds=200):
    """How often the band of three nodes holds all three true shares."""
    truth, hits = np.array([0.2, 0.5, 0.0]), 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        gap = rng.gamma(4, 0.1, 60)
        effects = truth * gap[:, None] + rng.normal(0, within, (60, 3)) * gap[:, None] ** 0.5
        band, _ = shares(effects, gap, 199, seed)
        hits += ((band.low <= truth) & (truth <= band.high)).all()
    return hits / seeds


def test_the_band_covers():
    assert 0.90 <= covered(0.2) <= 0.99


# Pairs


def record(boxes, names, crowd=None, picture=None, size=(40, 40)):
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8) if picture is None else picture
    crowd = np.zeros(len(names), bool) if crowd is None else np.array(crowd)
    boxes = Boxes(np.array(boxes, np.float32).reshape(-1, 4), tuple(names), crowd)
    return Record(0, "r", width, height, picture, ("a text",), (0,), boxes)


def test_the_target_is_the_largest_lone_object():
    preprocess = Preprocess(40, "crop", (0.5,) * 3, (0.5,) * 3)
    wide = Preprocess(20, "crop", (0.5,) * 3, (0.5,) * 3)
    cat, dog, crowd = (2, 3, 10, 10), (20, 20, 12, 12), (0, 0, 15, 15)

    def of(boxes, names, **more):
        at = record(boxes, names, **more)
        return target(at, (wide if "size" in more else preprocess).geometry(at))

    assert of([cat, dog], ["cat", "dog"]) == ((20, 20, 32, 32), "dog")
    assert of([cat, dog, dog], ["cat", "dog", "dog"]) == ((2, 3, 12, 13), "cat")  # two dogs
    assert of([cat, crowd], ["cat", "dog"], crowd=[False, True])[1] == "cat"
    assert of([cat, (0, 0, 40, 21)], ["cat", "sky"])[1] == "cat"  # over half of the picture
    assert of([], []) is None and of([crowd], ["dog"], crowd=[True]) is None
    # 80 x 40 -> a crop of 20 px around the middle; half sizes, 10 px cut off at the left.
    assert of([(24, 4, 8, 8)], ["cat"], size=(80, 40)) == ((2, 2, 6, 6), "cat")
    assert of([(0, 4, 21, 8)], ["cat"], size=(80, 40)) is None  # nearly all cropped away


@pytest.mark.parametrize("box", [(2, 3, 6, 8), (0, 0, 4, 5), (0, 4, 10, 9), (5, 0, 10, 9)])
def test_filled_pixels_are_the_mean_of_their_neighbours(box):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (3, 9, 10), dtype=np.uint8)
    found = filled(picture, box, (0, 0, 10, 9))
    x0, y0, x1, y1 = box
    outside = np.ones((9, 10), bool)
    outside[y0:y1, x0:x1] = False
    assert np.array_equal(found[:, outside], picture[:, outside]) and found.dtype == np.uint8
    values = found.astype(float)
    for y in range(y0, y1):
        for x in range(x0, x1):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            around = [values[:, j, i] for j, i in around if 0 <= j < 9 and 0 <= i < 10]
            assert np.abs(values[:, y, x] - np.mean(around, axis=0)).max() <= 1  # both rounded


def test_filling_does_not_look_at_the_padding():
    picture = np.full((3, 12, 12), 50, np.uint8)
    picture[:, :4] = 255  # padding above
    assert (filled(picture, (2, 4, 6, 7), (0, 4, 12, 12))[:, 4:] == 50).all()


def test_swapping_pastes_the_donors_box():
    picture, donor = np.zeros((3, 10, 10), np.uint8), np.zeros((3, 10, 10), np.uint8)
    donor[:, 0:4, 5:8] = 200
    found = swapped(picture, (1, 2, 7, 6), donor, (5, 0, 8, 4))
    assert (found[:, 2:6, 1:7] == 200).all() and found.sum() == 3 * 24 * 200


def test_box_pairs_choose_similar_donors_of_another_category():
    preprocess = Preprocess(40, "crop", (0.5,) * 3, (0.5,) * 3)
    sizes = {"cat": (10, 10), "ant": (11, 10), "dog": (20, 8), "elk": (10, 10)}
    records = [record([(5, 5, *size)], [name]) for name, size in sizes.items()]
    records.append(record([], []))
    pictures = [np.full((3, 40, 40), 40 * k, np.uint8) for k in range(5)]
    pairs = box_pairs(records, pictures, preprocess, swap=True)
    texts = [(p.texts_clean, p.texts_corrupted) for p in pairs]
    assert texts[:2] == [
        (("a picture of a cat",), ("a picture of an elk",)),
        (("a picture of an ant",), ("a picture of a cat",)),
    ]
    assert len(pairs) == 4 and (pairs[0].corrupted[:, 5:15, 5:15] == 120).all()
    assert all(p.texts_corrupted == () for p in box_pairs(records, pictures, preprocess, False))
    assert box_pairs(records[:1], pictures[:1], preprocess, swap=True) == []  # no donor


@pytest.mark.parametrize("what", ["colour", "category"])
@pytest.mark.parametrize("size", [80, 96])
def test_scene_pairs_change_one_attribute_of_one_object(what, size):
    scenes = Scenes("val", 40)
    preprocess = Preprocess(size, "crop", (0.5,) * 3, (0.5,) * 3)
    for row in range(40):
        scene, pair = scenes.scene(row), scene_pair(scenes, row, what, preprocess)
        x, y, w, h = scene.objects[0].xywh
        changed = (pair.clean != pair.corrupted).any(0)
        assert changed.any() and pair.patches((size // 5, size // 5)).sum() in range(1, 10)
        if size == 80:
            cell = np.zeros((80, 80), bool)
            row_, column = scene.objects[0].cell
            cell[16 * row_ : 16 * row_ + 16, 16 * column : 16 * column + 16] = True
            assert not (changed & ~cell).any() and pair.patches((16, 16)).sum() == 1
            if what == "colour":
                assert not changed[:y].any() and not changed[y + h :].any()
                assert not changed[:, :x].any() and not changed[:, x + w :].any()
            assert np.array_equal(pair.clean.transpose(1, 2, 0), scene.image)
        (clean,), (other,) = pair.texts_clean, pair.texts_corrupted
        differing = [(a, b) for a, b in zip(clean.split(), other.split()) if a != b]
        differing = [d for d in differing if d[0] not in ("a", "an")]
        assert len(differing) == 1 and getattr(scene.objects[0], what) == differing[0][0]
        assert differing[0][1] in (COLOURS if what == "colour" else CATEGORIES)
        assert all(getattr(thing, what) != differing[0][1] for thing in scene.objects)
    again = scene_pair(scenes, 39, what, preprocess)
    assert np.array_equal(again.corrupted, pair.corrupted)


def test_a_scene_redrawn_as_itself_is_itself():
    scenes = Scenes("val", 20)
    for row in range(20):
        scene = scenes.scene(row)
        first = scene.objects[0]
        again = scenes.scene(row, colour=first.colour, category=first.category)
        assert np.array_equal(scene.image, again.image) and again.objects == scene.objects


def test_patches_leave_out_what_the_tower_does():
    clean = np.zeros((3, 20, 27), np.uint8)
    corrupted = clean.copy()
    corrupted[0, 15, 23] = corrupted[1, 19, 26] = 1  # the second lies beyond the last patch
    assert np.flatnonzero(Pair(clean, corrupted, ()).patches((8, 8))).tolist() == [5]


# The command


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 72 scenes by an untrained model, as `open_swept` would give it."""
    model, scenes, results = tiny_model(), Scenes("val", 72), small_sweep()
    preprocess = preprocess_for(CONFIG, "crop")
    subject = Subject(model, CONFIG, preprocess, results.manifest["checkpoint"])
    results = dataclasses.replace(results, image_ids=np.array(scenes.keys))
    tower = HookedVisionTransformer(model.clip.visual)
    folder = tmp_path_factory.mktemp("swept")
    return Swept(results, folder, subject, scenes, tower, torch.device("cpu"), 16)


def written(pairs, folder):
    """The JSON list of these pairs, pictures beside it."""
    entries = []
    for k, pair in enumerate(pairs):
        entry = {}
        for name in ("clean", "corrupted"):
            entry[name] = f"{name}{k}.png"
            Image.fromarray(getattr(pair, name).transpose(1, 2, 0)).save(folder / entry[name])
            for (text,) in filter(None, [getattr(pair, f"texts_{name}")]):
                entry[f"text_{name}"] = text
        entries.append(entry)
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def pairs_file(swept, tmp_path_factory):
    """Pairs of scenes, their texts so that this untrained model prefers the clean ones."""
    found = []
    for row in range(40):
        pair = scene_pair(swept.source, row, "colour", swept.subject.preprocess)
        texts = swept.encoder.texts(swept.model, [*pair.texts_clean, *pair.texts_corrupted])
        pixels = torch.from_numpy(np.stack([pair.clean, pair.corrupted]))
        with torch.no_grad():
            features = swept.model.encode_image(pixels)
        if ((features[0] - features[1]) @ (texts[0] - texts[1])) < 0:
            texts = pair.texts_corrupted, pair.texts_clean
            pair = Pair(pair.clean, pair.corrupted, *texts)
        found.append(pair)
    return found, written(found, tmp_path_factory.mktemp("given"))


def test_given_pairs_are_read_back(pairs_file, swept):
    pairs, path = pairs_file
    found = given_pairs(path, swept.subject.preprocess)
    assert len(found) == 40
    for one, other in zip(found, pairs, strict=True):
        assert np.array_equal(one.clean, other.clean) and one.texts_clean == other.texts_clean
        assert np.array_equal(one.corrupted, other.corrupted)
        assert one.texts_corrupted == other.texts_corrupted


GOOD = {"clean": "clean0.png", "corrupted": "corrupted0.png", "text_clean": "a star"}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{]", "can't be read"),
        ("{}", "is no list of pairs"),
        ([], "is no list of pairs, or an empty one"),
        ([3], "entry 0 lacks clean"),
        ([{"clean": "clean0.png", "corrupted": "clean0.png"}], "entry 0 lacks text_clean"),
        ([GOOD | {"text_corupted": "x"}], "'text_corupted' is unknown; did you mean 'text_corr"),
        ([GOOD | {"text_clean": 5}], "must be a text"),
        ([GOOD | {"text_clean": ["a", "b"]}], "must be a text"),
        ([GOOD, GOOD | {"text_corrupted": None}], "entry 1 stands twice"),
        ([GOOD | {"clean": "nope.png"}], "entry 0: a picture can't be read .No such file"),
        ([GOOD | {"clean": "bad.json"}], "entry 0: a picture can't be read .unreadable header"),
    ],
)
def test_a_bad_list_is_named(content, said, pairs_file, swept):
    path = pairs_file[1].with_name("bad.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=said) as caught:
        given_pairs(path, swept.subject.preprocess)
    assert str(caught.value).startswith(f"--pairs {path}")


def test_the_report_says_what_the_patches_do(pairs_file, swept):
    options = {"draws": 199, "tau": 1e-6, "every_patch": True, "batch_size": 16}
    config = PatchConfig(pairs=str(pairs_file[1]), **options)
    report = patch(swept, config)
    assert report["sought"] == report["made"] == 40 == report["n"] + report["below_tau"]
    assert report["images_sha256"] == swept.results.manifest["images_sha256"]
    assert report["gap"]["low"] > 0 and json.dumps(report, allow_nan=False)
    for direction in DIRECTIONS:
        heads, found = report[direction]["heads"], report[direction]["stream"]
        assert [row["part"] for row in heads] == [part for part in PARTS for _ in range(4)]
        assert [row["at"] for row in heads[:4]] == ["L0H0", "L0H1", "L1H0", "L1H1"]
        stream = {(row["part"], row["at"]): row["estimate"] for row in found}
        assert len(stream) == 5 * 3 and stream["object", 0] == pytest.approx(1, abs=1e-4)
        assert stream["an object patch", 0] == pytest.approx(1, abs=1e-4)  # a cell is a patch
        assert stream["class", 0] == 0 and stream["class", 2] == pytest.approx(1, abs=1e-4)
        assert report[direction]["handover"]["estimate"] in (1, 2)
    never = {direction: dict(report[direction]) for direction in DIRECTIONS}
    for direction in DIRECTIONS:
        never[direction]["handover"] = {"estimate": 2.0, "low": 1.0, "high": 3.0, "n": 40}
    assert render(report | never).count("object's patches from entry 2 [1, never] on") == 2
    text = render(report)
    best = max(report["denoise"]["heads"], key=lambda row: row["estimate"])
    assert f"{best['at']}  " in text and "n = 40" in text and words.span(best) in text
    assert png(figure(report))[1:4] == b"PNG"
    z = max(report["denoise"]["heads"][:4], key=lambda row: row["estimate"])
    rows = [*report["denoise"]["heads"], *report["noise"]["heads"]]
    said = " ".join(caption(report, rows, 80).split())
    assert f"output of {z['at']} brings back most: {words.span(z)}" in said
    assert f"({sum(row['p'] <= 0.05 for row in rows)} of 24 cells)" in said


def test_the_class_token_takes_over_where_it_stays_ahead():
    of_object = [0.5, 0.5, 0.5, 0.0]
    assert _handover(np.array([0.6, 0.1, 0.7, 1.0, *of_object])) == 2  # not its first time, 0
    assert _handover(np.array([0.6, 0.1, 0.7, -0.1, *of_object])) == 4  # never


@pytest.mark.parametrize("how", ["fill", "swap", "colour", "category"])
def test_pairs_are_of_validation_pictures(how, swept):
    pairs, sought = make_pairs(swept, PatchConfig(pairs=how, num=20))
    rows = swept.rows("validation")[:20]
    assert sought == 20 == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        assert np.array_equal(pair.clean.transpose(1, 2, 0), swept.source.scene(row).image)
        assert pair.patches((16, 16)).sum() == 1
        assert bool(pair.texts_corrupted) == (how != "fill")


def test_the_command_writes_once(pairs_file, swept, monkeypatch, capsys):
    monkeypatch.setattr("interp.swept.open_swept", lambda config: swept)
    out, pairs = str(swept.folder), str(pairs_file[1])
    words = ["--results", out, "--pairs", pairs, "--tau", "0.000001", "--draws", "99"]
    main(words)
    printed = capsys.readouterr().out
    first = (swept.folder / "patching.json").read_bytes()
    report = json.loads(first)
    assert render(report) in printed and report["pairs"] == "pairs.json"
    assert (swept.folder / "patching.png").read_bytes() == png(figure(report))
    with pytest.raises(UserError, match="--overwrite replaces it"):
        main(words)
    main([*words, "--overwrite"])
    assert (swept.folder / "patching.json").read_bytes() == first


def test_mistakes_are_named(pairs_file, swept, tmp_path):
    config = PatchConfig(pairs=str(pairs_file[1]), tau=1.9, draws=99)
    with pytest.raises(UserError, match=r"only 0 of 40 pairs differ by --tau 1.9"):
        patch(swept, config)
    turned = [Pair(p.corrupted, p.clean, p.texts_clean, p.texts_corrupted) for p in pairs_file[0]]
    path = written(turned, tmp_path)
    with pytest.raises(UserError, match=r"don't score higher by the metric \(gap -.*, n = 40\)"):
        patch(swept, PatchConfig(pairs=str(path), tau=0, draws=99))
    other = dataclasses.replace(swept, source=Mixture([swept.source]))
    with pytest.raises(UserError, match="redraws generated scenes, not"):
        make_pairs(other, PatchConfig(pairs="colour"))
    for name, value in (("pairs", "blur"), ("max_memory", 0), ("num", 0), ("tau", -1.0)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value!r}"):
            PatchConfig(**{name: value})
    assert "--draws 3 must be" in refused("interp.patch", "--draws", "3")
