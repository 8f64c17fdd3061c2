"""Zero-shot classification: names, prompts and numbers, against open_clip and naive versions."""

import json
from statistics import mean

import numpy as np
import open_clip
import pytest
import torch
from reference import classification as naive
from reference import evaluation
from reference.labelled import COLOURS, write_folders, write_layout
from reference.towers import tiny_encoder, tiny_model
from torch import nn

from superclip.data.labelled import LabelledSource, open_labelled
from superclip.data.loader import Preprocess
from superclip.data.scenes import Scenes
from superclip.errors import UserError
from superclip.evaluation.classification import judge, random_average_precision
from superclip.evaluation.encode import Encoder
from superclip.evaluation.zeroshot import class_names, classifier, templates, zeroshot
from superclip.model.superclip import SuperCLIP

IDS = ["n01440764", "n01443537", "n02979186"]
"""tench, goldfish, cassette player."""


def data(*classes: str, **facts) -> LabelledSource:
    labels = np.arange(len(classes))
    return LabelledSource("toy", Scenes("val", len(classes)), labels, list(classes), **facts)


def values(measures) -> dict[str, float]:
    return {m.name: m.statistic.value for m in measures}


# Names


def test_names_of_wordnet_ids_and_of_folders():
    assert class_names(data(*IDS)) == ["tench", "goldfish", "cassette player"]
    assert class_names(data("hot_dog", "cat")) == ["hot dog", "cat"]
    assert class_names(data("0", "1", names=["zero", "one"])) == ["zero", "one"]
    with pytest.raises(UserError, match="n09999999 is a WordNet id, but none of ImageNet-1k's"):
        class_names(data("n01440764", "n09999999"))
    with pytest.raises(UserError, match=r"are numbers \(0, \.\.\.\).*--classnames FILE"):
        class_names(data("0", "1"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({IDS[2]: "player", IDS[0]: "fish", IDS[1]: "gold", "n00000001": "more"}),
        "fish\ngold\nplayer\n",
        "\ufefffish\r\ngold\r\nplayer",
        f"{IDS[1]} gold, more gold\n{IDS[0]} fish\n{IDS[2]} player\nn00000001 more\n",
        f"{IDS[2]}\tplayer\n{IDS[0]}\tfish\n{IDS[1]}\tgold\n",
    ],
)
def test_names_from_a_file(tmp_path, text):
    (tmp_path / "names").write_text(text)
    assert class_names(data(*IDS), tmp_path / "names") == ["fish", "gold", "player"]


def test_only_ids_are_parted_from_names_by_a_blank(tmp_path):
    (tmp_path / "names").write_text("rose flower\ntulip flower")
    assert class_names(data("rose", "tulip"), tmp_path / "names") == ["rose flower", "tulip flower"]
    (tmp_path / "names").write_text("tulip flower\nrose flower")
    with pytest.raises(UserError, match="begins with 'tulip', but in their order it would name 'r"):
        class_names(data("rose", "tulip"), tmp_path / "names")
    (tmp_path / "names").write_text("tulip\ta tulip\nrose\tsalt, pepper")
    assert class_names(data("rose", "tulip"), tmp_path / "names") == ["salt, pepper", "a tulip"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("fish\ngold", "has 2 lines for 3 classes"),
        ("", "is empty"),
        ('{"n01440764": "fish"', "is no JSON"),
        ('["fish", "gold", "player"]', "must be an object"),
        ('{"n01440764": 3}', "must be an object"),
        ('{"n01440764": "fish", "n1443537": "gold"}', "does not name 2 of 3 classes .*n01443537"),
        (f"{IDS[0]} a\n{IDS[1]} b\nn02979187 c", "does not name 1 of 3.*did you mean 'n02979187'"),
        ("n00000001 a\nn00000002 b\nn00000003 c", "does not name 3 of 3 classes"),
        (f"{IDS[0]} fish\ngold\nplayer", "'gold' is not CLASS<TAB>NAME as other lines"),
        ("fish\n\nplayer", "the name of 'n01443537' is empty"),
        (b"\xff\xfe\x00\xff", "is no text file"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_names_is_refused_in_a_line(tmp_path, text, said):
    file = tmp_path / "names"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as refused:
        class_names(data(*IDS), file)
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


# Prompts


def test_templates():
    openai, simple = (templates(name, data("a", "b")) for name in ("openai", "simple"))
    assert (len(openai), len(simple)) == (80, 7) and openai[0] == "a bad photo of a {}."
    assert templates(None, data("a", "b")) == openai
    assert templates(None, data("a", "b", templates=["a {c}.", "{}"])) == ["a {}.", "{}"]


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a {}.\n\nthe {c}, 100% a {c}\n")
    assert templates(str(path), data("a", "b")) == ["a {}.", "the {}, 100% a {}"]
    for text, said in (
        ("a photo", "'a photo' has no slot"),
        ("{c}\na {d}", "no slot"),
        ("", "empt"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            templates(str(path), data("a", "b"))
    with pytest.raises(UserError, match="did you mean 'openai'"):
        templates("open_ai", data("a", "b"))
    with pytest.raises(UserError, match=r"toy's own templates: 'a photo\.' has no slot"):
        templates(None, data("a", "b", templates=["a photo."]))


def test_the_classifier_is_open_clips():
    model, encoder = tiny_model(), tiny_encoder()
    names, prompts = ["tench", "hot dog", "tench"], templates("simple", data("a", "b"))
    found = classifier(model, encoder, names, prompts)

    def tokenize(texts):
        return torch.from_numpy(np.stack([encoder.tokenize(text) for text in texts]))

    expected = open_clip.build_zero_shot_classifier(
        model.clip, tokenize, names, open_clip.SIMPLE_IMAGENET_TEMPLATES, None
    ).T
    assert (found - expected).abs().max() < 1e-6
    assert torch.equal(found[0], found[2])


# Numbers


def test_accuracy_equals_the_naive_one_with_ties_and_an_empty_class():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (60, 8)).astype(np.float32)
    labels = rng.choice([0, 1, 3, 4, 5, 6, 7], 60)
    keys = list("abcdefgh")
    measures, notes = judge(scores, labels, keys, keys)
    hits = [[naive.in_top(s, label, k) for s, label in zip(scores, labels)] for k in (1, 5)]
    assert values(measures) == {
        "top-1": pytest.approx(mean(hits[0])),
        "top-5": pytest.approx(mean(hits[1])),
        "mean per class": pytest.approx(naive.recall(hits[0], labels)),
    }
    assert [m.chance for m in measures] == [1 / 8, 5 / 8, 1 / 8]
    assert notes["empty_classes"] == ["c"]


def test_without_ties_the_numbers_are_those_of_argmax_and_topk():
    """CLIP_benchmark's definitions: top-k of the logits, and the mean over classes of recall."""
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(90, 7)), np.arange(90) % 7
    scores[np.arange(90), labels] += 1
    order = np.argsort(-scores, axis=1)
    found = values(judge(scores, labels, "abcdefg", "abcdefg")[0])
    assert found["top-1"] == np.mean(order[:, 0] == labels)
    assert found["top-5"] == np.mean((order[:, :5] == labels[:, None]).any(1))
    recalls = [np.mean(order[labels == c, 0] == c) for c in range(7)]
    assert found["mean per class"] == pytest.approx(np.mean(recalls))


def test_a_toy_by_hand():
    """Two cats (one right, one taken for a dog by a tie), one dog taken for a cat, one newt."""
    scores = np.array([[3.0, 1, 0], [2, 2, 1], [5, 4, 0], [0, 0, 1]])
    labels = np.array([0, 0, 1, 2])
    measures, notes = judge(scores, labels, ["k0", "k1", "k2"], ["cat", "dog", "newt"])
    assert values(measures) == {"top-1": 0.5, "mean per class": 0.5}  # (1/2 + 0 + 1) / 3
    assert notes["confusions"] == [
        {"true": "dog", "predicted": "cat", "count": 1, "share": 1.0},
        {"true": "cat", "predicted": "dog", "count": 1, "share": 0.5},
    ]
    assert notes["per_class"] == [
        {"class": "k0", "name": "cat", "pictures": 2, "top-1": 0.5},
        {"class": "k1", "name": "dog", "pictures": 1, "top-1": 0.0},
        {"class": "k2", "name": "newt", "pictures": 1, "top-1": 1.0},
    ]
    constant, _ = judge(scores, labels, "abc", "abc", "constant")
    assert [m.chance for m in constant] == [0.5, 1 / 3]


def test_top_five_needs_more_than_five_classes():
    scores, labels = np.eye(5), np.arange(5)
    names = [m.name for m in judge(scores, labels, "abcde", "abcde")[0]]
    assert names == ["top-1", "mean per class"]


def test_average_precision_equals_the_naive_one():
    rng = np.random.default_rng(2)
    scores, right = rng.integers(0, 9, (30, 4)).astype(float), rng.random((30, 4)) < 0.3
    right[:, 1] = False
    (measure,), notes = judge(scores, right, "abcd", "abcd")
    expected = [evaluation.average_precision(scores[:, c], right[:, c]) for c in (0, 2, 3)]
    assert [row["AP"] for row in notes["per_class"]] == pytest.approx(expected)
    assert measure.statistic.value == pytest.approx(mean(expected))
    assert notes["empty_classes"] == ["b"]
    assert notes["mean_prevalence"] == pytest.approx(right[:, [0, 2, 3]].mean())


@pytest.mark.parametrize("right, of", [(1, 1), (1, 6), (2, 6), (3, 7), (5, 5), (2, 9)])
def test_average_precision_of_a_random_order_equals_enumeration(right, of):
    found = random_average_precision(right, of)
    assert found == pytest.approx(naive.random_average_precision(right, of))


def test_the_chance_level_of_map_is_what_random_scores_get():
    rng = np.random.default_rng(3)
    right = rng.random((40, 5)) < [0.05, 0.1, 0.2, 0.4, 0.9]
    right[0] = True
    drawn = []
    for _ in range(400):
        (measure,), _ = judge(rng.random((40, 5)), right, "abcde", "abcde")
        drawn.append(measure.statistic.value)
    assert measure.chance == pytest.approx(mean(drawn), abs=4 * np.std(drawn) / 20)
    assert measure.chance > right.mean() + 0.03, "above the prevalence"


# Whole


class Colours(nn.Module):
    """A whole CLIP that anyone can work by hand: the feature is the mean colour."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Module()
        self.visual.output_dim = 3

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, tokens):
        return tokens.float()


def words(text: str) -> np.ndarray:
    return np.sum([COLOURS.get(word, (1, 1, 1)) for word in text.split()], axis=0)


@pytest.fixture
def toy():
    model = SuperCLIP(Colours(), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    preprocess = Preprocess(4, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return model.eval(), Encoder(preprocess, words, torch.device("cpu"))


def test_pictures_meet_their_class(toy, tmp_path):
    source = open_labelled(str(write_folders(tmp_path / "x", red=3, green=2, blue=1, white=0)))
    result = zeroshot(*toy, source, source.classes, ["a {}", "{} thing"])
    assert values(result.measures) == {"top-1": 1, "mean per class": 1}
    assert result.notes["empty_classes"] == ["white"] and result.notes["confusions"] == []
    assert result.data["pictures"] == 6 and result.data["templates"] == 2
    json.dumps([result.data, result.notes])
    swapped = zeroshot(*toy, source, ["red", "green", "blue", "white"], ["a {}"])
    assert values(swapped.measures)["top-1"] == pytest.approx(2 / 6), "green alone is called green"
    assert swapped.data["prompts_sha256"] != result.data["prompts_sha256"]


def test_two_classes_of_one_name_are_never_first_and_said(toy, tmp_path):
    source = open_labelled(str(write_folders(tmp_path / "x", red=3, green=2, crimson=2)))
    result = zeroshot(*toy, source, ["red", "green", "red"], ["{}"])
    assert result.notes["same_name"] == {"red": ["crimson", "red"]}
    hits = {row["class"]: row["top-1"] for row in result.notes["per_class"]}
    assert hits == {"crimson": 0, "green": 1, "red": 0}


def test_an_unreadable_picture_is_left_out_and_listed(toy, tmp_path):
    root = write_folders(tmp_path / "x", red=3, green=2)
    (root / "red/1.png").write_bytes(b"no picture")
    source = open_labelled(str(root))
    result = zeroshot(*toy, source, source.classes, ["{}"])
    assert list(result.data["missing"]) == ["red/1.png"] and result.data["pictures"] == 4
    assert values(result.measures)["top-1"] == 1


def test_a_layout_with_its_own_names_and_templates(tmp_path):
    source = open_labelled(str(write_layout(tmp_path / "pets")))
    names, prompts = class_names(source), templates(None, source)
    assert prompts == ["a photo of a {}.", "a bad {}."]
    result = zeroshot(tiny_model(), tiny_encoder(), source, names, prompts)
    assert result.data["pictures"] == 3 and result.data["name"] == "pets/test"


def test_scenes_by_hand():
    """The accuracy on one-object scenes: prompts averaged over colours, one picture at a time."""
    source, model, encoder = open_labelled("scenes:val", num=60), tiny_model(), tiny_encoder()
    names, prompts = class_names(source), templates(None, source)
    result = zeroshot(model, encoder, source, names, prompts)
    seen = encoder.pictures(model, source.source, source.rows).features.tolist()
    said = [[p.replace("{}", name) for p in prompts] for name in names]
    vectors = [naive.class_vector(encoder.texts(model, texts).tolist()) for texts in said]
    hits = [
        naive.in_top([np.dot(f, v) for v in vectors], source.labels[row], 1)
        for f, row in zip(seen, source.rows)
    ]
    assert values(result.measures)["top-1"] == pytest.approx(mean(hits))
    assert result.measures[0].chance == 1 / 12 and len(hits) < 60
