"""`python -m superclip.pack`: a COCO folder into shards, or generated scenes into a COCO folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from superclip.errors import UserError, nearest, run_command
from superclip.flags import parse
from superclip.progress import progress

if TYPE_CHECKING:
    from superclip.data.batch import Record
    from superclip.data.coco import CocoFolder
    from superclip.data.text_reduction import Tagger

HELP = """Pack data for training.

  python -m superclip.pack coco --root data/coco --out data/shards
  python -m superclip.train --train-data 'data/shards/train-{000000..000003}.tar'

  python -m superclip.pack scenes --out data/scenes --num 1000
"""

_OURS = re.compile(r"[\w-]+-\d{6}\.(tar|idx)|manifest\.json")


@dataclass(frozen=True)
class Coco:
    """Captions and boxes of a COCO folder, joined by image id, into WebDataset tar shards.

    Writes SPLIT-000000.tar ... (pictures as they are, facts as JSON), an index beside each, and
    manifest.json with every picture and caption id.
    """

    root: Path
    """Folder with annotations/ and train2017/ val2017/ (or the same names without 2017), or with
    captions.json, instances.json and images/."""
    out: Path
    """New folder for the shards."""
    split: str = "all"
    """train, val, ..., or all: every split that the folder has."""
    split_by_hash: str | None = None
    """SALT:NAME=SHARE,NAME=SHARE: deal the pictures anew, by a salted hash of their id
    (2024:train=0.9,val=0.1)."""
    per_shard: int = 1000
    """Pictures per shard."""
    on_bad: Literal["error", "drop"] = "error"
    """What to do about captions and boxes without picture, missing picture files, and boxes that
    are NaN, negative, empty or outside: stop at the first, or leave them out and count them."""
    tags: bool = False
    """Write every caption's words with their parts of speech beside it, for --text-reduction
    syntax."""
    overwrite: bool = False
    """Replace the shards that --out holds."""

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise UserError(f"--per-shard {self.per_shard} must be at least 1")


@dataclass(frozen=True)
class Scenes:
    """Generated scenes as a COCO folder: images/, captions.json, instances.json, clutter.json."""

    out: Path
    """New folder for the data set."""
    num: int = 1000
    """How many scenes, from the first on."""
    split: str = "val"
    """Which scenes: train, val, ..."""
    seed: int = 0
    """Seed of the generator."""


def main(argv: list[str]) -> None:
    command = _parse(argv)
    if isinstance(command, Coco):
        pack_coco(command)
    else:
        pack_scenes(command)


def _parse(argv: Sequence[str]) -> Coco | Scenes:
    known = sorted({field.name for command in (Coco, Scenes) for field in fields(command)})
    prog, nothing = "python -m superclip.pack", tyro.MISSING_NONPROP
    return parse(Coco | Scenes, argv, prog, HELP, default=nothing, known=known)


def pack_scenes(command: Scenes) -> None:
    """Export generated scenes; see `superclip.data.scenes.write_coco`."""
    from superclip.data.scenes import Scenes as Source
    from superclip.data.scenes import write_coco

    write_coco(Source(command.split, command.num, command.seed), command.out, command.num)
    print(f"{command.out}: {command.num} scenes")


def pack_coco(command: Coco) -> None:
    """Write the shards of a COCO folder: all of them, or nothing.

    Raises:
        UserError: if the folder is not COCO's, or `out` holds something that must not be replaced.
    """
    from superclip.data.coco import CocoFolder, find_splits
    from superclip.data.shard_writer import write_manifest, write_shards
    from superclip.data.text_reduction import find_tagger

    shares, out = _shares(command.split_by_hash), command.out.resolve()
    _refuse_occupied(out, command.overwrite)
    held = find_splits(command.root)
    if command.split not in (*held, "all"):
        hint = nearest(command.split, {*held, "all"})
        raise UserError(f"--split {command.split!r} is not in {command.root}; {hint}")
    chosen = [command.split] if command.split in held else held
    sources = {name: CocoFolder(command.root, name, on_bad=command.on_bad) for name in chosen}
    for source in sources.values():
        for cause, count in source.attrition.items():
            print(f"{source.name}: {count} {cause}")

    tagged_by, tagger = find_tagger("--tags") if command.tags else (None, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        partial, entries = Path(scratch) / "new", []
        partial.mkdir()
        for split, samples in _parts(sources, shares):
            samples = samples if tagger is None else _tagged(samples, tagger)
            written = write_shards(samples, partial, split, command.per_shard)
            counts = [sum(entry[what] for entry in written) for what in ("pictures", "captions")]
            if not written:
                raise UserError(f"split {split!r} gets no picture; give it a larger share")
            print(f"{split}: {counts[0]} pictures, {counts[1]} captions, {len(written)} shards")
            entries += written
        write_manifest(entries, partial, tagged_by)
        if out.exists():
            out.rename(Path(scratch) / "old")
        partial.rename(out)


def _parts(
    sources: Mapping[str, CocoFolder], shares: tuple[str, dict[str, float]] | None
) -> Iterator[tuple[str, Iterator[tuple[Record, list[int]]]]]:
    """Each split to write with its samples: the folder's own splits, or those dealt by hash."""
    from superclip.data.coco import hash_split

    if shares is None:
        for name, source in sources.items():
            yield name, _samples(name, [source], lambda key: True)
        return
    salt, parts = shares
    for name in parts:
        yield (
            name,
            _samples(
                name,
                sources.values(),
                lambda key, name=name: hash_split(key, salt, parts) == name,
            ),
        )


def _samples(
    name: str, sources: Iterable[CocoFolder], keep: Callable[[str], bool]
) -> Iterator[tuple[Record, list[int]]]:
    """Records with the published ids of their captions."""
    rows = [(source, row) for source in sources for row, key in enumerate(source.keys) if keep(key)]
    for source, row in progress(rows, name, unit="picture"):
        record = source.read(row)
        yield record, [source.caption_ids[caption] for caption in record.caption_rows]


def _tagged(
    samples: Iterator[tuple[Record, list[int]]], tagger: Tagger
) -> Iterator[tuple[Record, list[int]]]:
    """The same with tags."""
    for record, ids in samples:
        yield replace(record, tags=tuple(map(tagger, record.captions))), ids


def _shares(text: str | None) -> tuple[str, dict[str, float]] | None:
    """`SALT:NAME=SHARE,...` as salt and shares."""
    if text is None:
        return None
    match = re.fullmatch(r"([^:]+):((?:\w+=[\d.]+,?)+)", text)
    try:
        pairs = [part.split("=") for part in match[2].strip(",").split(",")] if match else []
        shares = {name: float(share) for name, share in pairs}
    except ValueError:
        shares = {}
    if match is None or not shares or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(
            f"--split-by-hash {text!r} must read SALT:NAME=SHARE,... with shares that sum to 1, "
            "as in 2024:train=0.9,val=0.1"
        )
    return match[1], shares


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    """Only shards may be replaced, and only when asked to."""
    held = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in held if not _OURS.fullmatch(name)]
    if foreign or (out.exists() and not out.is_dir()):
        what = f"holds {foreign[0]!r}" if foreign else "is a file"
        raise UserError(f"--out {out} {what}, which is no shard; name a new folder")
    if held and not overwrite:
        raise UserError(f"--out {out} holds shards already; pass --overwrite or name a new folder")


if __name__ == "__main__":
    run_command(main)
