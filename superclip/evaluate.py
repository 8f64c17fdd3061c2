"""`python -m superclip.evaluate`: what checkpoints can do, with intervals and chance levels; and
whether one does better than another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superclip.errors import UserError, check_writable, replace_text, run_command
from superclip.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from superclip.evaluation.measures import Result
    from superclip.evaluation.tasks import Evaluation
    from superclip.model.weights import Checkpoint

DESCRIPTION = """What a checkpoint can do on held-out data, each number with n, a bootstrap 95 %
interval over pictures and the chance level. With no flags: the newest checkpoint under logs/ on its
own held-out split; writes eval_SPLIT.json beside it.

With --against, two arms on the same pictures: difference, interval, p-value and power, over
pictures and, where an arm has several checkpoints, over their seeds. "Better" is said only where
the interval says so and there are seeds enough (6 pairs, or 4 a side of unlike seeds).

  python -m superclip.evaluate --ckpt a/seed*/final_epoch.pt --against b/seed*/final_epoch.pt
  python -m superclip.evaluate --zeroshot imagenet/val --probe imagenet/train
  python -m superclip.evaluate --val-data coco:data/coco --protocol coco-5k
  python -m superclip.evaluate --model ViT-B-32-quickgelu --pretrained openai --val-data coco:DIR
"""


def main(argv: list[str]) -> None:
    """Parse, evaluate, print, write."""
    from superclip.flags import parse

    config = parse(EvalConfig, argv, "python -m superclip.evaluate", DESCRIPTION)
    if config.against is not None:
        compare_arms(config)
    else:
        evaluate(config)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure one checkpoint; print and write its report.

    Raises:
        UserError: if checkpoint or data are missing or unusable, or the report is there already;
            nothing is measured before all of that is known.
    """
    from superclip.evaluation.tables import SCHEMA, result_lines, rows_of
    from superclip.evaluation.tasks import Evaluation
    from superclip.ops.world import choose_device

    if len(config.ckpt) > 1:
        raise UserError(
            f"--ckpt names {len(config.ckpt)} files; one at a time, or two arms with --against"
        )
    evaluation = Evaluation(config, choose_device(config.device))
    path = _default_ckpt(config)
    if path is None:
        weights = re.sub(r"[^\w.-]+", "-", f"{config.model}-{config.pretrained}")
        default = Path(f"eval_{weights}_{_name(config)}.json")
    else:
        default = path.with_name(f"eval_{_name(config)}.json")
    out = _claimed(config, default)
    _refuse_idle_model(config, [path])
    checkpoint = _open(config, path)
    ready = evaluation.prepare(checkpoint)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "checkpoint": _facts(checkpoint),
        "bootstrap_draws": config.bootstrap,
        "results": [],
    }
    print(_headline(checkpoint))
    for found in evaluation.run(checkpoint, ready):
        told = {
            "task": found.task,
            "data": found.data,
            "rows": rows_of(found, config.bootstrap),
            "notes": found.notes,
        }
        report["results"].append(told)
        print("", *result_lines(told), sep="\n", flush=True)
    print(
        "\nties count against the model; intervals: bootstrap over pictures of this one model, "
        "without any spread over seeds"
    )
    replace_text(out, json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")
    return report


def compare_arms(config: EvalConfig) -> dict[str, Any]:
    """Measure two arms on the same pictures; print and write what may be said of them.

    Raises:
        UserError: if an arm is not one recipe, or the arms are to see different pictures; nothing
            is measured before that is known.
    """
    from superclip.evaluation.tables import SCHEMA, difference_lines, differences_of
    from superclip.evaluation.tasks import (
        Evaluation,
        refuse_unlike_data,
        seeds_of_one_recipe,
        share_initial_weights,
    )
    from superclip.ops.world import choose_device

    assert config.against is not None
    evaluation = Evaluation(config, choose_device(config.device))
    mine = config.ckpt or (_default_ckpt(config),)
    _refuse_idle_model(config, [*mine, *config.against])
    arms = [[_header(config, path) for path in paths] for paths in (mine, config.against)]
    for arm, flag in zip(arms, ("--ckpt", "--against")):
        seeds_of_one_recipe(arm, flag)
        arm.sort(key=lambda c: -1 if c.config is None else c.config.seed)
    shas = [[c.sha256 for c in arm] for arm in arms]
    if set(shas[0]) & set(shas[1]):
        raise UserError("--ckpt and --against share a checkpoint; nothing to compare")
    asked = _asked(config) | {"split": config.split}
    tag = hashlib.sha256(json.dumps([shas, asked]).encode()).hexdigest()[:8]
    out = _claimed(config, arms[0][0].path.with_name(f"compare_{tag}.json"))
    refuse_unlike_data([evaluation.prepare(c) for arm in arms for c in arm])
    paired = share_initial_weights(*arms)
    results = [[_measured(config, evaluation, c) for c in arm] for arm in arms]
    rows = differences_of(results[0], results[1], paired, config.effect or 2.0, config.bootstrap)
    for name, arm in zip(("first", "second"), arms):
        print(f"{name}: {_recipe(arm[0])}, {len(arm)} checkpoint(s)")
        for checkpoint in arm:
            print(f"  seed {_seed(checkpoint)}: {_file(checkpoint)}")
    seeds = "pictures" if len(arms[0]) == len(arms[1]) == 1 else "seeds and pictures"
    pairing = "pairs of equal seed and initial weights" if paired else "arms of unlike seeds"
    print(f"{pairing}; tested over {seeds}: {results[0][0][0].data['name']}\n")
    print(*difference_lines(rows), sep="\n")
    if rows[0]["exact"] is not None:
        print("t takes the spread over seeds for normal, relabelling them does not")
    print(
        "\n80 % at: the true difference that this test finds in 80 % of cases; power(x): the "
        "chance to find a true x; -: not to be told.\nintervals are of each row alone; Holm "
        "adjusts p for all rows, and only what it leaves is called better or worse."
    )
    if any("descriptive" in row["verdict"] for row in rows):
        print("descriptive: of recipes, 6 pairs of seeds or 4 a side of unlike seeds can tell.")
    report = {
        "schema": SCHEMA,
        "first": [_facts(c) for c in arms[0]],
        "second": [_facts(c) for c in arms[1]],
        "paired": paired,
        "bootstrap_draws": config.bootstrap,
        "data": {found.task: found.data for found in results[0][0]},
        "values": {
            f"{found.task} {measure.name}": [
                [r[t].measures[m].statistic.value for r in arm] for arm in results
            ]
            for t, found in enumerate(results[0][0])
            for m, measure in enumerate(found.measures)
        },
        "differences": rows,
    }
    replace_text(out, json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")
    return report


def _measured(config: EvalConfig, evaluation: Evaluation, header: Checkpoint) -> list[Result]:
    print(f"measuring {header.path}", flush=True)
    plain = header.config is None and config.pretrained is not None
    checkpoint = _open(config, None if plain else header.path)
    return list(evaluation.run(checkpoint, evaluation.prepare(checkpoint)))


def _default_ckpt(config: EvalConfig) -> Path | None:
    """The file to look at; None for a published tag."""
    from superclip.model.weights import newest_checkpoint

    if config.ckpt:
        return config.ckpt[0]
    return None if config.pretrained is not None else newest_checkpoint(Path("logs"))


def _open(config: EvalConfig, path: Path | None) -> Checkpoint:
    from superclip.model.weights import load_plain, open_checkpoint

    if path is None:
        return load_plain(str(config.model), config.pretrained)
    return open_checkpoint(path, config.model)


def _header(config: EvalConfig, path: Path | None) -> Checkpoint:
    """What is known of a checkpoint, its weights given up: twelve models need not fit at once."""
    checkpoint = _open(config, path)
    checkpoint.model.to("meta")
    return checkpoint


def _refuse_idle_model(config: EvalConfig, paths: Sequence[Path | None]) -> None:
    """--model beside files that all say themselves what they are would mislead."""
    from superclip.model.weights import brings_config

    known = [p is not None and p.suffix != ".safetensors" and brings_config(p) for p in paths]
    if config.model is not None and all(known):
        raise UserError(
            f"{paths[0]} brings its own configuration and preprocessing; leave --model out"
        )


def _asked(config: EvalConfig) -> dict[str, str]:
    """Options that decide the numbers and are not at their default."""
    free = {"ckpt", "against", "split", "out", "overwrite", "device", "batch_size", "workers"}
    default = EvalConfig()
    names = [n for n in vars(config) if n not in free]
    return {n: str(getattr(config, n)) for n in names if getattr(config, n) != getattr(default, n)}


def _name(config: EvalConfig) -> str:
    """Of a report: that of the split, and a hash of what is asked for beyond the default."""
    asked = _asked(config)
    told = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return f"{config.split}-{told}" if asked else config.split


def _claimed(config: EvalConfig, default: Path) -> Path:
    out = config.out or default
    check_writable(out, "--out")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not _is_report(out):
        raise UserError(f"--out {out} is no report of this command; name another file")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists; --overwrite measures anew, --out FILE writes elsewhere")
    return out


def _is_report(path: Path) -> bool:
    """Whether a file is one that this command wrote: nothing else is ever replaced."""
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(held, dict)
        and "bootstrap_draws" in held
        and bool({"results", "differences"} & set(held))
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "file": checkpoint.path.name,
        "sha256": checkpoint.sha256,
        "epoch": checkpoint.epoch,
        "model": checkpoint.facts["model"] if config is None else config.model.name,
        "activation": checkpoint.facts["activation"],
        "loss": None if config is None else config.loss,
        "lr": None if config is None else config.lr,
        "seed": None if config is None else config.seed,
    }


def _seed(checkpoint: Checkpoint) -> str:
    return "unknown" if checkpoint.config is None else str(checkpoint.config.seed)


def _headline(checkpoint: Checkpoint) -> str:
    return f"{_recipe(checkpoint)}, {_file(checkpoint)}"


def _recipe(checkpoint: Checkpoint) -> str:
    told = _facts(checkpoint)
    recipe = f"{told['loss']} lr {told['lr']:g}, " if told["loss"] else ""
    return f"{recipe}{told['model']} ({told['activation']})"


def _file(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path} epoch {checkpoint.epoch}, sha256 {checkpoint.sha256[:12]}"


if __name__ == "__main__":
    run_command(main)
