"""`python -m interp.sweep`: which attention head looks at the objects?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from interp.config import SweepConfig, is_pattern
from superclip.errors import UserError, check_writable, replace_text, run_command

if TYPE_CHECKING:
    from interp.analysis import Findings
    from interp.results import SweepResults
    from interp.stats.intervals import Interval

DONE = "findings.json"
"""Written last."""

DESCRIPTION = """Score every attention head of a vision tower against object boxes. Discovery
pictures choose the champion, validation pictures judge it; confirm pictures are set aside for
hypotheses. With no flags: the newest checkpoint under logs/ on its own held-out data. Writes
results.npz, results.json, heads.csv and findings.json; python -m interp.report turns them into a
page. A quoted pattern, --ckpt 'logs/step_*.pt', sweeps a run's checkpoints and says when grounding
appears, and in which layer (course.json)."""


def main(argv: list[str]) -> None:
    """Parse, collect (or load what stands), judge, print."""
    from superclip.flags import parse

    config = parse(SweepConfig, argv, "python -m interp.sweep", DESCRIPTION)
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if is_pattern(config.ckpt):
        sweep_course(config)
        return
    results, findings, out = sweep_one(config)
    print(render(results, findings))
    print(f"\nwritten: {out}/results.npz, results.json, findings.json, heads.csv")


def sweep_one(config: SweepConfig) -> tuple[SweepResults, Findings, Path]:
    """Collect, judge and write one checkpoint's sweep.

    Raises:
        UserError: if the folder holds results already, or as `collect`.
    """
    from interp.analysis import analyse, plain
    from interp.collect import collect
    from interp.results import SweepResults
    from interp.subject import default_folder, open_pictures, open_subject, trained_ids
    from superclip.model.weights import newest_checkpoint
    from superclip.ops.world import choose_device

    device = choose_device(config.device)
    ckpt = config.ckpt
    if ckpt is None and config.model is None:
        ckpt = newest_checkpoint(Path("logs"))
    out = config.out or default_folder(ckpt, config.kind)
    check_writable(out, "--out")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if is_swept(out) and not config.overwrite:
        raise UserError(
            f"{out} holds results; --overwrite replaces them, --out FOLDER writes elsewhere, "
            f"python -m interp.report {out} shows them"
        )
    subject, run = open_subject(ckpt, config.model, config.pretrained)
    source, rows = open_pictures(config.data, config.root, config.split, config.num, run)
    if (out / "results.json").exists() and not config.overwrite:  # cut short while judging
        results = standing(out, config, subject.facts["sha256"], source.digest)
    else:
        trained_on = trained_ids(run, config.allow_trained)
        collect(subject, source, rows, trained_on, config, device).save(out)
        results = SweepResults.load(out)
    findings = analyse(results)
    write_csv(findings, out / "heads.csv")
    replace_text(out / DONE, json.dumps(plain(findings), indent=1, sort_keys=True) + "\n")
    return results, findings, out


def is_swept(folder: Path) -> bool:
    """Whether a sweep stands there from the first picture to the last verdict."""
    return (folder / "results.json").exists() and (folder / DONE).exists()


def standing(folder: Path, config: SweepConfig, sha256: str, pictures: str) -> SweepResults:
    """The results in a folder, if they are what is asked for now.

    Args:
        sha256: of the checkpoint. pictures: digest of the data.

    Raises:
        UserError: naming the first thing that is another one there.
    """
    from interp.results import SweepResults

    results = SweepResults.load(folder)
    held = results.manifest
    for what, there, asked in (
        ("checkpoint", held["checkpoint"]["sha256"], sha256),
        ("--kind", held["kind"], config.kind),
        ("--num", held["data"]["num"], config.num),
        ("--gallery", len(results.gallery_rows), min(config.gallery, len(results.split))),
        ("--seed", held["seed"], config.seed),
        ("--draws", held["draws"], config.draws),
        ("--allow-trained", held["trained_pictures_allowed"], config.allow_trained),
        ("--metric", "legacy_mass" in results.metrics, config.metric == "legacy-mass"),
        ("--untrained", len(held["untrained"]) >= config.untrained, True),
        ("set of pictures", held["data"]["sha256"], pictures),
    ):
        if there != asked:
            raise UserError(
                f"{folder} holds a sweep with another {what} than asked for; --overwrite replaces "
                "it"
            )
    return results


def sweep_course(config: SweepConfig) -> None:
    """Sweep a run's checkpoints one after another; those that stand are not swept again."""
    from interp import timeline
    from interp.subject import default_folder, open_pictures, open_subject

    if config.out is not None or config.model is not None:
        raise UserError("--out and --model go with one checkpoint; a pattern writes beside each")
    assert config.ckpt is not None
    checkpoints = timeline.numbered(config.ckpt)
    steps, sweeps = [step for step, _ in checkpoints], []
    path = config.ckpt.parent / f"course{'' if config.kind == 'class' else '-' + config.kind}.json"
    timeline.refuse_other_course(path, steps, config.overwrite)
    for step, ckpt in checkpoints:
        folder = default_folder(ckpt, config.kind)
        # Untrained towers are the same for all: the last one's serve.
        towers = config.untrained if ckpt == checkpoints[-1][1] else 0
        one = replace(config, ckpt=ckpt, untrained=towers)
        if is_swept(folder) and not config.overwrite:
            subject, run = open_subject(ckpt)
            source, _ = open_pictures(config.data, config.root, config.split, config.num, run)
            sweeps.append(standing(folder, one, subject.facts["sha256"], source.digest))
        else:
            print(f"step {step}: {ckpt}", flush=True)
            sweeps.append(sweep_one(one)[0])
    course = timeline.grounding(steps, sweeps, config.draws)
    replace_text(path, json.dumps(course, indent=1, sort_keys=True) + "\n")
    print(timeline.render(course, 99))
    print(f"\nwritten: {path}, and the sweep of each checkpoint beside it")


def write_csv(findings: Findings, path: Path) -> None:
    """One row a head."""
    import pandas as pd

    pd.DataFrame(findings.heads).to_csv(path, index=False, float_format="%.6g")


def render(results: SweepResults, findings: Findings) -> str:
    """The findings as text."""
    from textwrap import wrap

    from interp.render.words import answer

    manifest, verdict, head = results.manifest, findings.verdict, findings.champion
    checkpoint, tower, counts = manifest["checkpoint"], manifest["tower"], manifest["counts"]
    discovery = float(verdict.discovery.mean[head.layer, head.index])
    significant = int((verdict.discovery.p_adjusted <= 0.05).sum())
    lines = [
        f"{checkpoint['loss']} {checkpoint['model']} ({tower['activation']}), sha256 "
        f"{checkpoint['sha256'][:12]}: "
        f"{tower['layers']} x {tower['heads']} heads, attention of the {_query(manifest['kind'])}",
        f"{manifest['data']['name']}: "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items()),
        f"discovery: {significant} of {verdict.discovery.t.size} heads significant at .05 (max-T, "
        f"{verdict.discovery.draws} permutations, n = {verdict.discovery.n})",
        "",
        *wrap(answer(results, findings)[0], 100),
        "",
        f"champion {head}, chosen on discovery by excess attention over its own prior",
        f"  excess      discovery {discovery:.4f}, validation {_show(verdict.validation[0], 4)}, "
        f"shrinkage {verdict.shrinkage:.4f}",
        f"  p           {verdict.p[0]:.4g} (one-sided pairing permutation, validation)",
        f"  in-box mass {_show(findings.mass)} (uniform {findings.area.estimate:.3f}); enrichment "
        f"{_show(findings.enrichment, 2)}",
        f"  AUROC       {_show(findings.auroc)} (chance .5); pointing {_show(findings.pointing)} "
        f"(chance {findings.pointing_chance:.3f})",
        f"  stability   first in {verdict.p_first[head.layer, head.index]:.0%}, among the first "
        "five in "
        f"{verdict.p_top[head.layer, head.index]:.0%} of discovery resamples",
        f"  class-token mass {_show(findings.class_mass)}, sink share {_show(findings.sink_mass)}",
    ]
    if findings.selectivity is not None:
        lines.append(
            f"  selectivity {_show(findings.selectivity)} (objects against objects and clutter)"
        )
    lines += ["", "five best of discovery, on validation:"]
    lines += [
        f"  {h!s:<8} excess {_show(v, 4)}  p {p:.4g}  Holm {q:.4g}"
        for h, v, p, q in zip(verdict.top, verdict.validation, verdict.p, verdict.p_holm)
    ]
    lines += [
        "",
        f"{'baseline (validation)':<62}{'mass':>7}{'enrich.':>9}  champion minus baseline",
    ]
    for row in findings.baselines:
        selectivity = ""
        if row.selectivity is not None and row.selectivity_difference is not None:
            selectivity = (
                f"; selectivity {row.selectivity.estimate:.3f}, difference "
                f"{_show(row.selectivity_difference)}"
            )
        lines.append(
            f"  {row.name:<60}{row.mass.estimate:>7.3f}{row.enrichment.estimate:>9.2f}  "
            f"{row.difference_in} {_show(row.difference, 4)}{selectivity}"
        )
    if "legacy_mass" in results.metrics:
        lines += ["", _legacy(results, findings)]
    lines += [
        "",
        "A significant head means: its attention covaries with where this picture's boxes are. "
        "That training made it",
        "so is said only by the contrast with untrained towers; that the model uses it, only by "
        "ablation.",
    ]
    return "\n".join(lines)


def _query(kind: str) -> str:
    return "class token" if kind == "class" else "patches (mean over patch queries)"


def _show(interval: Interval, digits: int = 3) -> str:
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _legacy(results: SweepResults, findings: Findings) -> str:
    """The small study's table beside the sound one: same maximum over heads on all pictures, no
    correction."""
    import numpy as np

    from interp.heads import Head

    mean = results.metrics["legacy_mass"].mean(axis=0)
    best = Head(*(int(i) for i in np.unravel_index(mean.argmax(), mean.shape)))
    rank = int((mean > mean[findings.champion.layer, findings.champion.index]).sum()) + 1
    return (
        f"legacy mass (squashed picture, union of boxes, centre-in-box, best of {mean.size} on all "
        f"{len(results.split)} pictures, no test): {best} {mean.max():.3f}; the champion "
        f"{findings.champion} has "
        f"{mean[findings.champion.layer, findings.champion.index]:.3f} (rank {rank})"
    )


if __name__ == "__main__":
    run_command(main)
