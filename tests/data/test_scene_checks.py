import re
from collections import Counter

import pytest

from superclip.data.scene_checks import KINDS, scene_checks
from superclip.data.scenes import CATEGORIES, COLOURS, RELATIONS, Scenes, caption_vocabulary
from superclip.evaluation.compositional import text_only

N = 3000
ONE = rf"(an?) ({'|'.join(COLOURS)}) ({'|'.join(CATEGORIES)})"
GRAMMAR = re.compile(rf"{ONE}(?: ({'|'.join(RELATIONS)}) {ONE})?")


@pytest.fixture(scope="module")
def checks():
    return scene_checks(Scenes("val", N))


@pytest.fixture(scope="module")
def scenes(checks):
    return [checks.source.scene(row) for row in range(N)]


def is_true(text, scene):
    """Looks the text's objects up in the graph, and compares their boxes, not their cells."""
    match = GRAMMAR.fullmatch(text)
    assert match, text
    _, colour, category, relation, _, colour2, category2 = match.groups()
    boxes = {(o.colour, o.category): o.xywh for o in scene.objects}
    if (colour, category) not in boxes:
        return False
    if relation is None:
        return True
    if (colour2, category2) not in boxes or (colour, category) == (colour2, category2):
        return False
    (x, y, w, h), (x2, y2, w2, h2) = boxes[colour, category], boxes[colour2, category2]
    return {
        "left of": x + w <= x2,
        "right of": x2 + w2 <= x,
        "above": y + h <= y2,
        "below": y2 + h2 <= y,
    }[relation]


def test_positives_are_true_and_negatives_false(scenes, checks):
    for item in checks.items:
        scene = scenes[item.row]
        assert is_true(item.positive, scene), item
        assert not is_true(item.negative, scene), item


def test_both_texts_are_of_one_make(checks):
    for item in checks.items:
        words, lies = item.positive.split(), item.negative.split()
        assert len(words) == len(lies) and {*words, *lies} <= caption_vocabulary()
        for text in (item.positive, item.negative):
            articles = re.findall(r"\b(an?) (\w)", text)
            assert all((a == "an") == (letter in "aeiou") for a, letter in articles)


def contents(text):
    """Colours and categories by place, and the relation."""
    _, colour, category, relation, _, colour2, category2 = GRAMMAR.fullmatch(text).groups()
    return (colour, colour2), (category, category2), relation


def test_every_kind_tells_its_own_lie(scenes, checks):
    for item in checks.items:
        (colours, things, relation), (lies, shown, told) = map(
            contents, (item.positive, item.negative)
        )
        there = {o.category for o in scenes[item.row].objects}
        painted = {o.colour for o in scenes[item.row].objects}
        same = colours == lies, things == shown, relation == told
        swapped = colours[::-1] == lies, things[::-1] == shown
        if item.category == "colour swap":
            assert swapped[0] and same[1:] == (True, True)
        elif item.category == "attribute binding":
            assert swapped[1] and same[0] and same[2]
        elif item.category == "object swap":
            assert swapped == (True, True) and same[2]
        elif item.category == "relation swap":
            assert same == (True, True, False)
            assert {relation, told} in ({"left of", "right of"}, {"above", "below"})
        elif item.category == "borrowed colour":
            assert relation is told is None and same[1] and lies[0] in painted
        elif item.category == "absent object":
            (new,) = set(shown) - set(things)
            assert same[0] and same[2] and new not in there and len(there & {*shown}) < len(there)
        else:
            (new,) = set(lies) - set(colours)
            assert item.category == "absent colour" and same[1] and same[2] and new not in painted


def test_which_scenes_ask_what(scenes, checks):
    pairs = [s for s in scenes if len(s.objects) == 2]
    motley = [s for s in pairs if s.objects[0].colour != s.objects[1].colour]
    asked = Counter(item.category for item in checks.items)
    assert list(asked) == list(KINDS)
    assert asked["object swap"] == asked["relation swap"] == len(pairs)
    assert asked["absent object"] == N
    for kind in ("colour swap", "attribute binding", "borrowed colour"):
        assert asked[kind] == len(motley)
    assert asked["absent colour"] == N - len(pairs) + len(motley)


def test_questions_are_counted_not_carried(checks):
    few = scene_checks(Scenes("val", 50))
    known = {item.id: item for item in checks.items}
    assert all(known[item.id] == item for item in few.items)
    assert len(known) == len(checks.items) and few.sha256 == scene_checks(few.source).sha256
    assert scene_checks(Scenes("test", 50)).sha256 != few.sha256
    # A change here is a change of the questions: raise CHECKS_VERSION with it.
    assert [(i.positive, i.negative) for i in few.items if i.row == 1][4:] == [
        ("an orange telephone", "a black telephone"),
        ("a black heart below an orange telephone", "a black sun below an orange telephone"),
        ("a black heart below an orange telephone", "a black heart below a blue telephone"),
    ]


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_text_gives_itself_away(checks, split):
    asked = checks if split == "val" else scene_checks(Scenes(split, N, seed=1))
    for kind, blind in text_only(asked).items():
        assert abs(blind["value"] - 0.5) < 4 * (0.25 / blind["n"]) ** 0.5, (kind, blind)
        assert blind["value"] < 0.55
