"""What is packed comes back, rows keep their order, and damage is named."""

import io
import json
import logging
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from superclip.data import shards as module
from superclip.data.batch import Boxes, Record
from superclip.data.coco import CocoFolder
from superclip.data.geometry import BadPicture
from superclip.data.shard_writer import write_manifest, write_shards
from superclip.data.shards import Shards, expand, held_out_pattern
from superclip.errors import UserError

REAL = Path(os.environ.get("SUPERCLIP_REAL_DATA", Path(__file__).parents[3] / "shared/data"))


def jpeg(width: int, height: int, grey: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (grey, grey, grey)).save(buffer, "JPEG")
    return buffer.getvalue()


def record(row: int) -> Record:
    """A made-up picture with 1 to 3 captions and 0 to 2 boxes."""
    n = row % 3
    xywh = np.array([[0.1, 2.3, 4.7, 5.9], [1, 1, 2, 1 / 3]], np.float32)[:n]
    boxes = Boxes(xywh, ("cat", "dog")[:n], np.array([False, True])[:n])
    first = sum(k % 3 + 1 for k in range(row))
    captions = tuple(f"picture {row}, line {k} \u00e9" for k in range(n + 1))
    rows = tuple(range(first, first + n + 1))
    picture = jpeg(20 + row, 30, 10 * row)
    return Record(row, f"id{row:03d}", 20 + row, 30, picture, captions, rows, boxes, boxes)


def write(out: Path, count: int = 7, per_shard: int = 3, split: str = "train") -> list[dict]:
    samples = ((record(row), [100 + r for r in record(row).caption_rows]) for row in range(count))
    return write_shards(samples, out, split, per_shard)


def assert_same(a: Record, b: Record) -> None:
    for left, right in ((a.boxes, b.boxes), (a.clutter, b.clutter)):
        assert left.xywh.dtype == right.xywh.dtype == np.float32
        np.testing.assert_array_equal(left.xywh, right.xywh)
        np.testing.assert_array_equal(left.crowd, right.crowd)
        assert left.categories == right.categories
    bare = {"boxes": Boxes.none(), "clutter": Boxes.none()}
    a, b = replace(a, **bare), replace(b, **bare)
    assert [vars(a)[k] for k in ("row", "key", "width", "height", "picture")] == [
        vars(b)[k] for k in ("row", "key", "width", "height", "picture")
    ]
    assert (a.captions, a.caption_rows) == (b.captions, b.caption_rows)


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_round_trip(tmp_path):
    entries = write(tmp_path)
    source = Shards(f"{tmp_path}/train-{{000000..000002}}.tar")
    assert source.name == "train-{000000..000002}.tar"
    assert (source.num_images, source.num_captions) == (7, 13) and source.attrition == {}
    assert source.shard_sizes == (3, 3, 1) and source.keys == [f"id{row:03d}" for row in range(7)]
    for row in (6, 0, 3, 2, 5, 1, 4):
        assert_same(source.read(row), record(row))
    assert [entry["pictures"] for entry in entries] == [3, 3, 1]
    assert entries[1]["images"][0] == {"key": "id003", "caption_ids": [106]}
    with pytest.raises(IndexError):
        source.read(7)


@pytest.mark.parametrize("folder, split", [("coco", "val"), ("coco", "train"), ("flickr8k", "dev")])
def test_round_trip_of_real_photographs(tmp_path, folder, split):
    root = REAL / folder
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}")
    ours = CocoFolder(root, split)
    rows = map(ours.read, range(ours.num_images))
    write_shards(
        ((r, [ours.caption_ids[c] for c in r.caption_rows]) for r in rows), tmp_path, split, 100
    )
    packed = Shards(f"{tmp_path}/{split}-*.tar")
    assert packed.keys == ours.keys and packed.num_captions == ours.num_captions
    for row in range(ours.num_images):
        assert_same(packed.read(row), ours.read(row))


def test_packing_twice_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_manifest(write(tmp_path / name), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 7
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    digests = {Shards(f"{tmp_path}/{name}/train-*.tar").digest for name in ("a", "b")}
    assert len(digests) == 1
    assert Shards(f"{tmp_path}/a/train-00000[01].tar").digest not in digests


def test_pixels_are_packed_losslessly(tmp_path):
    pixels = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)
    write_shards([(replace(record(0), picture=pixels), [0])], tmp_path, "train")
    back = Shards(str(tmp_path / "train-000000.tar")).read(0).picture
    assert isinstance(back, bytes)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(back))), pixels)


def test_a_reader_can_be_sent_to_another_process_and_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    write(tmp_path, per_shard=1)
    source = Shards(f"{tmp_path}/train-*.tar")
    for row in (0, 3, 6, 0, 5, 1):
        assert_same(source.read(row), record(row))
        assert len(source._open) <= 2
    assert_same(pickle.loads(pickle.dumps(source)).read(4), record(4))


def test_reads_what_img2dataset_writes(tmp_path):
    stats = {"caption": "one", "url": "http://a", "width": 1, "height": 2, "status": "success"}
    tar_of(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": jpeg(20, 10),
            "000000000.json": json.dumps(stats).encode(),
            "000000000.txt": b"one",
            "000000001.jpg": jpeg(11, 12),
            "000000001.txt": b"two",
            "000000002.JPEG": jpeg(13, 14),
            "000000002.json": b'{"caption": "three"}',
            "000000003.jpg": jpeg(15, 16),
            "000000003.txt": b" ",
            "folder/000000004.png": jpeg(17, 18),
            "folder/000000004.cls": b"3",
            "folder/000000004.txt": b"five",
        },
    )
    source = Shards(str(tmp_path / "00000.tar"))
    assert source.keys == ["000000000", "000000001", "000000002", "folder/000000004"]
    assert source.attrition == {"samples without caption": 1}
    got = [source.read(row) for row in range(4)]
    assert [r.captions for r in got] == [("one",), ("two",), ("three",), ("five",)]
    assert [(r.width, r.height) for r in got] == [(20, 10), (11, 12), (13, 14), (17, 18)]
    assert [r.caption_rows for r in got] == [(0,), (1,), (2,), (3,)]


def test_a_broken_picture_of_unknown_size_is_named(tmp_path):
    tar_of(tmp_path / "a.tar", {"k.jpg": b"junk", "k.txt": b"text"})
    with pytest.raises(BadPicture, match=r"a\.tar: k: unreadable header"):
        Shards(str(tmp_path / "a.tar")).read(0)


def test_index_is_built_once_and_again_when_stale_or_damaged(tmp_path, caplog):
    write(tmp_path)
    shard, index = tmp_path / "train-000000.tar", tmp_path / "train-000000.idx"
    packed = index.read_bytes()
    index.unlink()
    first = Shards(str(shard))
    assert index.read_bytes() == packed and not caplog.records
    index.write_bytes(packed[:100])
    assert Shards(str(shard)).digest == first.digest and "is damaged" in caplog.text
    (tmp_path / "train-000001.tar").replace(shard)
    assert Shards(str(shard)).keys == ["id003", "id004", "id005"]
    assert "belongs to other bytes" in caplog.text
    caplog.clear()
    Shards(str(shard))
    assert not caplog.records


def test_index_stays_in_memory_where_the_folder_cannot_be_written(tmp_path, caplog, monkeypatch):
    write(tmp_path)
    (tmp_path / "train-000000.idx").unlink()

    def refuse(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.ShardIndex, "save", refuse)
    with caplog.at_level(logging.WARNING):
        assert Shards(str(tmp_path / "train-000000.tar")).num_images == 3
    assert "cannot be written (Permission denied): kept in memory" in caplog.text


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.77, 0.9])
def test_a_cut_tar_is_noticed(tmp_path, keep):
    write(tmp_path, 6, 6)
    shard = tmp_path / "train-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole.rstrip(b"\0")) * keep)])
    with pytest.raises(UserError, match=r"train-000000\.tar .*cut"):
        Shards(str(shard))


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    write(tmp_path, 6, 6)
    shard = tmp_path / "train-000000.tar"
    with tarfile.open(shard) as tar:
        border = tar.getmembers()[4].offset
    with shard.open("r+b") as file:
        file.truncate(border)
    with pytest.raises(UserError, match="is cut or broken after"):
        Shards(str(shard))


@pytest.mark.parametrize(
    "members, message",
    [
        ({}, "holds no sample"),
        ({"a.jpg": jpeg(9, 9)}, "holds no sample with a caption"),
        ({"a.txt": b"text"}, "sample 'a' has no picture, only txt"),
        ({"a.jpg": jpeg(9, 9), "a.json": b"{"}, "a: broken facts"),
        ({"a.jpg": jpeg(9, 9), "a.json": b"[]"}, "a: broken facts"),
        ({"a.jpg": jpeg(9, 9), "a.json": b'{"captions": [], "schema": 2}'}, "schema 2.*reads 1"),
        ({"a.jpg": jpeg(9, 9), "a.json": b'{"captions": [""], "schema": 1}'}, "'width'"),
        ({"a.jpg": jpeg(9, 9), "a.txt": b"\xff"}, "a: broken facts"),
        ({"a.jpg": b"", "a.JPG": b"", "a.txt": b"x"}, "'a.JPG' occurs twice"),
    ],
)
def test_a_broken_sample_is_named(tmp_path, members, message):
    shard = tar_of(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=rf"x\.tar.*{message}"):
        Shards(str(shard))


@pytest.mark.parametrize("data", [b"", b"junk" * 600, b"\x1f\x8b\x08" + bytes(2000)])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar"):
        Shards(str(tmp_path / "x.tar"))


def test_a_picture_in_two_shards_is_refused(tmp_path):
    write(tmp_path)
    one = tmp_path / "train-000000.tar"
    with pytest.raises(UserError, match="picture 'id000' occurs twice"):
        Shards(f"{one},{one}")


def test_patterns(tmp_path):
    write(tmp_path)
    names = [f"train-00000{k}.tar" for k in range(3)]
    for pattern in ("train-{000000..000002}.tar", "train-*.tar", ",".join(names)):
        whole = ",".join(f"{tmp_path}/{part}" for part in pattern.split(","))
        assert [path.name for path in expand(whole)] == names
    assert [p.name for p in expand(f"{tmp_path}/train-{{000002,000000}}.tar")] == names[2::-2]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("train-{000000..000004}.tar", r"2 of 5 shards .*first: .*train-000003\.tar"),
        ("val-*.tar", "matches no file"),
        ("train-{000000..00", "unbalanced braces"),
        ("", "missing"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, pattern, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        Shards(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("stream", ["pipe:cat a.tar", "http://a/b.tar", "s3://a/b.tar"])
def test_streams_are_refused_with_the_way_out(stream):
    with pytest.raises(UserError, match="download them first"):
        Shards(stream)


def test_held_out_shards_come_from_the_manifest(tmp_path):
    train = f"{tmp_path}/train-*.tar"
    entries = write(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json is missing.*--val-data"):
        held_out_pattern(train)
    write_manifest(entries, tmp_path)
    with pytest.raises(UserError, match="no held-out split"):
        held_out_pattern(train)
    renamed = [{**entry, "images": []} for entry in write(tmp_path, split="val")]
    write_manifest([*entries, *renamed], tmp_path)
    assert Shards(held_out_pattern(train)).num_images == 7
    (tmp_path / "manifest.json").write_text('{"schema": 9, "shards": []}')
    with pytest.raises(UserError, match="has schema 9, this version reads 1"):
        held_out_pattern(train)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 21}, "is 20x30 pixels, its annotations say 21x30"),
        ({"key": "a.b"}, "has a dot"),
        ({"picture": b"GIF89a"}, "neither JPEG, PNG nor WebP"),
        ({"picture": b"\xff\xd8junk"}, "unreadable header"),
    ],
)
def test_what_cannot_be_packed(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_shards([(replace(record(0), **change), [1])], tmp_path, "train")


def test_a_manifest_names_every_picture_once(tmp_path):
    entries = write(tmp_path)
    with pytest.raises(UserError, match="picture 'id000' occurs twice"):
        write_manifest([*entries, entries[0]], tmp_path)
