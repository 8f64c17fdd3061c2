import itertools
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.stats import rankdata

from superclip.data import scenes
from superclip.data.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    CELL,
    COLOURS,
    GRID,
    SIZE,
    VISIBLE,
    Scenes,
    caption_vocabulary,
    category_prompts,
    retrieval_ceilings,
    write_coco,
)
from superclip.errors import UserError

N = 4000


@pytest.fixture(scope="module")
def sample():
    source = Scenes("val", num=N)
    return [source.scene(k) for k in range(N)]


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    source = Scenes("train", num=9000)
    for row in (41, 3):
        scene, again = Scenes("train", num=50).scene(row), source.scene(row)
        assert np.array_equal(scene.image, again.image)
        assert scene.caption == again.caption and scene.objects == again.objects
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000
    assert np.array_equal(copy.scene(7).image, source.scene(7).image)


def test_captions_of_known_rows_do_not_drift():
    # A change here is a change of the data: raise GENERATOR_VERSION with it.
    source = Scenes("train")
    assert [source.scene(k).caption for k in (0, 2, 6, 115_199)] == [
        "a drawing of a white heart above a white horse at night",
        "a drawing of a green flag in the sky",
        "a blue umbrella above a blue envelope in the sky",
        "a picture of a yellow heart right of a blue cup in the snow",
    ]


def test_splits_and_seeds_draw_from_disjoint_streams():
    variants = [Scenes("train"), Scenes("val"), Scenes("test"), Scenes("train", seed=1)]
    captions = {tuple(source.scene(k).caption for k in range(20)) for source in variants}
    assert len(captions) == len({source.digest for source in variants}) == 4
    assert Scenes("train", num=10).digest != Scenes("train", num=11).digest
    assert Scenes("train", num=10).digest == Scenes("train", num=10).digest


def test_source_contract():
    source = Scenes("train", num=2 * 4096 + 5)
    assert source.shard_sizes == (4096, 4096, 5)
    assert source.num_images == source.num_captions == len(source.keys) == len(set(source.keys))
    record, scene = source.read(123), source.scene(123)
    assert record.key == source.keys[123] == "train-0-000123"
    assert (record.row, record.width, record.height) == (123, SIZE, SIZE)
    assert record.captions == (scene.caption,) and record.caption_rows == (123,)
    assert isinstance(record.picture, np.ndarray)
    assert record.picture.shape == (SIZE, SIZE, 3) and record.picture.dtype == np.uint8
    assert record.boxes.xywh.dtype == np.float32
    assert record.boxes.xywh.tolist() == [list(o.xywh) for o in scene.objects]
    assert record.boxes.categories == tuple(o.category for o in scene.objects)
    assert set(record.clutter.categories) == {"clutter"}
    assert len(record.clutter.xywh) == len(record.clutter.crowd) == len(scene.clutter)


def test_rows_outside_and_empty_sets_are_refused():
    with pytest.raises(UserError, match="num 0"):
        Scenes(num=0)
    for row in (-1, 5):
        with pytest.raises(IndexError):
            Scenes(num=5).read(row)


def test_every_glyph_lies_in_a_cell_of_its_own(sample):
    for scene in sample[:500]:
        things = scene.objects + scene.clutter
        assert len({t.cell for t in things}) == len(things)
        for thing in things:
            x, y, w, h = thing.xywh
            assert (y // CELL, x // CELL) == thing.cell
            assert ((y + h - 1) // CELL, (x + w - 1) // CELL) == thing.cell
            assert max(w, h) == CELL


def test_boxes_are_tight_and_hold_their_colour(sample):
    bank = scenes._bank(0)
    for ink, controls in zip(bank.objects, bank.controls):
        for shape in [ink, *controls]:
            edges = shape[0], shape[-1], shape[:, 0], shape[:, -1]
            assert min(edge.max() for edge in edges) > 0.05
            assert shape.shape == ink.shape
    for scene in sample[:500]:
        for thing in scene.objects + scene.clutter:
            x, y, w, h = thing.xywh
            pixels = scene.image[y : y + h, x : x + w].reshape(-1, 3).astype(int)
            assert np.abs(pixels - COLOURS[thing.colour]).sum(1).min() < 110
            assert thing.colour in VISIBLE[scene.background]


def test_categories_are_distinct_pictures():
    inks = np.zeros((len(CATEGORIES), CELL, CELL))
    for cell, ink in zip(inks, scenes._bank(0).objects):
        cell[: ink.shape[0], : ink.shape[1]] = ink[..., 0]
    for a, b in itertools.combinations(inks, 2):
        assert np.abs(a - b).mean() > 0.1


def test_relations_are_true_of_the_boxes(sample):
    pairs = [scene for scene in sample if len(scene.objects) == 2]
    seen = set()
    for scene in pairs:
        (ax, ay, aw, ah), (bx, by, bw, bh) = (o.xywh for o in scene.objects)
        truth = {
            "left of": ax + aw <= bx,
            "right of": bx + bw <= ax,
            "above": ay + ah <= by,
            "below": by + bh <= ay,
        }
        assert scene.relation is not None and truth[scene.relation]
        seen.add(scene.relation)
    assert seen == set(scenes.RELATIONS)
    assert all(scene.relation is None for scene in sample if len(scene.objects) == 1)


def test_captions_say_what_the_graph_holds(sample):
    for scene in sample:
        words = scene.caption.split()
        named = [scene.objects[k] for k in scene.named]
        assert [w for w in words if w in CATEGORIES] == [o.category for o in named]
        assert [w for w in words if w in COLOURS] == [o.colour for o in named]
        assert scene.caption.endswith(BACKGROUNDS[scene.background].phrase) == (
            scene.mentions_background
        )
        assert (scene.relation is not None and scene.relation in scene.caption) == (len(named) == 2)
        assert set(words) <= caption_vocabulary()
        for article, follower in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (follower[0] in "aeiou")
    assert set().union(*(s.caption.split() for s in sample)) == caption_vocabulary()


def test_another_graph_gives_another_caption(sample):
    scene = next(s for s in sample if len(s.named) == 2 and not s.prefix)
    swapped = replace(scene, objects=scene.objects[::-1], mentions_background=False)
    b, a = (f"{o.colour} {o.category}" for o in scene.objects)
    text = swapped.caption.replace("an orange", "a orange")
    assert text == f"a {a} {scene.relation} a {b}"


def test_shares_of_the_composition(sample):
    def near(share, expected, n):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n), (share, expected)

    pairs = [s for s in sample if len(s.objects) == 2]
    near(len(pairs) / N, 1 / 3, N)
    near(np.mean([len(s.named) == 1 for s in pairs]), 0.15, len(pairs))
    near(np.mean([s.mentions_background for s in sample]), 0.6, N)
    near(np.mean([s.prefix == "" for s in sample]), 0.5, N)
    for q in (3, 4, 5):
        near(np.mean([len(s.clutter) == q for s in sample]), 1 / 3, N)
    categories = [o.category for s in sample for o in s.objects]
    for name in CATEGORIES:
        near(categories.count(name) / len(categories), 1 / 12, len(categories))


def low_level(scene):
    """Per cell `[5, 5]`: colour distance from the image mean, patch std and edge energy."""
    image = scene.image.astype(np.float32)
    cells = image.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4)
    grey = cells.mean(-1)
    vertical, horizontal = np.abs(np.diff(grey, axis=2)), np.abs(np.diff(grey, axis=3))
    return {
        "mean colour": np.linalg.norm(cells.mean((2, 3)) - image.mean((0, 1)), axis=-1),
        "L1 contrast": np.abs(cells - image.mean((0, 1))).mean((2, 3, 4)),
        "std": cells.reshape(GRID, GRID, -1, 3).std(2).mean(-1),
        "edges": vertical.mean((2, 3)) + horizontal.mean((2, 3)),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_low_level_contrast_cannot_tell_objects_from_clutter(seed):
    source = Scenes("val", num=N, seed=seed)
    values = {name: ([], []) for name in low_level(source.scene(0))}
    for scene in map(source.scene, range(N // 2)):
        for name, grid in low_level(scene).items():
            for kind, things in enumerate((scene.objects, scene.clutter)):
                values[name][kind].extend(grid[t.cell] for t in things)
    for name, (objects, clutter) in values.items():
        above = rankdata(objects + clutter)[: len(objects)] - rankdata(objects)
        assert abs(above.mean() / len(clutter) - 0.5) < 0.04, name  # AUROC
        quantiles = np.quantile(objects, np.linspace(0, 1, 101))
        below = np.searchsorted(np.sort(clutter), quantiles) / len(clutter)
        assert np.abs(below - np.linspace(0, 1, 101)).max() < 0.06, name  # Kolmogorov-Smirnov


def test_a_saliency_map_is_not_selective(sample):
    """Mass on objects over mass on objects and clutter, of colour distance to the power 8."""
    mass, area = np.zeros(2), np.zeros(2)
    for scene in sample[: N // 2]:
        saliency = low_level(scene)["mean colour"] ** 8
        for kind, things in enumerate((scene.objects, scene.clutter)):
            mass[kind] += sum(saliency[t.cell] for t in things) / saliency.sum()
            area[kind] += len(things)
    assert abs(mass[0] / mass.sum() - area[0] / area.sum()) < 0.03


def test_clutter_has_the_objects_marginals(sample):
    objects = [o for s in sample for o in s.objects]
    clutter = [o for s in sample for o in s.clutter]

    def distance(value, things_a, things_b):
        """Total variation between two samples of a discrete value."""
        a, b = ([value(t) for t in things] for things in (things_a, things_b))
        return sum(abs(a.count(v) / len(a) - b.count(v) / len(b)) for v in {*a, *b}) / 2

    assert distance(lambda t: t.colour, objects, clutter) < 0.03
    assert distance(lambda t: t.cell, objects, clutter) < 0.04
    assert distance(lambda t: t.xywh[2:], objects, clutter) < 0.03
    assert distance(lambda t: (t.xywh[0] % CELL, t.xywh[1] % CELL), objects, clutter) < 0.04


def test_clutter_has_the_objects_ink():
    bank = scenes._bank(0)
    for ink, controls in zip(bank.objects, bank.controls):
        shares = np.array([c.sum() for c in controls]) / CELL**2
        assert abs(shares.mean() - ink.sum() / CELL**2) < 0.03
        assert shares.std() < 0.06
        assert len(np.unique([c.tobytes() for c in controls])) == len(controls)


def test_every_caption_word_is_one_bpe_token():
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    assert {word: len(encode(word)) for word in caption_vocabulary()} == dict.fromkeys(
        caption_vocabulary(), 1
    )


def test_category_prompts_are_captions_of_one_object():
    prompts = category_prompts()
    assert len(prompts) == len(CATEGORIES) and {len(p) for p in prompts} == {len(COLOURS)}
    assert "a red cup" in prompts[list(CATEGORIES).index("cup")]
    assert "an orange sun" in prompts[0]


def naive_ceiling(contents, k):
    """Mean over pictures and over every order of the candidates with equal score."""
    hits = []
    for wanted, content in enumerate(contents):
        tied = [row for row, other in enumerate(contents) if other == content]
        orders = list(itertools.permutations(tied))
        hits.append(np.mean([wanted in order[:k] for order in orders]))
    return float(np.mean(hits))


def test_ceilings_equal_the_average_over_all_tie_breaks():
    shown = ["a red cup", "a red sun", "a red cup", "a blue cup", "a red star at night"]
    captions = ["a drawing of a red cup", *shown[1:3], "a picture of a blue cup", shown[4]]
    blind = ["a red", "a red", "a red", "a blue", "a red at night"]
    ceilings = retrieval_ceilings(captions, ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert ceilings["chance"][k] == pytest.approx(naive_ceiling(["same"] * 5, k))
        assert ceilings["category_blind"][k] == pytest.approx(naive_ceiling(blind, k))
        assert ceilings["caption_collision"][k] == pytest.approx(naive_ceiling(shown, k))
    assert ceilings["category_blind"][1] == pytest.approx(3 / 5)


def test_ceilings_of_a_pool_leave_room_for_categories(sample):
    pool = retrieval_ceilings([scene.caption for scene in sample[:500]])
    assert pool["chance"][1] == pytest.approx(1 / 500)
    assert pool["category_blind"][1] < 0.45 < 0.7 < pool["caption_collision"][1] < 1


def test_coco_export_reads_back(tmp_path):
    out, source = tmp_path / "deep" / "coco", Scenes("val", num=30)
    write_coco(source, out, 12)
    assert sorted(p.name for p in out.parent.iterdir()) == ["coco"]
    assert sorted(p.name for p in out.iterdir()) == [
        "captions.json",
        "clutter.json",
        "images",
        "instances.json",
    ]
    captions, instances, clutter = (
        COCO(str(out / f"{name}.json")) for name in ("captions", "instances", "clutter")
    )
    assert {c["name"] for c in instances.dataset["categories"]} == set(CATEGORIES)
    names = {c["id"]: c["name"] for c in instances.dataset["categories"]}
    for row in range(12):
        scene, (image,) = source.scene(row), instances.loadImgs([row])
        assert (image["width"], image["height"]) == (SIZE, SIZE)
        picture = Image.open(out / "images" / image["file_name"])
        assert np.array_equal(np.asarray(picture), scene.image)
        assert [a.get("caption") for a in captions.imgToAnns[row]] == [scene.caption]
        for read, things in ((instances, scene.objects), (clutter, scene.clutter)):
            assert [a["bbox"] for a in read.imgToAnns[row]] == [list(t.xywh) for t in things]
            assert [a["area"] for a in read.imgToAnns[row]] == [
                t.xywh[2] * t.xywh[3] for t in things
            ]
        assert [names[a["category_id"]] for a in instances.imgToAnns[row]] == [
            o.category for o in scene.objects
        ]
    document = json.loads((out / "instances.json").read_text())
    assert source.digest in document["info"]["description"] and document["licenses"]


def test_coco_export_is_all_or_nothing(tmp_path):
    source, full = Scenes("val", num=5), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        write_coco(source, full, 3)
    with pytest.raises(UserError, match="--num 6"):
        write_coco(source, tmp_path / "new", 6)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]

    class Breaks(Scenes):
        def scene(self, index):
            if index == 2:
                raise OSError("disk full")
            return super().scene(index)

    with pytest.raises(OSError, match="disk full"):
        write_coco(Breaks("val", num=5), tmp_path / "new", 5)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    write_coco(source, tmp_path / "empty", 2)
    assert len(json.loads((tmp_path / "empty" / "captions.json").read_text())["images"]) == 2


def test_scenes_need_the_font_of_matplotlib_but_never_import_it():
    code = "import sys; from superclip.data.scenes import Scenes; Scenes(num=1).scene(0); "
    code += "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
