"""Labelled pictures in every layout: rows and labels agree, and what does not belong is named."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from reference.labelled import picture, write_folders, write_layout, write_tar

from superclip.data.batch import Source
from superclip.data.labelled import TarPictures, open_labelled
from superclip.data.scenes import CATEGORIES, category_prompts
from superclip.errors import UserError


def test_class_folders_are_classes_in_sorted_order(tmp_path):
    root = write_folders(tmp_path / "pets" / "val", dog=2, cat=1, newt=0)
    (root / ".git").mkdir()
    for litter in (".DS_Store", "cat/Thumbs.db", "dog/.hidden"):
        (root / litter).write_bytes(b"x")
    data = open_labelled(str(root))
    assert data.name == "pets/val" and data.classes == ["cat", "dog", "newt"]
    assert data.source.keys == ["cat/0.png", "dog/0.png", "dog/1.png"]
    assert data.labels.tolist() == [0, 1, 1] and data.rows == [0, 1, 2]
    assert data.sizes.tolist() == [1, 2, 0], "an empty class stays a class"
    assert isinstance(data.source, Source) and not data.several
    record = data.source.read(2)
    assert (record.row, record.key, record.width, record.height) == (2, "dog/1.png", 8, 6)
    assert record.picture == (root / "dog/1.png").read_bytes() and record.captions == ()


def test_the_digest_follows_content_and_the_stamp_follows_time(tmp_path):
    root = write_folders(tmp_path / "a", cat=2, dog=2)
    first, again = open_labelled(str(root)), open_labelled(str(root))
    assert (first.digest, first.stamp) == (again.digest, again.stamp)
    os.utime(root / "cat/0.png", (1, 1))
    later = open_labelled(str(root))
    assert later.digest == first.digest and later.stamp != first.stamp
    (root / "cat/0.png").rename(root / "dog/9.png")
    assert open_labelled(str(root)).digest != first.digest
    assert open_labelled(str(write_folders(tmp_path / "b", cat=2, dog=3))).digest != first.digest


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: (r / "README.md").write_text("x"), "README.md beside its class folders"),
        (lambda r: (r / "cat/notes.txt").write_text("x"), "notes.txt is no picture"),
        (lambda r: (r / "cat/more").mkdir(), "more is a folder in a class folder; name"),
        (lambda r: (r / "0.png").write_bytes(picture()), "0.png beside its class folders"),
    ],
)
def test_a_folder_with_other_files_is_refused(tmp_path, change, said):
    change(write_folders(tmp_path / "data", cat=1, dog=1))
    with pytest.raises(UserError, match=said):
        open_labelled(str(tmp_path / "data"))


def test_what_is_no_labelled_data_is_refused(tmp_path):
    write_folders(tmp_path / "up" / "val", cat=1, dog=1)
    with pytest.raises(UserError, match=r"such as .*up/val\), or move it away"):
        open_labelled(str(tmp_path / "up"))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/0.png").write_bytes(picture())
    with pytest.raises(UserError, match="holds pictures, but no class folders"):
        open_labelled(str(tmp_path / "flat"))
    for name, classes in {"one": {"cat": 3}, "none": {"cat": 0, "dog": 0}, "empty": {}}.items():
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="at least two classes and a picture are needed"):
            open_labelled(str(write_folders(tmp_path / name, **classes)))
    with pytest.raises(UserError, match="is no labelled data: no folder of class folders"):
        open_labelled(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="judged one by one"):
        open_labelled("scenes::scenes:val")


def test_clip_benchmarks_layout(tmp_path):
    root = write_layout(tmp_path / "pets")
    data = open_labelled(str(root))
    assert data.name == "pets/test" and data.classes == data.names == ["dog", "tabby cat"]
    assert data.templates == ["a photo of a {c}.", "a bad {c}."]
    assert data.labels.tolist() == [1, 0, 1] and data.source.shard_sizes == (2, 1)
    assert isinstance(data.source, Source)
    record = pickle.loads(pickle.dumps(data.source)).read(2)
    assert (record.key, record.width, record.picture) == ("s0000002", 8, picture())
    assert data.source.where(2).endswith("test/1.tar")
    for spec in (root / "test", root / "test/{0..1}.tar"):
        same = open_labelled(str(spec))
        assert (same.digest, same.names, same.templates) == (
            data.digest,
            data.names,
            data.templates,
        )
    write_layout(root, "train")
    assert open_labelled(str(root), held_out=False).name == "pets/train"


def test_tars_alone_have_numbers_for_classes(tmp_path):
    samples = {"a.png": picture(), "a.cls": b"2", "b.jpg": picture(form="JPEG"), "b.cls": b"0\n"}
    write_tar(tmp_path / "x.tar", samples)
    data = open_labelled(str(tmp_path / "x.tar"))
    assert data.classes == ["0", "1", "2"] and data.names is data.templates is None
    assert data.sizes.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "files, said",
    [
        ({"test/nshards": "3"}, "says 3 shards, but 2.tar is absent"),
        ({"test/nshards": "two"}, "is no number of shards"),
        ({"classnames": "dog"}, "labels refer to 2 classes, classnames.txt names 1"),
        ({"dataset_type": "retrieval"}, "is retrieval data, without classes; use --val-data"),
        ({"dataset_type": "multilabel"}, r"'s0000000' has no label \(s0000000.npy\)"),
        ({"classnames": "\n"}, "classnames.txt is empty"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(tmp_path, files, said):
    root = write_layout(tmp_path / "pets", **files)
    with pytest.raises(UserError, match=said):
        open_labelled(str(root))


@pytest.mark.parametrize("label", [b"", b"dog", b"-1", b"1.5"])
def test_a_label_that_is_no_class_is_refused(tmp_path, label):
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.cls": label})
    with pytest.raises(UserError, match=r"a\.cls is no label"):
        open_labelled(str(tmp_path / "x.tar"))


def test_a_sample_without_picture_or_with_a_twin_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.txt": b"x", "a.cls": b"1"})
    with pytest.raises(UserError, match="sample 'a' has no picture"):
        open_labelled(str(tmp_path / "x.tar"))
    write_tar(tmp_path / "x.tar", {})
    with pytest.raises(UserError, match="holds no sample with a picture and a label"):
        open_labelled(str(tmp_path / "x.tar"))
    write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.cls": b"1"})
    with pytest.raises(UserError, match="'a' occurs twice"):
        open_labelled(f"{tmp_path}/x.tar,{tmp_path}/x.tar")


def test_a_tar_that_changes_is_not_read_on(tmp_path):
    write_layout(tmp_path)
    data = open_labelled(str(tmp_path))
    write_tar(tmp_path / "test/1.tar", {"s0000002.png": picture((1, 2, 3)), "s0000002.cls": b"0"})
    os.utime(tmp_path / "test/1.tar", (1, 1))
    data.source.read(0)
    with pytest.raises(UserError, match="has changed since it was opened"):
        data.source.read(2)
    assert isinstance(data.source, TarPictures)


def npy(*values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def test_several_labels_in_tars(tmp_path):
    write_layout(tmp_path, kind="multilabel")
    for shard, rows in enumerate([{"a": npy(1, 0), "b": npy(0, 0)}, {"c": npy(1, 1)}]):
        parts = [{f"{key}.png": picture(), f"{key}.npy": value} for key, value in rows.items()]
        write_tar(tmp_path / f"test/{shard}.tar", {k: v for part in parts for k, v in part.items()})
    data = open_labelled(str(tmp_path))
    assert data.several and data.labels.tolist() == [[True, False], [False, False], [True, True]]
    assert data.sizes.tolist() == [2, 1] and data.rows == [0, 1, 2]
    for bad, said in ((npy(0, 2), "zeros and ones"), (b"x", "no label"), (npy(1, 0, 1), "3 class")):
        write_tar(tmp_path / "test/1.tar", {"c.png": picture(), "c.npy": bad})
        with pytest.raises(UserError, match=said):
            open_labelled(str(tmp_path))


IMAGES = [{"id": k, "file_name": f"{k}.png", "width": 8, "height": 6} for k in (9, 4, 5)]
CATEGORIES_OF = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "newt"}]
BOXES = [
    {"id": 1, "image_id": 9, "category_id": 2, "bbox": [0, 0, 2, 2], "iscrowd": 0},
    {"id": 2, "image_id": 9, "category_id": 2, "bbox": [1, 0, 2, 2], "iscrowd": 0},
    {"id": 3, "image_id": 5, "category_id": 7, "bbox": [0, 0, 8, 6], "iscrowd": 1},
]


def write_instances(root, boxes=()):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    document = {"images": IMAGES, "annotations": [*BOXES, *boxes], "categories": CATEGORIES_OF}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(document))
    for image in IMAGES:
        (root / "val2017" / image["file_name"]).write_bytes(picture())
    return root


def test_coco_instances_are_several_labels(tmp_path):
    """In the file's order; crowds count, a category twice is there once, a bare picture stays."""
    root = write_instances(tmp_path / "coco")
    data = open_labelled(f"coco:{root}:val")
    assert data.name == "coco:val" and data.classes == data.names == ["dog", "cat", "newt"]
    assert data.source.keys == ["9.png", "4.png", "5.png"] and data.several
    assert data.labels.astype(int).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert data.sizes.tolist() == [1, 1, 0] and open_labelled(f"coco:{root}").digest == data.digest
    assert data.source.read(1).picture == picture()


def test_coco_annotations_that_do_not_fit_are_refused(tmp_path):
    for odd, said in (
        (BOXES[0] | {"image_id": 1}, "picture 1"),
        (BOXES[0] | {"category_id": 1}, "cat"),
    ):
        root = write_instances(tmp_path, [odd | {"id": 99}])
        with pytest.raises(UserError, match=f"annotation 99: {said}.* is not listed"):
            open_labelled(f"coco:{root}")
    root = write_instances(tmp_path)
    instances = root / "annotations/instances_val2017.json"
    document = json.loads(instances.read_text())
    document["categories"] *= 2
    instances.write_text(json.dumps(document))
    with pytest.raises(UserError, match="entry 3 of 'categories' repeats the id"):
        open_labelled(f"coco:{root}")
    root = write_instances(tmp_path)
    (root / "val2017/4.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures are not in .*first: 4\.png"):
        open_labelled(f"coco:{root}")
    with pytest.raises(UserError, match="has no instances of split 'dev'"):
        open_labelled(f"coco:{root}:dev")


def test_an_unsplit_coco_folder(tmp_path):
    root = write_instances(tmp_path)
    (root / "annotations/instances_val2017.json").rename(root / "instances.json")
    (root / "val2017").rename(root / "images")
    assert open_labelled(f"coco:{root}").labels.sum() == 2
    with pytest.raises(UserError, match="no instances of split 'val'"):
        open_labelled(f"coco:{root}:val")


def test_scenes_of_one_object():
    data = open_labelled("scenes:val", num=40)
    single = [row for row in range(40) if len(data.source.read(row).boxes.categories) == 1]
    assert data.rows == single and data.sizes.sum() == len(single)
    for row in single:
        (category,) = data.source.read(row).boxes.categories
        assert data.classes[data.labels[row]] == category
    assert data.templates is not None and data.names == list(CATEGORIES)
    prompts = [[t.replace("{}", name) for t in data.templates] for name in data.names]
    assert prompts == category_prompts()


def test_real_photographs(real_data):
    imagenette = open_labelled(str(real_data / "imagenette/val"))
    assert (len(imagenette.rows), imagenette.sizes.tolist()) == (500, [50] * 10)
    coco = open_labelled(f"coco:{real_data}/coco:val")
    assert coco.labels.shape == (119, 80) and coco.names is not None and coco.names[0] == "person"
