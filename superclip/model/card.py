"""The model card: what a checkpoint is, how it was made, what it scored and where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from superclip.config import TrainConfig, differences, is_scenes, train_config
from superclip.model.weights import Checkpoint

_MODES = {
    "crop": "the shortest side is brought to {size} pixels (bicubic), then the middle is cut out",
    "squash": "both sides are brought to {size} pixels (bicubic), whatever their ratio",
    "pad": "the longest side is brought to {size} pixels (bicubic) and the rest is filled",
}

HEADER = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
tags: [{tags}]
---
"""


def recipe_of(checkpoint: Checkpoint) -> TrainConfig[Any]:
    """The configuration of the run that a checkpoint of ours comes from."""
    assert checkpoint.config is not None, "plain weights bring no recipe"
    return checkpoint.config


def model_card(
    checkpoint: Checkpoint,
    opening: str,
    run: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    library: str = "open_clip",
) -> str:
    """Markdown for the README.md of an exported model.

    Args:
        opening: the paragraph that says how to open it.
        run: the run's `run.json`, empty where it is not known.
        evaluations: reports of `superclip.evaluate` on this very checkpoint.
        library: what opens it.
    """
    config, facts, preprocess = recipe_of(checkpoint), checkpoint.facts, checkpoint.preprocess
    parameters = sum(p.numel() for p in checkpoint.model.clip.parameters())
    data = config.data
    held_out = "the data's own held-out split" if data.val_data is None else f"`{data.val_data}`"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    tags = ", ".join(sorted({"clip", config.loss}))
    text = f"""{HEADER.format(tags=tags, library=library)}
# {config.model.name}, trained with the {config.loss} loss on {facts["data_name"]}

A CLIP model of {parameters:,} parameters ({facts["activation"]}): pictures and texts become vectors
of {checkpoint.model.feature_width} numbers whose cosine says how well they fit.

## How to open it

{opening}

Pictures are RGB; {_MODES[preprocess.mode].format(size=preprocess.size)}.

## Data

Trained on `{data.train_data}` (sha256 {facts["data_sha256"]}).
Held out: {held_out}.

## Recipe

{_recipe(checkpoint, run)}

## Made with

Seed {config.seed}, commit {facts["commit"]}, {versions}; {facts["world_size"]} process(es) on
{facts["device"]}. Initial weights sha256 {facts["init_sha256"]}.

## Scores

{_scores(evaluations)}

## Limits

{_limits(checkpoint, bool(evaluations), library)}

## Checkpoint

`{checkpoint.path.name}`, sha256 {checkpoint.sha256}
"""
    return without_folders(text)


def without_folders(text: str) -> str:
    """Absolute paths cut to their last part: a card travels, and tells nothing of where it was
    written.

    >>> without_folders("--text-tower hf//home/ada/bert")
    '--text-tower hf/…/bert'
    >>> without_folders("coco:/home/ada/coco:train and data/shards/a.tar and http://host/a/b.tar")
    'coco:…/coco:train and data/shards/a.tar and http://host/a/b.tar'
    """
    return re.sub(r"(?:(?<![/\w.])|(?<=\bhf/)|(?<=\btimm/))(?:/[^/\s:]+)+/(?=[^/\s])", "…/", text)


def _recipe(checkpoint: Checkpoint, run: Mapping[str, Any]) -> str:
    config = recipe_of(checkpoint)
    pretrained = _pretrained(config)
    rows = {
        "loss": config.loss,
        "learning rate": f"{config.lr:g} at its peak, {config.optim.warmup} steps of warm-up, then "
        "cosine to 0",
        "pairs per step": config.optim.global_batch_size,
        "passes over the data": f"{checkpoint.epoch} of {config.epochs}",
        "optimizer steps, whole run": run.get("total_steps", "not recorded beside the checkpoint"),
        "precision": config.precision,
        "weights at the start": pretrained or "drawn at random",
    }
    changed = differences(train_config({"loss": config.loss}), config)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    options = ", ".join(f"`{_flag(line)}`" for line in changed) or "none"
    return f"| | |\n|---|---|\n{table}\n\nOptions that differ from the default: {options}."


def _pretrained(config: TrainConfig[Any]) -> str | None:
    """What the weights at the start are called; None where all of them were drawn."""
    options = config.model
    if options.from_scratch:
        return None
    if options.image_tower is None:
        return f"`{options.pretrained}`"
    image, text = options.image_weights or "published", options.text_weights or "published"
    return f"`{options.name}` (weights: {image}, {text})"


def _flag(difference: str) -> str:
    """`name: old -> new` as one would type it.

    >>> _flag("aug_scale: None -> (0.5, 1.0)"), _flag("keep_special_tokens: False -> True")
    ('--aug-scale 0.5 1.0', '--keep-special-tokens')
    """
    name, _, change = difference.partition(": ")
    flag, value = name.replace("_", "-"), change.rpartition(" -> ")[2]
    if value in ("True", "False"):
        return f"--{flag}" if value == "True" else f"--no-{flag}"
    return f"--{flag} {value.strip('()').replace(',', '') if value.startswith('(') else value}"


def _scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    found = [result for report in evaluations for result in report["results"]]
    if not found:
        return "Not evaluated: no report of this checkpoint lay beside it."
    lines = [
        "| measure | value | 95 % interval | chance | queries | pictures | data |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found:
        for row in result["rows"]:
            value, low, high, chance = (_number(row, k) for k in ("value", "low", "high", "chance"))
            lines.append(
                f"| {result['task']}: {row['measure']} | {value} | {low} to {high} | {chance} | "
                f"{row['queries']} | {row['pictures']} | {_data(result['data'])} |"
            )
    return "\n".join(lines)


def _number(row: Mapping[str, Any], key: str) -> str:
    return f"{100 * row[key]:.2f} %" if row["percent"] else f"{row[key]:g}"


def _data(data: Mapping[str, Any]) -> str:
    return ", ".join(str(data[k]) for k in ("name", "split", "protocol") if data.get(k))


def _limits(checkpoint: Checkpoint, scored: bool, library: str) -> str:
    config, size = recipe_of(checkpoint), checkpoint.preprocess.size
    length = checkpoint.model_config["text_cfg"].get("context_length", 77)
    limits = [
        "It has seen generated drawings only; what it says of photographs means nothing."
        if is_scenes(config.data.train_data) and config.model.from_scratch
        else f"It has seen {checkpoint.facts['data_name']}"
        + (f" and what {pretrained} saw" if (pretrained := _pretrained(config)) else "")
        + "; pictures and wordings of another kind are beyond what was measured.",
        "One run with one seed: how far another seed would fall is not known from it"
        + (", nor from the intervals above, which draw the pictures anew." if scored else "."),
        f"Pictures are seen at {size} x {size} pixels, so small things are lost; texts are cut "
        f"after {length - 2} tokens.",
        "It repeats whatever its captions say of people. Nothing was tested for bias or safety; it "
        "is not for decisions about people.",
    ]
    if library == "open_clip":
        limits.append(
            "open_clip leaves a photograph lying on its side if only its EXIF note says so; this "
            "project's own reader turns it. Convert what is not RGB, grey pictures too, before "
            "open_clip's preprocessing."
        )
    if checkpoint.epoch < config.epochs:
        limits.insert(0, f"Training had not ended: {checkpoint.epoch} of {config.epochs} passes.")
    if checkpoint.path.name == "best.pt":
        limits.insert(0, f"Chosen by its own {config.keep_best}: that score flatters it.")
    return "\n".join(f"- {limit}" for limit in limits)
