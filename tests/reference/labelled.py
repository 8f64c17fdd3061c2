"""Small labelled data on disk, in the layouts that users bring."""

import io
import tarfile
from pathlib import Path

from PIL import Image

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


def picture(colour=(9, 8, 7), form: str = "PNG", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def write_folders(root: Path, **classes: int) -> Path:
    """So many pictures a class, in the class's colour where it is one."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            colour = [min(255, v + 9 * k) for v in COLOURS.get(name, (90, 90, 90))]
            (root / name / f"{k}.png").write_bytes(picture(tuple(colour)))
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_layout(root: Path, split: str = "test", kind: str | None = None, **files: str) -> Path:
    """CLIP_benchmark's layout: shards of 2 and 1 pictures of the classes 1, 0 and 1."""
    labels = [b"1", b"0", b"1"]
    samples = [{f"s{k:07d}.png": picture(), f"s{k:07d}.cls": labels[k]} for k in range(3)]
    write_tar(root / split / "0.tar", samples[0] | samples[1])
    write_tar(root / split / "1.tar", samples[2])
    (root / split / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("dog\ntabby cat\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na bad {c}.\n")
    if kind is not None:
        (root / "dataset_type.txt").write_text(kind + "\n")
    for name, text in files.items():
        (root / f"{name}.txt").write_text(text)
    return root
