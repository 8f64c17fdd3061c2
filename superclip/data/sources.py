"""From a data name to a `Source`: one table, used by training, evaluation and sweeps alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from superclip.data.batch import Source
from superclip.errors import UserError, nearest

SCENE_SPLITS = ("train", "val", "test", "tune")
SCENES_TRAIN, SCENES_HELD_OUT = 115_200, 2_000


def _scenes(rest: str, num: int | None, seed: int, held_out: bool) -> Source:
    from superclip.data.scenes import Scenes

    split = rest or ("val" if held_out else "train")
    if split not in SCENE_SPLITS:
        raise UserError(f"scenes has no split {split!r}; {nearest(split, SCENE_SPLITS)}")
    return Scenes(split, num or (SCENES_HELD_OUT if split != "train" else SCENES_TRAIN), seed)


def _coco(rest: str, num: int | None, seed: int, held_out: bool) -> Source:
    from superclip.data.coco import CocoFolder

    root, _, split = rest.partition(":")
    return CocoFolder(Path(root), split or ("val" if held_out else "train"), limit=num)


KINDS: dict[str, Callable[[str, int | None, int, bool], Source]] = {
    "scenes": _scenes,
    "coco": _coco,
}


def open_source(spec: str, num: int | None = None, seed: int = 0, held_out: bool = False) -> Source:
    """Open `scenes[:SPLIT]`, `coco:FOLDER[:SPLIT]` or tar shards.

    Args:
        num: how many pictures of scenes or a COCO folder; shards are read whole.
        seed: of generated scenes.
        held_out: which split a name without one means.

    Raises:
        UserError: if there is no such data, or it is damaged.
    """
    kind, _, rest = spec.partition(":")
    if kind in KINDS:
        return KINDS[kind](rest, num, seed, held_out)
    if Path(spec).is_dir():
        raise UserError(
            f"{spec!r} is a folder; write coco:{spec} for COCO's layout, or a tar pattern for "
            "shards"
        )
    from superclip.data.shards import Shards

    return Shards(spec)


def held_out_spec(train_data: str) -> str:
    """The held-out data that belongs to training data.

    Raises:
        UserError: if none is known.
    """
    kind, _, rest = train_data.partition(":")
    if kind == "scenes":
        return "scenes:val"
    if kind == "coco":
        from superclip.data.coco import held_out_split

        root, _, split = rest.partition(":")
        return f"coco:{root}:{held_out_split(Path(root), split or 'train')}"
    from superclip.data.shards import held_out_pattern

    return held_out_pattern(train_data)
