"""Which tower a command looks at, and on which pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.collect import Subject
from superclip.config import DataConfig, is_scenes
from superclip.data.batch import Source
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError

if TYPE_CHECKING:
    from superclip.model.weights import Checkpoint

SCENES_LOOKED_AT = 1000


def open_subject(
    ckpt: Path | None, model: str | None = None, pretrained: str | None = None
) -> tuple[Subject, DataConfig | None]:
    """A checkpoint of this project, or plain open_clip weights under a model name.

    Returns:
        The subject, and the data section of its run (None for plain weights).

    Raises:
        UserError: if the file is missing, unusable or ambiguous.
    """
    from superclip.model.weights import brings_config, load_checkpoint, newest_checkpoint

    if model is not None:
        if ckpt is not None and ckpt.suffix != ".safetensors" and brings_config(ckpt):
            raise UserError(f"{ckpt} brings its own configuration; leave --model out")
        return _plain_weights(model, pretrained, ckpt), None
    found = load_checkpoint(ckpt or newest_checkpoint(Path("logs")))
    assert found.config is not None
    return subject_of(found), found.config.data


def subject_of(found: Checkpoint) -> Subject:
    """A checkpoint of this project."""
    config = found.config
    assert config is not None
    scratch = config.model.from_scratch
    facts = {
        "sha256": found.sha256,
        "epoch": found.epoch,
        "model": config.model.name,
        "loss": config.loss,
        "lr": config.lr,
        "seed": config.seed,
        "trained_on": found.facts["data_name"],
        "commit": found.facts["commit"],
    }
    return Subject(
        found.model,
        found.model_config,
        found.preprocess,
        facts,
        found.facts["init_sha256"] if scratch else None,
        config.seed,
        config.model.init_scale,
    )


def _plain_weights(model: str, pretrained: str | None, path: Path | None) -> Subject:
    from superclip.model.weights import load_plain

    found = load_plain(model, pretrained, path)
    facts: dict[str, Any] = {
        "sha256": found.sha256,
        "model": model,
        "loss": "unknown",
        "pretrained": pretrained or "a local file",
    }
    return Subject(found.model, found.model_config, found.preprocess, facts)


def open_pictures(
    data: str | None, root: Path | None, split: str | None, num: int | None, run: DataConfig | None
) -> tuple[Source, range]:
    """The pictures of a sweep: those asked for, else the held-out data of the run.

    Raises:
        UserError: if no data is named, or there are fewer pictures than asked for.
    """
    if data is None:
        if run is None:
            raise UserError(
                "plain weights know no data; give --data coco --root FOLDER, scenes, or tar shards"
            )
        data = run.val_data or held_out_spec(run.train_data)
        if split is not None and is_scenes(data):  # another split of the run's own data
            data = "scenes"
        elif split is not None and data.startswith("coco:"):
            data = ":".join(data.split(":")[:2])
    if root is not None and data != "coco":
        raise UserError("--root goes with --data coco")
    if data == "coco":
        data = f"coco:{root}"
    if split is not None:
        if data.startswith("scenes:") or data.count(":") > 1:
            raise UserError(f"--data {data} names its split already; leave --split out")
        if data.partition(":")[0] not in ("scenes", "coco"):
            raise UserError(
                "--split goes with scenes and coco; tar shards are named split by split"
            )
        data = f"{data}:{split}"
    scenes = is_scenes(data)
    count = num or (SCENES_LOOKED_AT if scenes else None)
    source = open_source(
        data, count if scenes else None, run.data_seed if run else 0, held_out=True
    )
    if count is not None and count > source.num_images:
        raise UserError(f"--num {count}: {data} holds only {source.num_images} pictures")
    return source, range(count or source.num_images)


def trained_ids(run: DataConfig | None, allow: bool) -> frozenset[str]:
    """Public ids of the pictures the run was trained on.

    Raises:
        UserError: if the training data can't be opened to tell.
    """
    if run is None or allow:
        return frozenset()
    try:
        source = open_source(run.train_data, run.train_num_samples, run.data_seed)
    except UserError as error:
        raise UserError(
            f"the training data can't be opened to leave trained pictures out ({error}); "
            "--allow-trained scores "
            "them all the same"
        ) from None
    keys = source.keys
    return frozenset(keys[: run.train_num_samples] if run.train_num_samples else keys)


def default_folder(ckpt: Path | None, kind: str = "class") -> Path:
    """Where the results of a checkpoint stand."""
    if ckpt is None:
        return Path("logs") / "sweep"
    stem = "" if ckpt.name == "final_epoch.pt" else f"-{ckpt.stem}"
    return ckpt.parent / f"sweep{stem}{'' if kind == 'class' else '-' + kind}"
