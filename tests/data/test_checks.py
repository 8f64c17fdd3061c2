import json

import numpy as np
import pytest
from PIL import Image

from superclip.data.checks import read_checks
from superclip.errors import UserError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png"):
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder / name)
    return folder


def own(image="a.png", positive="a cup", negative="a sun", category="object", **more):
    return {"image": image, "positive": positive, "negative": negative, "category": category} | more


def crepe(filename="a.png", caption="a cup", negative_caption="a sun"):
    return {"filename": filename, "caption": caption, "negative_caption": negative_caption}


def written(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_our_own_form(tmp_path, images):
    document = [own(), own("deep/c.png", "one ", "two"), own(category="colour", id=7)]
    checks = read_checks([written(tmp_path / "mine.json", document)], images)
    assert [tuple(item) for item in checks.items] == [
        (0, "a cup", "a sun", "object", "mine/0"),
        (1, "one ", "two", "object", "mine/1"),
        (0, "a cup", "a sun", "colour", "7"),
    ]
    assert checks.source.keys == ["a.png", "deep/c.png"] and checks.categories[1] == "colour"
    record = checks.source.read(1)
    assert (record.key, record.width, record.height, record.captions) == ("deep/c.png", 6, 4, ())


def test_sugarcrepe_files_or_their_folder(tmp_path, images):
    swap = written(tmp_path / "crepe" / "swap_obj.json", {"0": crepe(), "9": crepe("b.png")})
    add = written(tmp_path / "crepe" / "add_att.json", {"0": crepe()})
    checks = read_checks([tmp_path / "crepe"], images)
    assert [i.id for i in checks.items] == ["add_att/0", "swap_obj/0", "swap_obj/9"]
    assert checks.categories == ["add_att", "swap_obj"] and checks.name == "crepe"
    assert read_checks([add, swap], images).sha256 == checks.sha256
    assert read_checks([swap], images).categories == ["swap_obj"]


def test_the_hash_follows_texts_and_pictures(tmp_path, images):
    def digest(**change):
        return read_checks([written(tmp_path / "x.json", [own(**change)])], images).sha256

    first = digest()
    assert digest() == first
    assert len({first, digest(negative="a"), digest(image="b.png"), digest(category="c")}) == 4
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(images / "a.png")
    assert digest() != first


def test_a_limit_keeps_the_first_of_each_category(tmp_path, images):
    document = [own(), own(), own(category="colour"), own(category="colour"), own()]
    checks = read_checks([written(tmp_path / "x.json", document)], images)
    assert [i.id for i in checks.limited(1).items] == ["x/0", "x/2"]
    assert [i.id for i in checks.limited(2).items] == ["x/0", "x/1", "x/2", "x/3"]
    assert len(checks.limited(9).items) == 5 and checks.limited(1).sha256 != checks.sha256
    with pytest.raises(UserError, match="limit 0"):
        checks.limited(0)


BAD = {
    "[{": "x.json is not JSON .*line 1",
    "[]": "x.json holds no checks",
    "3": "x.json holds no checks",
    '{"0": {"filename": "a"}, "0": {}}': "x.json is not JSON .*'0' occurs twice",
    '{"images": [], "annotations": []}': "entry images is no object; .*SugarCrepe",
    '["a"]': "entry 0 is no object",
    json.dumps({"5": crepe() | {"caption": " "}}): "entry 5: caption is ' '; it must be a text",
    json.dumps({"5": {"filename": "a.png"}}): "entry 5 lacks caption, negative_caption",
    json.dumps([own(), crepe()]): "entry 1 lacks image, positive, negative, category",
    json.dumps([own(negative=None)]): "entry 0: negative is None",
    json.dumps([own(id=[1])]): r"entry 0: id is \[1\]",
    json.dumps([own(), own(negative=" a  cup")]): "entry 1: both texts are 'a cup', .* mend",
    json.dumps([own(id=4), own(id="4")]): "entry 1 has the id '4' of .*x.json: entry 0",
    json.dumps(
        [own("b.png"), own("z.png")]
    ): r"x.json: entry 1: z.png is not in --images .* \(1 of 2 pictures .*fetch",
    json.dumps([own("../a.png")]): r"entry 0: '\.\./a.png' leads out of --images",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_mistakes_name_file_and_entry(tmp_path, images, content):
    path = written(tmp_path / "x.json", content)
    with pytest.raises(UserError, match=BAD[content]) as caught:
        read_checks([path], images)
    assert "\n" not in str(caught.value)


def test_absent_files_and_folders(tmp_path, images):
    path = written(tmp_path / "x.json", [own()])
    for paths, folder, message in (
        ([tmp_path / "no.json"], images, r"no\.json: No such file"),
        ([images], images, "holds no .json file"),
        ([path], tmp_path / "none", "--images .*none is no folder"),
        ([path, path], images, "has the id 'x/0'"),
    ):
        with pytest.raises(UserError, match=message):
            read_checks(paths, folder)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        read_checks([path], images)
