"""The command writes whole sets or nothing, and its mistakes are one line."""

import json
import os
import subprocess
import sys
import zipfile
from hashlib import md5
from pathlib import Path

import pytest

from superclip.data.coco import CocoFolder, hash_split
from superclip.data.shards import Shards
from superclip.pack import main

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("SUPERCLIP_REAL_DATA", ROOT.parent / "shared/data"))


@pytest.fixture
def coco() -> Path:
    if not (REAL / "coco").is_dir():
        pytest.skip(f"no photographs in {REAL / 'coco'}")
    return REAL / "coco"


def run(*argv: object) -> None:
    main([str(word) for word in argv])


def command(*argv: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "superclip.pack", *map(str, argv)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_packs_every_split_of_a_coco_folder(coco, tmp_path, capsys):
    out = tmp_path / "shards"
    run("coco", "--root", coco, "--out", out, "--per-shard", 60)
    printed = capsys.readouterr().out
    assert "train: 129 pictures, 645 captions, 3 shards" in printed
    assert "val: 119 pictures, 595 captions, 2 shards" in printed
    tars = [f"train-{k:06d}" for k in range(3)] + [f"val-{k:06d}" for k in range(2)]
    files = [f"{name}.{end}" for name in tars for end in ("idx", "tar")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "manifest.json"])

    manifest = json.loads((out / "manifest.json").read_text())
    for split in ("train", "val"):
        folder, packed = CocoFolder(coco, split), Shards(f"{out}/{split}-*.tar")
        assert packed.keys == folder.keys
        listed = [i for s in manifest["shards"] if s["split"] == split for i in s["images"]]
        assert [image["key"] for image in listed] == folder.keys
        assert [c for image in listed for c in image["caption_ids"]] == folder.caption_ids


def test_deals_pictures_by_hash(coco, tmp_path):
    run("coco", "--root", coco, "--out", tmp_path / "s", "--split-by-hash", "9:a=0.7,b=0.3")
    keys = {name: Shards(f"{tmp_path}/s/{name}-*.tar").keys for name in "ab"}
    assert len(keys["a"]) + len(keys["b"]) == 248
    for name, held in keys.items():
        assert {hash_split(key, "9", {"a": 0.7, "b": 0.3}) for key in held} == {name}


def test_overwrites_only_shards_and_only_when_asked(coco, tmp_path):
    out = tmp_path / "shards"
    words = ("coco", "--root", coco, "--out", out, "--split", "val")
    run(*words, "--per-shard", 10)
    with pytest.raises(ValueError, match="holds shards already; pass --overwrite"):
        run(*words)
    assert len(list(out.glob("*.tar"))) == 12
    run(*words, "--overwrite")
    assert len(list(out.glob("*.tar"))) == 1
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt', which is no shard"):
        run(*words, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


def test_an_error_leaves_nothing_behind(coco, tmp_path):
    root = tmp_path / "coco"
    root.mkdir()
    (root / "annotations").symlink_to(coco / "annotations")
    (root / "val2017").mkdir()
    pictures = sorted((coco / "val2017").iterdir())
    for picture in pictures[:-1]:
        (root / "val2017" / picture.name).symlink_to(picture)
    (root / "val2017" / pictures[-1].name).write_bytes(b"\xff\xd8 not really")
    with pytest.raises(ValueError, match=f"picture {int(pictures[-1].stem)}: unreadable header"):
        run("coco", "--root", root, "--out", tmp_path / "out", "--split", "val", "--per-shard", 9)
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--split", "vla"], "--split 'vla' is not in .*did you mean 'val'"),
        (["--per-shard", "0"], "--per-shard 0 must be at least 1"),
        (["--split-by-hash", "9"], "--split-by-hash '9' must read SALT:NAME=SHARE"),
        (["--split-by-hash", "9:a=0.5"], "shares that sum to 1"),
        (["--split-by-hash", "9:a=1,b=0"], "shares"),
    ],
)
def test_wrong_options_are_named(coco, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run("coco", "--root", coco, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        run("coco", "--root", tmp_path / "none", "--out", tmp_path / "out")


def test_scenes_export_is_coco_that_pycocotools_reads(tmp_path, capsys):
    from pycocotools.coco import COCO

    run("scenes", "--out", tmp_path / "scenes", "--num", 6)
    folder = CocoFolder(tmp_path / "scenes", "all")
    assert folder.num_images == 6 and folder.attrition == {}
    instances = COCO(tmp_path / "scenes/instances.json")
    assert len(instances.anns) == sum(len(folder.read(k).boxes.xywh) for k in range(6)) > 0
    captions = COCO(tmp_path / "scenes/captions.json")
    assert len(captions.anns) == folder.num_captions


def test_mistakes_end_in_one_line_and_status_2(tmp_path):
    for words in (["coco", "--rot", "x"], ["coco", "--root", tmp_path, "--out", tmp_path / "o"]):
        done = command(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_teaches_and_loads_no_torch():
    done = command("coco", "--help")
    assert done.returncode == 0 and "--split-by-hash" in done.stdout
    check = "import sys, superclip.pack; assert not {'torch', 'PIL', 'webdataset'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=60)


SCRIPT = ROOT / "scripts/download_coco.sh"


def small_archives(folder: Path) -> str:
    """COCO's three archives in miniature under `folder`, and the script with their sizes."""
    text = SCRIPT.read_text()
    for path, member, size, digest in (
        (
            "annotations/annotations_trainval2017.zip",
            "annotations/captions_val2017.json",
            "252907541",
            "f4bbac642086de4f52a3fdda2de5fa2c",
        ),
        ("zips/val2017.zip", "val2017/1.jpg", "815585330", "442b8da7639aecaf257c1dceb8ba8c80"),
    ):
        archive = folder / path
        archive.parent.mkdir(parents=True)
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(member, member * 50)
        data = archive.read_bytes()
        assert size in text and digest in text
        text = text.replace(size, str(len(data))).replace(digest, md5(data).hexdigest())
    return text


def bash(text: str, *words: object, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text, "download_coco.sh", *map(str, words)],
        env={**os.environ, "COCO_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_download_goes_on_where_it_stopped_and_checks_what_it_got(tmp_path):
    server, out = tmp_path / "server", tmp_path / "coco"
    text = small_archives(server)
    whole = (server / "zips/val2017.zip").read_bytes()
    (out / "archives").mkdir(parents=True)
    (out / "archives/val2017.zip").write_bytes(whole[:100])
    done = bash(text, out, "--val-only", url=f"file://{server}")
    assert done.returncode == 0, done.stderr
    assert (out / "archives/val2017.zip").read_bytes() == whole
    assert (out / "val2017/1.jpg").is_file() and not (out / "train2017").exists()
    assert (out / "annotations/captions_val2017.json").is_file()

    (out / "val2017/1.jpg").write_text("mine")
    again = bash(text, out, "--val-only", url=f"file://{server}")
    assert again.returncode == 0 and "left alone" in again.stdout
    assert (out / "val2017/1.jpg").read_text() == "mine"


def test_download_refuses_other_bytes(tmp_path):
    text = small_archives(tmp_path / "server")
    archive = tmp_path / "server/zips/val2017.zip"
    archive.write_bytes(archive.read_bytes()[::-1])
    done = bash(text, tmp_path / "coco", "--val-only", url=f"file://{tmp_path}/server")
    assert done.returncode == 2 and "another md5" in done.stderr
    assert not (tmp_path / "coco/val2017").exists()


def test_download_says_what_failed(tmp_path):
    done = bash(SCRIPT.read_text(), tmp_path / "coco", url=f"file://{tmp_path}/nowhere")
    assert done.returncode == 2
    assert "annotations_trainval2017.zip: 252 MB, 252 MB to fetch" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: could not fetch file://")
    assert bash(SCRIPT.read_text(), url="").stderr.startswith("error: name a folder")
