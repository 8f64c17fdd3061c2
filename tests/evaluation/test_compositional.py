import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from reference.compositional import accuracy
from torch import nn

from superclip.data.checks import Checks, Item, read_checks
from superclip.data.geometry import render
from superclip.data.loader import Preprocess, tokenizer_for
from superclip.data.scene_checks import KINDS, scene_checks
from superclip.data.scenes import Scenes
from superclip.errors import UserError
from superclip.evaluation.compositional import CategoryMean, compositional, text_only
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import Mean
from superclip.model.factory import tokenizer
from superclip.model.superclip import SuperCLIP
from superclip.model.weights import load_checkpoint

CPU = torch.device("cpu")
WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "crimson": (3, 0, 0), "grey": (1, 1, 1)}


class Colours(nn.Module):
    """A whole CLIP that anyone can work by hand: the feature is the mean colour."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(list(WORDS.values())).float())
        self.visual = nn.Module()
        self.visual.output_dim = 3

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, tokens):
        return self.table(tokens[:, 0])


@pytest.fixture
def toy():
    model = SuperCLIP(Colours(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    preprocess = Preprocess(4, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return model.eval(), Encoder(preprocess, lambda t: np.array([list(WORDS).index(t)]), CPU)


def entry(image, positive, negative, category):
    return {"image": image, "positive": positive, "negative": negative, "category": category}


def paint(folder):
    for name, rgb in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        Image.fromarray(np.full((4, 4, 3), rgb, np.uint8)).save(folder / f"{name}.png")


ITEMS = [
    entry("red.png", "red", "green", "a"),  # 1 > 0
    entry("green.png", "red", "green", "a"),  # 0 < 1
    entry("red.png", "red", "grey", "b"),  # 1 > 0.58
    entry("red.png", "red", "crimson", "b"),  # 1 = 1: the tie is lost
    entry("green.png", "grey", "red", "b"),  # 0.58 > 0
]


def read(folder, items):
    (folder / "x.json").write_text(json.dumps(items))
    return read_checks([folder / "x.json"], folder)


def rows(result):
    return {m.name: m for m in result.measures}


def test_a_toy_worked_by_hand(tmp_path, toy):
    paint(tmp_path)
    checks = read(tmp_path, ITEMS)
    result = compositional(*toy, checks)
    assert {m.name: m.statistic.value for m in result.measures} == pytest.approx(
        {"a": 1 / 2, "b": 2 / 3, "mean over categories": 7 / 12, "all items": 3 / 5}
    )
    assert [m.statistic.queries for m in result.measures] == [2, 3, 5, 5]
    assert [m.statistic.pictures for m in result.measures] == [2, 2, 2, 2]
    # b asks one picture twice: the test of two models swaps those answers together.
    assert [m.hits for m in result.measures] == [True, True, False, True]
    assert {(m.chance, m.candidates) for m in result.measures} == {(0.5, 2)}
    assert result.notes["ties"] == {"a": 0, "b": 1}
    assert result.data == {
        "name": "x",
        "sha256": checks.sha256,
        "protocol": "the positive scores strictly above the negative",
        "items": {"a": 2, "b": 3},
        "pictures": 2,
        "missing": {},
    }
    assert json.loads(json.dumps([result.data, result.notes])) == [result.data, result.notes]


def test_questions_of_a_picture_stay_together_in_a_resample(tmp_path, toy):
    paint(tmp_path)
    found = rows(compositional(*toy, read(tmp_path, ITEMS)))
    weights = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # red twice, green twice, each once
    for name, values in {
        "a": [1, 0, 1 / 2],
        "b": [1 / 2, 1, 2 / 3],
        "mean over categories": [3 / 4, 1 / 2, 7 / 12],
        "all items": [2 / 3, 1 / 2, 3 / 5],
    }.items():
        assert found[name].statistic(weights) == pytest.approx(values), name


def test_a_category_that_a_draw_leaves_empty_is_left_out_of_it():
    one, two = np.array([1.0]), np.array([0.0, 1.0])
    mean = CategoryMean((Mean(one, np.array([0]), 2), Mean(two, np.array([0, 1]), 2)))
    assert mean(np.array([[1.0, 1.0], [0.0, 2.0]])) == pytest.approx([3 / 4, 1])
    assert (mean.pictures, mean.queries, mean.value) == (2, 3, 3 / 4)


def test_unreadable_pictures_are_left_out_and_listed(tmp_path, toy):
    paint(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    damaged = [entry("cut.png", "red", "green", "a"), entry("cut.png", "red", "grey", "c")]
    result = compositional(*toy, read(tmp_path, damaged[:1] + ITEMS + damaged[1:]))
    assert list(result.data["missing"]) == ["cut.png"]
    whole = compositional(*toy, read(tmp_path, ITEMS))
    for name, measure in rows(whole).items():
        assert rows(result)[name].statistic.value == measure.statistic.value
    assert "c" not in rows(result) and result.data["items"] == {"a": 2, "b": 3}
    with pytest.raises(UserError, match="no picture can be read"):
        compositional(*toy, read(tmp_path, damaged))


def test_a_limit_is_one_of_each_category(tmp_path, toy):
    paint(tmp_path)
    result = compositional(*toy, read(tmp_path, ITEMS), limit=1)
    assert result.data["items"] == {"a": 1, "b": 1} and result.data["pictures"] == 1
    assert rows(result)["all items"].statistic.value == 1


def opened(run):
    found = load_checkpoint(run / "final_epoch.pt")
    return found.model, Encoder(found.preprocess, tokenizer_for(tokenizer(found.model_config)), CPU)


def by_one(model, encoder, questions):
    def pixels(record):
        return torch.from_numpy(render(record.picture, encoder.preprocess.geometry(record)))

    return accuracy(model, pixels, lambda t: torch.from_numpy(encoder.tokenize(t)), questions)


def test_scenes_equal_one_question_at_a_time(tiny_run):
    model, encoder = opened(tiny_run)
    checks = scene_checks(Scenes("val", 60))
    result = compositional(model, encoder, checks)
    assert list(rows(result)) == [*KINDS, "mean over categories", "all items"]
    for kind in KINDS:
        asked = [i for i in checks.items if i.category == kind]
        told = [(checks.source.read(i.row), i.positive, i.negative) for i in asked]
        assert rows(result)[kind].statistic.value == pytest.approx(by_one(model, encoder, told))
        assert rows(result)[kind].hits and rows(result)[kind].statistic.queries == len(asked)
    values = [rows(result)[kind].statistic.value for kind in KINDS]
    assert rows(result)["mean over categories"].statistic.value == pytest.approx(np.mean(values))


def test_sugarcrepe_files_over_photographs(tiny_run, real_data, tmp_path):
    model, encoder = opened(tiny_run)
    coco = real_data / "coco"
    document = json.loads((coco / "annotations" / "captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    first = {a["image_id"]: a["caption"] for a in document["annotations"]}
    texts, ids = list(first.values()), list(first)
    for stem, step in (("swap_obj", 1), ("replace_rel", 2)):
        entries = {
            str(2 * k): {
                "filename": names[ids[k]],
                "caption": texts[k],
                "negative_caption": texts[k + step],
            }
            for k in range(12)
        }
        (tmp_path / f"{stem}.json").write_text(json.dumps(entries))
    checks = read_checks([tmp_path], coco / "val2017")
    result = compositional(model, encoder, checks)
    assert [m.statistic.queries for m in result.measures] == [12, 12, 24, 24]
    told = [(checks.source.read(i.row), i.positive, i.negative) for i in checks.items]
    assert rows(result)["all items"].statistic.value == pytest.approx(by_one(model, encoder, told))
    assert not result.data["missing"] and result.data["pictures"] == 12


def asked(pairs):
    items = [Item(k, a, b, "x", str(k)) for k, (a, b) in enumerate(pairs)]
    return Checks("toy", Scenes("val", len(items)), tuple(items))


def test_texts_that_give_themselves_away_are_found():
    nouns = ["cup", "sun", "star", "flag", "horse", "heart", "skull", "anchor"]
    leak = [(f"a {a} near a {b}", f"a {a} flying a {b}") for a in nouns for b in nouns]
    assert text_only(asked(leak)) == {"x": {"value": 1.0, "n": 64}}
    longer = [(f"a {a}", f"a {a} and a {b}") for a in nouns for b in nouns]
    assert text_only(asked(longer))["x"]["value"] == 1
    order = [("a cup", "the sun"), ("the sun", "a cup")] * 200
    assert text_only(asked(order))["x"]["value"] == pytest.approx(0.5, abs=0.1)
    # Nothing is learned from words that do not come back, nor about one picture from itself.
    fresh = asked([(f"word{k}", f"word{k + 99}") for k in range(50)])
    assert text_only(fresh) == {"x": {"value": 0.5, "n": 50}}
    one = tuple(Item(0, "a cup", "a sun", "x", str(k)) for k in range(50))
    assert text_only(dataclasses.replace(fresh, items=one)) == {"x": {"value": 0.5, "n": 50}}
    assert text_only(asked(leak[:49])) == {}
