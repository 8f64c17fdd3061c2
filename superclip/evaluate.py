"""`python -m superclip.evaluate`: retrieval with intervals and chance levels, from a checkpoint
alone."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superclip.config import EvalConfig, is_scenes
from superclip.errors import UserError, check_writable, replace_text, run_command

if TYPE_CHECKING:
    from superclip.training.evaluators import Recall

DESCRIPTION = """Retrieval of a checkpoint on held-out data: R@1/5/10 and median rank, each with n,
a bootstrap 95 % interval over pictures and the chance level. With no flags: the newest checkpoint
under logs/ on its own held-out split. Writes eval_SPLIT.json beside the checkpoint."""


def main(argv: list[str]) -> None:
    """Parse, evaluate, print, write."""
    from superclip.flags import parse

    config = parse(EvalConfig, argv, "python -m superclip.evaluate", DESCRIPTION)
    logging.getLogger().setLevel(logging.ERROR)
    if config.out is not None:
        check_writable(config.out, "--out")
    report, path = evaluate(config)
    print(render(report))
    replace_text(path, json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


def evaluate(config: EvalConfig) -> tuple[dict[str, Any], Path]:
    """Every number of the report as plain values, and where it belongs.

    Raises:
        UserError: if checkpoint or data are missing or unusable.
    """
    from dataclasses import asdict

    from superclip.data.loader import tokenizer_for
    from superclip.data.sources import held_out_spec, open_source
    from superclip.model.factory import tokenizer
    from superclip.model.weights import load_checkpoint, newest_checkpoint
    from superclip.ops.world import choose_device
    from superclip.training.evaluators import Encoder, retrieval_table, scene_category_accuracy
    from superclip.training.optim import concrete_precision

    device = choose_device(config.device)
    checkpoint = load_checkpoint(config.ckpt or newest_checkpoint(Path("logs")))
    data = checkpoint.config.data
    if config.split == "train":
        spec = config.val_data or data.train_data
    else:
        spec = config.val_data or data.val_data or held_out_spec(data.train_data)
    scenes = is_scenes(spec)
    num = config.num or (2000 if scenes else None)
    source = open_source(
        spec, num if scenes else None, data.data_seed, held_out=config.split == "val"
    )
    if num is not None and num > source.num_images:
        raise UserError(f"--num {num}: {spec} holds only {source.num_images} pictures")
    if config.pool is not None and config.pool > (num or source.num_images):
        raise UserError(
            f"--pool {config.pool} is larger than the {num or source.num_images} pictures"
        )
    encoder = Encoder(
        checkpoint.preprocess,
        tokenizer_for(tokenizer(checkpoint.model_config)),
        device,
        concrete_precision("auto", device) if device.type == "cuda" else "fp32",
        config.batch_size,
    )
    model = checkpoint.model.to(device)
    first = config.protocol == "first-caption"
    features = encoder.encode(model, source, first, range(num or source.num_images))
    pool = config.pool or (min(500, source.num_images) if scenes else None)
    directions = ("image-to-text",) if first else ("image-to-text", "text-to-image")
    rows = retrieval_table(features, pool, config.bootstrap, directions)
    report: dict[str, Any] = {
        "checkpoint": {
            "file": checkpoint.path.name,
            "sha256": checkpoint.sha256,
            "epoch": checkpoint.epoch,
        },
        "loss": checkpoint.config.loss,
        "lr": checkpoint.config.lr,
        "model": checkpoint.config.model.model,
        "activation": checkpoint.facts["activation"],
        "data": {"name": source.name, "spec": spec, "sha256": source.digest, "split": config.split},
        "protocol": config.protocol,
        "bootstrap_draws": config.bootstrap,
        "retrieval": [asdict(row) for row in rows],
    }
    if scenes:
        report["ceilings"] = _ceilings(features.captions, pool or len(features.captions), rows)
        report["category_accuracy"] = scene_category_accuracy(
            model, encoder, features, config.bootstrap
        )
    asked = (config.val_data, config.num, config.pool, config.protocol)
    plain = asked == (None, None, None, "all-captions")
    tag = "" if plain else "-" + hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
    path = config.out or checkpoint.path.with_name(f"eval_{config.split}{tag}.json")
    return report, path


def _ceilings(
    captions: Sequence[str], pool: int, rows: Sequence[Recall]
) -> dict[str, dict[str, float]]:
    """Mean over the pools of what a perfect model, and a perfect model blind to categories, can
    reach."""
    import numpy as np

    from superclip.data.scenes import retrieval_ceilings

    starts = range(0, rows[0].pictures, pool)
    found = [retrieval_ceilings(captions[start : start + pool]) for start in starts]
    return {
        name: {f"R@{k}": float(np.mean([f[name][k] for f in found])) for k in (1, 5, 10)}
        for name in ("category_blind", "caption_collision")
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    checkpoint, data = report["checkpoint"], report["data"]
    lines = [
        f"{report['loss']} {report['model']} ({report['activation']}), {checkpoint['file']} epoch "
        f"{checkpoint['epoch']}, "
        f"sha256 {checkpoint['sha256'][:12]}; {data['spec']} ({data['split']}), protocol "
        f"{report['protocol']}",
        "",
        f"{'direction':<15}{'metric':<13}{'value':>8}  {'95 % interval':<18}{'chance':>8}"
        f"{'queries':>9}{'pool':>7}",
    ]
    for row in report["retrieval"]:
        scale = 1 if row["metric"] == "median rank" else 100
        interval = f"[{row['low'] * scale:.1f}, {row['high'] * scale:.1f}]"
        lines.append(
            f"{row['direction']:<15}{row['metric']:<13}{row['value'] * scale:>8.1f}  {interval:<18}"
            f"{row['chance'] * scale:>8.1f}{row['queries']:>9}{row['candidates']:>7}"
        )
    if "ceilings" in report:
        for name, values in report["ceilings"].items():
            shown = "  ".join(f"{k} {100 * v:.1f}" for k, v in values.items())
            lines.append(f"ceiling, {name.replace('_', '-')} model, image-to-text: {shown}")
        accuracy = report["category_accuracy"]
        if accuracy is not None:
            lines.append(
                f"zero-shot category accuracy {100 * accuracy['value']:.1f} "
                f"[{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}], "
                f"chance {100 * accuracy['chance']:.1f}, n = {accuracy['n']} one-object scenes"
            )
    lines.append(
        "ties (identical captions) count against the model; intervals: bootstrap over pictures of "
        "this one model, without any spread over seeds"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
