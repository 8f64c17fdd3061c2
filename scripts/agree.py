"""CLIP_benchmark and `superclip.evaluate` on one checkpoint and the same pictures, side by side.

  pip install clip-benchmark

  python scripts/agree.py --ckpt logs/final_epoch.pt --coco data/coco --zeroshot imagenet/val

Each tool opens the model in its own way (CLIP_benchmark by plain open_clip, from an export), reads
the pictures by itself and counts by itself. The status is 1 if a number differs for another reason
than the one that is printed beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from superclip.errors import UserError, nearest, run_command

FP32_SUMS = 1e-6
"""CLIP_benchmark sums precisions in fp32. Its other means are one division in fp32."""
TIE = 1e-6
"""Scores nearer than this may fall either way by rounding alone."""
RETRIEVAL = {"text": "image-to-text", "image": "text-to-image"}
"""What CLIP_benchmark retrieves, and our name for it."""
CLASSES = {"top-1": "acc1", "top-5": "acc5", "mean per class": "mean_per_class_recall"}
"""Our measures of classification, and CLIP_benchmark's."""


@dataclass(frozen=True)
class AgreeConfig:
    """What the two tools are compared on."""

    ckpt: Path
    """A checkpoint of this project."""
    coco: Path | None = None
    """COCO folder: retrieval, 80 labels (mAP), and questions in SugarCrepe's form, in which another
    picture's caption is the wrong text."""
    split: str = "val"
    """Of the COCO folder."""
    zeroshot: Path | None = None
    """Folder of class folders: zero-shot classification."""
    templates: Literal["simple", "openai"] = "simple"
    """7 prompts a class, or 80."""


@dataclass(frozen=True)
class Row:
    """One number of both tools; `reason` is known where they differ rightly."""

    name: str
    ours: float
    theirs: float
    queries: int
    reason: str = ""
    rounding: float = 0.0

    @property
    def equal(self) -> bool:
        """Every digit that fp32 has, in which CLIP_benchmark computes."""
        import numpy as np

        return bool(abs(np.float32(self.ours) - np.float32(self.theirs)) <= self.rounding)


def main(argv: list[str]) -> None:
    """Run both tools, print their numbers."""
    from superclip.flags import parse

    config = parse(AgreeConfig, argv, "python scripts/agree.py", str(__doc__))
    if config.coco is None and config.zeroshot is None:
        raise UserError("nothing to compare on: give --coco FOLDER, --zeroshot FOLDER or both")
    try:
        import clip_benchmark  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("CLIP_benchmark is not installed: pip install clip-benchmark") from None
    import numpy as np

    if config.zeroshot is not None and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise UserError(
            f"--zeroshot: CLIP_benchmark's accuracies fail with NumPy {np.__version__} (they make "
            "a number of an array of one); pip install 'numpy<2.4' in an environment of its own"
        )
    failed = False
    print(f"{'':<34}{'superclip':>14}{'CLIP_benchmark':>16}{'queries':>9}")
    for row in rows(config):
        failed |= not (row.equal or row.reason)
        verdict = "equal" if row.equal else row.reason or "DIFFERENT"
        line = f"{row.name:<34}{row.ours:>14.9f}{row.theirs:>16.9f}{row.queries:>9}  {verdict}"
        print(line, flush=True)
    raise SystemExit(int(failed))


def rows(config: AgreeConfig) -> Iterator[Row]:
    """All comparisons for which there is data."""
    from superclip.export import ExportConfig, export

    with tempfile.TemporaryDirectory() as scratch:
        model, _ = export(ExportConfig(config.ckpt, "open_clip", Path(scratch) / "model"))
        tools = Tools(config, model, Path(scratch))
        if config.coco is not None:
            captions, pictures = _coco_files(config.coco, config.split)
            spec = f"coco:{config.coco}:{config.split}"
            yield from tools.retrieval(spec, captions, pictures)
            yield from tools.labels(spec)
            yield from tools.questions(captions, pictures)
        if config.zeroshot is not None:
            yield from tools.classes(str(config.zeroshot))


def _coco_files(root: Path, split: str) -> tuple[Path, Path]:
    """Captions and pictures of a COCO folder."""
    from superclip.data.coco import LAYOUTS, find_splits

    for captions, _, pictures in LAYOUTS:
        if (file := root / captions.format(split=split)).is_file():
            return file, root / pictures.format(split=split)
    raise UserError(f"--split {split!r} is not in {root}; {nearest(split, find_splits(root))}")


@dataclass(frozen=True)
class Tools:
    """Both tools with one model.

    Attributes:
        model: an export of the checkpoint. place: for files that pass away.
    """

    config: AgreeConfig
    model: Path
    place: Path

    def ours(self, task: str, **options: Any) -> dict[str, dict[str, Any]]:
        """The rows of `superclip.evaluate` by name."""
        from superclip.evaluate import evaluate
        from superclip.evaluation.config import EvalConfig

        options |= {"tasks": (task,), "out": self.place / "ours.json", "overwrite": True}
        with contextlib.redirect_stdout(io.StringIO()):
            report = evaluate(EvalConfig((self.config.ckpt,), bootstrap=100, **options))
        [result] = report["results"]
        return {row["measure"]: row for row in result["rows"]}

    def theirs(self, dataset: str, root: Path, *words: str) -> dict[str, float]:
        """What `clip_benchmark eval` writes."""
        from clip_benchmark.cli import main as eval_cli  # pyright: ignore[reportMissingImports]

        out, argv = self.place / "theirs.json", sys.argv
        sys.argv = [
            *("clip_benchmark", "eval", "--dataset", dataset, "--dataset_root", str(root)),
            *("--model", f"local-dir:{self.model}", "--pretrained", "", "--no_amp"),
            *("--num_workers", "0", "--quiet", "--output", str(out), *words),
        ]
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                eval_cli()
        finally:
            sys.argv = argv
        return json.loads(out.read_text())["metrics"]

    def retrieval(self, spec: str, captions: Path, pictures: Path) -> Iterator[Row]:
        """R@1, 5, 10 in both directions."""
        root = self.place / "coco"
        root.mkdir()
        (root / "val2014").symlink_to(pictures.resolve())
        words = ("--annotation_file", str(captions), "--recall_k", "1", "5", "10")
        found = self.theirs("mscoco_captions", root, *words)
        mine = self.ours("retrieval", val_data=spec)
        for what, direction in RETRIEVAL.items():
            for k in (1, 5, 10):
                row, value = mine[f"{direction} R@{k}"], found[f"{what}_retrieval_recall@{k}"]
                said = Row(f"{direction} R@{k}", row["value"], value, row["queries"])
                yield said if said.equal else self._tied(said, spec, direction, k)

    def _tied(self, row: Row, spec: str, direction: str, k: int) -> Row:
        """The row, with a reason if exact ties can make the difference."""
        import torch

        from superclip.data.loader import tokenizer_for
        from superclip.data.sources import open_source
        from superclip.evaluation.encode import Encoder
        from superclip.model.factory import tokenizer
        from superclip.model.weights import load_checkpoint

        checkpoint = load_checkpoint(self.config.ckpt)
        tokenize = tokenizer_for(tokenizer(checkpoint.model_config))
        encoder = Encoder(checkpoint.preprocess, tokenize, torch.device("cpu"))
        seen = encoder.pictures(checkpoint.model, open_source(spec))
        texts = [text for record in seen.records for text in record.captions]
        owner = torch.tensor([i for i, r in enumerate(seen.records) for _ in r.captions])
        scores = encoder.texts(checkpoint.model, texts) @ seen.features.T
        own = owner[:, None] == torch.arange(len(seen.records))
        if direction == "image-to-text":
            scores, own = scores.T, own.T
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ahead = ((scores > best + TIE) & ~own).sum(1)
        abreast = ((scores >= best - TIE) & ~own).sum(1) - ahead
        least, most = (ahead + abreast < k).sum().item(), (ahead < k).sum().item()
        hits = round(row.theirs * row.queries)
        if round(row.ours * row.queries) == least and least <= hits <= most:
            reason = f"{most - least} answers hang on ties, misses here; there {hits - least} hit"
            return Row(row.name, row.ours, row.theirs, row.queries, reason)
        return row

    def classes(self, spec: str) -> Iterator[Row]:
        """Accuracies where a picture has one class."""
        root, _ = self._shard(spec, "classes")
        found = self.theirs("wds/classes", root)
        mine = self.ours("zeroshot", zeroshot=spec, templates=self.config.templates)
        for name, row in mine.items():
            yield Row(name, row["value"], found[CLASSES[name]], row["queries"])

    def labels(self, spec: str) -> Iterator[Row]:
        """Mean average precision where a picture has several."""
        root, occur = self._shard(spec, "labels")
        value = self.theirs("wds/labels", root)["mean_average_precision"]
        mine = self.ours("zeroshot", zeroshot=spec, templates=self.config.templates)["mAP"]
        # CLIP_benchmark gives a class without a picture the precision 0; here it is left out.
        name = f"mAP, times {len(occur)}/{sum(occur)}" if not all(occur) else "mAP"
        value *= len(occur) / sum(occur)
        yield Row(name, mine["value"], value, mine["queries"], rounding=FP32_SUMS)

    def _shard(self, spec: str, name: str) -> tuple[Path, list[bool]]:
        """Labelled pictures in CLIP_benchmark's layout, and which classes occur."""
        import numpy as np

        from superclip.data.labelled import open_labelled
        from superclip.evaluation.zeroshot import class_names, templates

        data, root = open_labelled(spec), self.place / name
        (root / "test").mkdir(parents=True)
        prompts = templates(self.config.templates, data)
        (root / "classnames.txt").write_text("\n".join(class_names(data)))
        (root / "zeroshot_classification_templates.txt").write_text(
            "\n".join(prompt.replace("{}", "{c}") for prompt in prompts)
        )
        (root / "dataset_type.txt").write_text("multilabel" if data.several else "classification")
        (root / "test" / "nshards.txt").write_text("1")
        with tarfile.open(root / "test" / "0.tar", "w") as tar:
            for row in data.rows:
                label, kind = str(data.labels[row]).encode(), "cls"
                if data.several:
                    buffer, kind = io.BytesIO(), "npy"
                    np.save(buffer, data.labels[row].astype(np.int64))
                    label = buffer.getvalue()
                picture = data.source.read(row).picture
                assert isinstance(picture, bytes)
                for ending, content in (("jpg", picture), (kind, label)):
                    entry = tarfile.TarInfo(f"{row:08d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        return root, [bool(size) for size in data.sizes]

    def questions(self, captions: Path, pictures: Path) -> Iterator[Row]:
        """A picture's first caption against that of the picture after it."""
        document = json.loads(captions.read_text())
        files = {image["id"]: image["file_name"] for image in document["images"]}
        first: dict[int, str] = {}
        for annotation in document["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"])
        ids = sorted(first)
        asked = {
            str(k): {
                "filename": files[one],
                "caption": first[one],
                "negative_caption": first[other],
            }
            for k, (one, other) in enumerate(zip(ids, ids[1:] + ids[:1]))
            if first[one].strip() != first[other].strip()
        }
        root = self.place / "questions"
        root.mkdir()
        (root / "val2017").symlink_to(pictures.resolve())
        (root / "swap_obj.json").write_text(json.dumps(asked))
        value = self.theirs("sugar_crepe/swap_obj", root)["text_acc"]
        options = {"compositional": (str(root / "swap_obj.json"),), "images": pictures}
        mine = self.ours("compositional", **options)["swap_obj"]
        yield Row("questions", mine["value"], value, mine["queries"])


if __name__ == "__main__":
    run_command(main)
