"""A COCO folder is joined by image id, and every kind of bad entry is named or counted."""

import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from superclip.data.coco import (
    CocoFolder,
    find_splits,
    hash_split,
    held_out_split,
)
from superclip.data.geometry import BadPicture
from superclip.data.sources import held_out_spec
from superclip.errors import UserError

REAL = Path(os.environ.get("SUPERCLIP_REAL_DATA", Path(__file__).parents[3] / "shared/data"))

IMAGES = [
    {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
    {"id": 3, "file_name": "b.png", "width": 20, "height": 50},
]
CAPTIONS = [
    {"id": 1, "image_id": 3, "caption": "a tall thing"},
    {"id": 2, "image_id": 7, "caption": "a wide thing "},
    {"id": 3, "image_id": 3, "caption": "b"},
]
BOXES = [
    {"id": 11, "image_id": 7, "category_id": 5, "bbox": [1.5, 2, 10, 20], "iscrowd": 0},
    {"id": 12, "image_id": 7, "category_id": 6, "bbox": [0, 0, 40, 30], "iscrowd": 1},
]
CATEGORIES = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, split: str = "val", captions=(), boxes=(), images=IMAGES) -> Path:
    """A folder in the standard layout with further captions and boxes."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{split}2017").mkdir()
    for image in images:
        picture = png(image["width"], image["height"])
        (root / f"{split}2017" / image["file_name"]).write_bytes(picture)
    documents = {
        "captions": {"images": images, "annotations": [*CAPTIONS, *captions]},
        "instances": {
            "images": images,
            "annotations": [*BOXES, *boxes],
            "categories": CATEGORIES,
        },
    }
    for kind, document in documents.items():
        (root / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(document))
    return root


def test_joins_captions_and_boxes_by_image_id(tmp_path):
    folder = CocoFolder(write(tmp_path / "coco"), "val")
    assert (folder.name, folder.num_images, folder.num_captions) == ("coco:val", 2, 3)
    assert folder.keys == ["7", "3"] and folder.shard_sizes == (2,)
    assert folder.caption_ids == [2, 1, 3] and folder.attrition == {}
    wide, tall = folder.read(0), folder.read(1)
    assert (wide.key, wide.width, wide.height) == ("7", 40, 30)
    assert wide.captions == ("a wide thing ",) and wide.caption_rows == (0,)
    assert wide.boxes.categories == ("cat", "dog")
    assert wide.boxes.crowd.tolist() == [False, True]
    np.testing.assert_array_equal(wide.boxes.xywh, [[1.5, 2, 10, 20], [0, 0, 40, 30]])
    assert tall.captions == ("a tall thing", "b") and tall.caption_rows == (1, 2)
    assert tall.boxes.xywh.shape == (0, 4)
    assert wide.picture == png(40, 30)


@pytest.mark.parametrize(
    "captions, pictures, splits",
    [
        ("annotations/captions_{}2017.json", "{}2017", ["train", "val"]),
        ("annotations/captions_{}.json", "{}", ["dev", "train"]),
    ],
)
def test_knows_the_layouts(tmp_path, captions, pictures, splits):
    for split in splits:
        write(tmp_path / "from", split)
        for kind in ("captions", "instances"):
            new = tmp_path / "to" / captions.format(split).replace("captions", kind)
            new.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"from/annotations/{kind}_{split}2017.json").rename(new)
        (tmp_path / f"from/{split}2017").rename(tmp_path / "to" / pictures.format(split))
    assert find_splits(tmp_path / "to") == splits
    assert all(CocoFolder(tmp_path / "to", split).num_images == 2 for split in splits)
    assert held_out_split(tmp_path / "to", "train") in ("val", "dev")


def test_an_unsplit_set_has_one_split_called_all(tmp_path):
    root = write(tmp_path)
    for kind in ("captions", "instances"):
        (root / f"annotations/{kind}_val2017.json").rename(root / f"{kind}.json")
    (root / "val2017").rename(root / "images")
    assert find_splits(root) == ["all"] and CocoFolder(root, "all").num_images == 2
    with pytest.raises(UserError, match="has no split 'train'"):
        CocoFolder(root, "train")
    with pytest.raises(UserError, match="no held-out split"):
        held_out_split(root, "all")


def test_pictures_that_are_trained_on_are_not_held_out(tmp_path):
    root = write(tmp_path)
    assert held_out_split(root, "train") == "val"
    for trained in ("val", "val2017"):  # two names of one file
        with pytest.raises(UserError, match="no held-out split"):
            held_out_split(root, trained)
    spec = f"coco:{root}"
    assert held_out_spec(f"{spec}:train::scenes") == f"{spec}:val"
    assert held_out_spec(f"{spec}:train::{spec}/:val2017::scenes") == "scenes:val"


def test_limit_keeps_the_first_rows(tmp_path):
    root = write(tmp_path)
    few, whole = CocoFolder(root, "val", limit=1), CocoFolder(root, "val")
    assert few.keys == whole.keys[:1] and few.caption_ids == whole.caption_ids[:1]
    assert few.digest != whole.digest == CocoFolder(root, "val").digest
    with pytest.raises(UserError, match="holds 2 pictures, not the 9 asked for"):
        CocoFolder(root, "val", limit=9)


def box(*bbox, **more):
    return {"id": 99, "image_id": 7, "category_id": 5, "bbox": list(bbox)} | more


@pytest.mark.parametrize(
    "bad, fault",
    [
        (box(math.nan, 0, 5, 5), "not finite"),
        (box(0, 0, math.inf, 5), "not finite"),
        (box(5, 5, -3, 5), "of negative size"),
        (box(5, 5, 3, 0), "of zero area"),
        (box(40, 5, 0.5, 5), "of zero area"),
        (box(35, 5, 10, 5), "outside its picture"),
        (box(-4, 5, 10, 5), "outside its picture"),
        (box(1, 2, 3), "not four numbers"),
        (box(1, 2, 3, "4"), "not finite"),
        (box(1, 2, 3, 4, category_id=8), "of an unknown category"),
        (box(1, 2, 3, 4, image_id=55), "of no listed picture"),
    ],
)
def test_a_bad_box_is_named_or_counted(tmp_path, bad, fault):
    root = write(tmp_path, boxes=[bad])
    with pytest.raises(UserError, match=f"annotation 99 of picture .*{fault}.*--on-bad drop"):
        CocoFolder(root, "val")
    folder = CocoFolder(root, "val", on_bad="drop")
    assert folder.attrition == {f"boxes {fault}": 1}
    assert len(folder.read(0).boxes.xywh) == 2


def test_boxes_off_by_rounding_are_clipped_and_counted(tmp_path):
    folder = CocoFolder(write(tmp_path, boxes=[box(-0.5, 0, 41, 30), box(30, 0, 10.001, 9)]), "val")
    assert folder.attrition == {"boxes clipped to their picture": 1}
    xywh = folder.read(0).boxes.xywh[2:]
    np.testing.assert_array_equal(xywh, np.array([[0, 0, 40, 30], [30, 0, 10.001, 9]], np.float32))


def test_the_two_empty_boxes_of_coco_are_no_error(tmp_path):
    images = [*IMAGES, {"id": 200365, "file_name": "c.png", "width": 400, "height": 400}]
    caption = {"id": 9, "image_id": 200365, "caption": "dog"}
    empty = box(296.65, 388.33, 1.03, 0.0, image_id=200365)
    folder = CocoFolder(write(tmp_path, "train", [caption], [empty], images), "train")
    assert folder.attrition == {"empty boxes known in COCO 2017": 1}


def test_captions_and_pictures_without_each_other(tmp_path):
    lonely = {"id": 8, "file_name": "c.png", "width": 9, "height": 9}
    orphan = {"id": 5, "image_id": 77, "caption": "gone"}
    blank = {"id": 6, "image_id": 8, "caption": "  "}
    root = write(tmp_path, captions=[orphan, blank], images=[*IMAGES, lonely])
    with pytest.raises(UserError, match="annotation 5 of picture 77: its picture is not listed"):
        CocoFolder(root, "val")
    folder = CocoFolder(root, "val", on_bad="drop")
    assert folder.keys == ["7", "3"]
    assert folder.attrition == {
        "captions without picture": 1,
        "blank captions": 1,
        "pictures without caption": 1,
    }


def test_missing_picture_files(tmp_path):
    root = write(tmp_path)
    folder = CocoFolder(root, "val")
    (root / "val2017/a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 captioned pictures are not in .*first: a.png"):
        CocoFolder(root, "val")
    dropped = CocoFolder(root, "val", on_bad="drop")
    assert dropped.keys == ["3"] and dropped.attrition == {"pictures whose file is missing": 1}
    with pytest.raises(BadPicture, match=r"a\.png: No such file"):
        folder.read(0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "is not a COCO captions file: lacks the lists images, annotations"),
        ('{"images": []}', "is not a COCO captions file: lacks the lists annotations"),
        ('{"images": [3], "annotations": []}', "entry 0 of 'images' lacks id"),
        (json.dumps({"images": IMAGES, "annotations": BOXES}), "entry 0 .* lacks caption"),
        (json.dumps({"images": IMAGES * 2, "annotations": []}), "entry 2 .* repeats the id 7"),
        (
            json.dumps({"images": [IMAGES[0] | {"width": -1}], "annotations": []}),
            r"entry 0 .* has size \(-1, 30\)",
        ),
        (json.dumps({"images": IMAGES, "annotations": []}), "no picture with a caption"),
    ],
)
def test_a_captions_file_that_is_not_coco(tmp_path, text, message):
    root = write(tmp_path)
    (root / "annotations/captions_val2017.json").write_text(text)
    with pytest.raises(UserError, match=f"captions_val2017.json.*{message}"):
        CocoFolder(root, "val")


def test_a_folder_that_is_not_coco(tmp_path):
    with pytest.raises(UserError, match="is no COCO folder"):
        find_splits(tmp_path)
    root = write(tmp_path / "coco")
    with pytest.raises(UserError, match="has no split 'vla'; did you mean 'val'"):
        CocoFolder(root, "vla")
    (root / "annotations/instances_val2017.json").unlink()
    with pytest.raises(UserError, match=r"instances_val2017\.json is missing"):
        CocoFolder(root, "val")


def test_hash_split_is_stable_and_keeps_its_shares():
    shares = {"discovery": 0.5, "validation": 0.3, "confirm": 0.2}
    dealt = [hash_split(str(key), "salt", shares) for key in range(4000)]
    counts = Counter(dealt)
    for name, share in shares.items():
        assert abs(counts[name] / 4000 - share) < 5 * math.sqrt(share * (1 - share) / 4000)
    again = [hash_split(str(key), "pepper", shares) for key in range(4000)]
    agree = np.mean([a == b for a, b in zip(dealt, again)])
    assert abs(agree - sum(s * s for s in shares.values())) < 0.05  # independent of the other salt
    assert hash_split("285", "a", {"discovery": 0.5, "validation": 0.5}) == "validation"
    with pytest.raises(UserError, match="sum to 1"):
        hash_split("285", "a", {"discovery": 0.5})


@pytest.mark.parametrize(
    "folder, split, images, captions", [("coco", "val", 119, 595), ("flickr8k", "dev", 1000, 5000)]
)
def test_real_photographs_agree_with_pycocotools(folder, split, images, captions, capsys):
    from pycocotools.coco import COCO

    root = REAL / folder
    if not root.is_dir():
        pytest.skip(f"no photographs in {root}")
    ours = CocoFolder(root, split)
    assert (ours.num_images, ours.num_captions, ours.attrition) == (images, captions, {})
    year = "2017" if folder == "coco" else ""
    theirs = COCO(root / f"annotations/instances_{split}{year}.json")
    for row, key in enumerate(ours.keys[:50]):
        entries = theirs.loadAnns(theirs.getAnnIds(int(key)))
        boxes = ours.read(row).boxes
        bboxes = np.array([e["bbox"] for e in entries], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(boxes.xywh, bboxes)
        names = [theirs.cats[e["category_id"]]["name"] for e in entries]
        assert list(boxes.categories) == names
