"""A sweep opened again: its checkpoint, its pictures split by split, and their captions.

The commands that ask what heads do (ablate, lens, relevance, circuit) go on from a sweep: the same
pictures, the same split, so that whatever discovery chose is judged by validation alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from open_clip import SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from interp.collect import Subject, read_batches
from interp.config import OfSweep
from interp.hooked import HookedVisionTransformer
from interp.results import SweepResults
from interp.subject import default_folder, open_pictures, open_subject
from superclip.data.batch import Record, Source
from superclip.data.loader import tokenizer_for
from superclip.data.scenes import CATEGORIES, Scenes, category_templates
from superclip.errors import UserError, check_writable, replace_text, replacing
from superclip.evaluation.encode import Encoder
from superclip.evaluation.zeroshot import classifier
from superclip.model.factory import tokenizer
from superclip.model.superclip import SuperCLIP
from superclip.model.weights import newest_checkpoint
from superclip.ops.world import choose_device
from superclip.progress import progress

Images = Float[Tensor, "_ 3 height width"]


@dataclass(frozen=True, eq=False)
class Swept:
    """What a sweep looked at, in working order.

    Attributes:
        results: of the sweep.
        folder: where they stand, and where siblings go.
        source: the pictures, equal by hash to those swept.
        tower: over the vision tower of the checkpoint, on the device.
    """

    results: SweepResults
    folder: Path
    subject: Subject
    source: Source
    tower: HookedVisionTransformer
    device: torch.device
    batch_size: int

    @property
    def model(self) -> SuperCLIP:
        return self.subject.captioned

    def ids(self, split: str) -> list[str]:
        """Public ids of the pictures of `discovery` or `validation` that take part in tests."""
        return self.results.image_ids[self.results.rows(split)].tolist()

    def rows(self, split: str) -> list[int]:
        """The same pictures as rows of the source."""
        return [self._row_of[key] for key in self.ids(split)]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.source.keys)}

    def records(self, split: str) -> list[Record]:
        """What is known of the pictures of a split, in the order of `rows`."""
        return [self.source.read(row) for row in self.rows(split)]

    def batches(self, rows: Sequence[int], what: str) -> Iterator[Images]:
        """Normalised pictures on the device, in the order of `rows`, with a bar called `what`."""
        size = self.batch_size
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        yield from progress(self.pictures(chunks), what, len(chunks), unit="batch")

    def pictures(self, chunks: Iterable[Sequence[int]]) -> Iterator[Images]:
        """Normalised pictures on the device, one batch a list of rows."""
        for rows in chunks:
            ((pixels, _),) = read_batches(self.source, self.subject.preprocess, rows, len(rows))
            yield self.model.normalise(torch.from_numpy(pixels).to(self.device))

    @cached_property
    def encoder(self) -> Encoder:
        """Reads texts (and pictures) as the checkpoint does."""
        tokenize = tokenizer_for(tokenizer(self.subject.model_config))
        return Encoder(self.subject.preprocess, tokenize, self.device)

    def captions(self, split: str) -> tuple[Float[Tensor, "caption d"], Int[Tensor, " caption"]]:
        """Unit vectors of a split's captions, and the picture that each describes, counted within
        the split."""
        texts = [record.captions for record in self.records(split)]
        owner = [i for i, own in enumerate(texts) for _ in own]
        vectors = self.encoder.texts(self.model, [text for own in texts for text in own])
        return vectors, torch.tensor(owner, device=self.device)

    def class_vectors(self, names: Sequence[str]) -> Float[Tensor, "class d"]:
        """Zero-shot classifier of words by their `prompts`."""
        return classifier(self.model, self.encoder, names, self.prompts(names))

    def prompts(self, names: Sequence[str]) -> list[str]:
        """With the slot `{}`: the scenes' own ("a red {}") where all words are categories of
        scenes, else CLIP's seven short ones."""
        if isinstance(self.source, Scenes) and set(names) <= set(CATEGORIES):
            return category_templates()
        return [t("{}") for t in SIMPLE_IMAGENET_TEMPLATES]

    def present(self, split: str) -> Bool[np.ndarray, "image category"]:
        """Which of the manifest's categories each picture of a split shows after the crop."""
        results, rows = self.results, self.results.rows(split)
        shown = np.zeros((len(results.image_ids), len(results.manifest["categories"])), bool)
        shown[results.category_image, results.category_id] = True
        return shown[rows]

    @property
    def tie(self) -> dict[str, Any]:
        return tie(self.results)


def tie(results: SweepResults) -> dict[str, Any]:
    """Facts that tie a report to its sweep."""
    manifest = results.manifest
    return {
        "checkpoint_sha256": manifest["checkpoint"]["sha256"],
        "images_sha256": manifest["images_sha256"],
    }


def open_swept(config: OfSweep) -> Swept:
    """The sweep that a command goes on from.

    Raises:
        UserError: if there is no sweep, it is of another checkpoint, or its pictures can't be found
            again.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    ckpt = config.ckpt
    if ckpt is None and config.model is None:
        ckpt = newest_checkpoint(Path("logs"))
    folder = config.results or default_folder(ckpt)
    results = SweepResults.load(folder)
    subject, run = open_subject(ckpt, config.model, config.pretrained)
    if subject.facts["sha256"] != results.manifest["checkpoint"]["sha256"]:
        raise UserError(
            f"{folder} is the sweep of another checkpoint than {ckpt or config.pretrained}; sweep "
            "this one first, or name its --results"
        )
    swept = results.manifest["data"]
    try:
        source, _ = open_pictures(config.data, config.root, config.split, swept["num"], run)
    except UserError as error:
        raise UserError(
            f"{folder} is the sweep of {swept['name']}; give the --data, --root and --split of it "
            f"({error})"
        ) from None
    if source.digest != swept["sha256"]:
        raise UserError(
            f"{source.name} is not the data that was swept ({swept['name']}); give the sweep's "
            "--data, --root and --split"
        )
    if lost := set(results.image_ids.tolist()) - set(source.keys):
        raise UserError(f"{folder}: picture {min(lost)} is not among those of {source.name}")
    subject.captioned.to(device).eval()
    tower = HookedVisionTransformer(subject.captioned.clip.visual)
    return Swept(results, folder, subject, source, tower, device, config.batch_size)


def beside(config: OfSweep, name: str) -> Path:
    """A file beside the sweep."""
    ckpt = config.ckpt
    if ckpt is None and config.model is None and config.results is None:
        ckpt = newest_checkpoint(Path("logs"))
    return (config.results or default_folder(ckpt)) / name


def asked(config: OfSweep) -> dict[str, Any]:
    """The options that decide a report's numbers, beside checkpoint and pictures."""
    free = {f.name for f in fields(OfSweep)} - {"seed", "draws"} | {"max_memory"}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free}


def standing(
    config: OfSweep, name: str, schema: int, asked: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The report beside the sweep, if it is what is asked for now; None if there is none, or
    `--overwrite` is given.

    Raises:
        UserError: if it is one of another sweep or of other options, or as `open_swept`.
    """
    path = beside(config, name)
    if config.overwrite or not path.is_file():
        return None
    wanted = {"schema": schema} | open_swept(config).tie
    try:
        report = json.loads(path.read_text())
        unlike = [key for key in wanted if report.get(key) != wanted[key]]
        held = report["asked"]
        unlike += [f"--{k.replace('_', '-')}" for k in asked if held.get(k) != asked[k]]
    except (ValueError, LookupError, AttributeError, TypeError):
        unlike, report = ["content"], {}
    if unlike:
        raise UserError(
            f"{path} is another report (other {', '.join(unlike)}); --overwrite "
            "(overwrite=True) replaces it"
        )
    return report


def claim(config: OfSweep, name: str) -> Path:
    """Where a command's report goes: beside the sweep, and not over another one.

    Raises:
        UserError: if the file is there already and `--overwrite` is not given, or the folder can't
            be written.
    """
    ckpt = config.ckpt
    if ckpt is not None and re.search(r"[*?[]", ckpt.name) and not ckpt.exists():
        raise UserError(f"--ckpt {ckpt}: a pattern goes with interp.sweep and interp.ablate only")
    path = beside(config, name)
    check_writable(path, "--results")
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists; --overwrite replaces it")
    return path


def write_report(path: Path, report: dict[str, Any]) -> None:
    """As JSON with sorted keys, whole or not at all."""
    replace_text(path, json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As `.npz`, whole or not at all; equal arrays give equal bytes."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
