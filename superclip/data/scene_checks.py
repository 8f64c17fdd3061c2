"""Compositional checks of generated scenes, from the scene graph: true and false by construction.

The positive is the plainest full caption, "a red sun left of a blue cup". A negative tells a lie of
one kind (`KINDS`):

| kind | negative | what gives it away |
|---|---|---|
| colour swap | a blue sun left of a red cup | binding, or where the colours are |
| attribute binding | a red cup left of a blue sun | binding, or where the categories are |
| object swap | a blue cup left of a red sun | where the objects are; every object is right |
| relation swap | a red sun right of a blue cup | where the objects are; every object is right |
| borrowed colour | a blue sun (positive: a red sun) | binding alone: nothing is said of places |
| absent object | a red sun left of a blue horse | one category that is not there |
| absent colour | a red sun left of a green cup | one colour that is not there |

The last two need no composition: they are controls that a bag of words can pass. The clutter is
neither an object nor looked at: its colours are anything.

No text gives itself away. Either text of a pair could have been the true one, and then the other
the false one, with equal probability: places, categories and colours are drawn alike for both
objects, and where that needs colours to differ, other scenes ask no such question. Both texts have
the same number of words. So a model that does not see the picture is at chance, 1/2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import chain

from numpy.random import Generator, Philox

from superclip.data.checks import Checks, Item
from superclip.data.scenes import CATEGORIES, GENERATOR_VERSION, VISIBLE, Scene, SceneObject, Scenes

CHECKS_VERSION = 1  # raise it with any change to the questions: their sha256 follows anyway

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Draw = Callable[[int], int]
"""n -> a random integer below n."""

Pair = tuple[Scene, Scene]
"""The truth, and a lie about the same picture; their captions are the two texts."""


def scene_checks(source: Scenes) -> Checks:
    """Every question that the scenes of a source allow, kind by kind; each is a pure function of
    seed, split, kind and row."""
    items: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    for row, key in enumerate(source.keys):
        scene = source.scene(row)
        full = tuple(range(len(scene.objects)))
        plain = replace(scene, prefix="", mentions_background=False, named=full)
        for kind, ask in KINDS.items():
            if pair := ask(plain, _draw(source, kind, row)):
                positive, negative = (told.caption for told in pair)
                items[kind].append(Item(row, positive, negative, kind, f"{key}/{kind}"))
    return Checks(f"scenes:{source.split}", source, tuple(chain(*items.values())))


def _draw(source: Scenes, kind: str, row: int) -> Draw:
    """Counted by kind and row, so that no question depends on another."""
    identity = f"checks {CHECKS_VERSION} {GENERATOR_VERSION} {source.split} {source.seed} {kind}"
    key = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], "little")
    rng = Generator(Philox(key=key, counter=row << 64))
    return lambda n: int(rng.random() * n)


def _colour_swap(scene: Scene, draw: Draw) -> Pair | None:
    if not _two_colours(scene):
        return None
    a, b = scene.objects
    return scene, _telling(scene, replace(a, colour=b.colour), replace(b, colour=a.colour))


def _attribute_binding(scene: Scene, draw: Draw) -> Pair | None:
    if not _two_colours(scene):
        return None
    a, b = scene.objects
    return scene, _telling(scene, replace(a, category=b.category), replace(b, category=a.category))


def _object_swap(scene: Scene, draw: Draw) -> Pair | None:
    return (scene, _telling(scene, *scene.objects[::-1])) if scene.relation else None


def _relation_swap(scene: Scene, draw: Draw) -> Pair | None:
    return (scene, replace(scene, relation=OPPOSITE[scene.relation])) if scene.relation else None


def _borrowed_colour(scene: Scene, draw: Draw) -> Pair | None:
    if not _two_colours(scene):
        return None
    k = draw(2)
    mine, other = scene.objects[k], scene.objects[1 - k]
    return _alone(scene, mine), _alone(scene, replace(mine, colour=other.colour))


def _absent_object(scene: Scene, draw: Draw) -> Pair | None:
    there = [thing.category for thing in scene.objects]
    others = [category for category in CATEGORIES if category not in there]
    changed, k = list(scene.objects), draw(len(there))
    changed[k] = replace(changed[k], category=others[draw(len(others))])
    return scene, _telling(scene, *changed)


def _absent_colour(scene: Scene, draw: Draw) -> Pair | None:
    there = [thing.colour for thing in scene.objects]
    if len(set(there)) < len(there):  # else a colour that a text names twice would tell it true
        return None
    # Colours that stand out from this ground, as the true ones do.
    others = [colour for colour in VISIBLE[scene.background] if colour not in there]
    changed, k = list(scene.objects), draw(len(there))
    changed[k] = replace(changed[k], colour=others[draw(len(others))])
    return scene, _telling(scene, *changed)


def _two_colours(scene: Scene) -> bool:
    return len({thing.colour for thing in scene.objects}) == 2


def _telling(scene: Scene, *objects: SceneObject) -> Scene:
    return replace(scene, objects=objects)


def _alone(scene: Scene, thing: SceneObject) -> Scene:
    return replace(scene, objects=(thing,), relation=None, named=(0,))


KINDS: dict[str, Callable[[Scene, Draw], Pair | None]] = {
    "colour swap": _colour_swap,
    "attribute binding": _attribute_binding,
    "object swap": _object_swap,
    "relation swap": _relation_swap,
    "borrowed colour": _borrowed_colour,
    "absent object": _absent_object,
    "absent colour": _absent_colour,
}
"""What each kind asks of a plain scene; None where the scene does not allow it."""
