"""`python -m superclip.scaling_law`: does a larger tower lose less by fewer image tokens?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superclip.config import ImageReduction
from superclip.errors import UserError, check_writable, nearest, replace_text, run_command
from superclip.flags import parse, parse_train
from superclip.study import BAND, SHOWN, Arm, Study, StudyConfig, over_seeds

DESCRIPTION = """Train towers of several sizes at several numbers of image tokens and equal samples
seen, and ask whether the drop from all tokens to the fewest shrinks with size (the inverse scaling
law of CLIPA, Li et al., NeurIPS 2023). What stands after -- goes to every superclip.train; a second
stage at full length, as the paper has it, by --stage-two there:

  python -m superclip.scaling_law --seeds 6 --tune 3 -- --loss clip --train-num-samples 28800

--models are given from small to large. Done runs are kept: the same command goes on."""


@dataclass(frozen=True)
class LawConfig(StudyConfig):
    """What `superclip.scaling_law` trains."""

    models: tuple[str, ...] = ("scenes-vit-s", "scenes-vit-m", "scenes-vit")
    """Towers, from small to large: at least three to speak of a law."""
    reductions: tuple[str, ...] = ("random:0.75", "random:0.5")
    """--image-reduction of the arms beside the one with all tokens, from many tokens to few."""
    tune_lengths: bool = True
    """--no-tune-lengths: search a model's rate with all tokens and keep it for its shorter lengths,
    as CLIPA's recipes do."""
    measure: str = "average"
    """What is judged: average (of all that is measured), TR@1, IR@1, top-1."""
    out: Path = Path("logs/law")
    """Folder of all runs, of law.json and of law.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("models", "reductions"):
            given = [part for item in getattr(self, name) for part in item.split(",") if part]
            object.__setattr__(self, name, tuple(given))
            if len(dict.fromkeys(given)) < len(given) or not given:
                raise UserError(f"--{name} {' '.join(given)}: name each once, and at least one")
        if not self.tune_lengths and not self.tune:
            raise UserError("--no-tune-lengths goes with --tune N")
        if self.measure not in (known := [*SHOWN.values(), "average"]):
            raise UserError(f"--measure {self.measure}: {nearest(self.measure, known)}")
        for text in self.reductions:
            ImageReduction.parse(text)


@dataclass(frozen=True)
class Point:
    """One arm's place on the plot.

    Attributes:
        tokens: image tokens, the class token among them.
        operations: of a pair in training (`superclip.cost`).
    """

    arm: Arm
    model: str
    tokens: int
    operations: float


def main(argv: list[str]) -> None:
    """Parse, search rates, train, measure, write."""
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        config = parse(LawConfig, argv[:end], "python -m superclip.scaling_law", DESCRIPTION)
    except UserError as error:
        own = str(error).startswith("unknown option")
        hint = "; options of superclip.train stand after --" if own else ""
        raise UserError(f"{error}{hint}") from None
    check_writable(config.out / "law.json", "--out")
    shared, own = argv[end + 1 :], ("--model", "--image-reduction")
    points = family(config, shared)
    study = Study(config, config.out, [point.arm for point in points], shared, own)
    rates: dict[Arm, float | None] = {}
    whole: dict[str, float | None] = {}
    for point in points:
        if point.arm.against is None or config.tune_lengths:
            whole[point.model] = study.rate(point.arm)
        rates[point.arm] = whole[point.model]
    report = judged(study.compared(rates), points, config)
    print("\n".join(lines(report)))
    replace_text(config.out / "law.json", json.dumps(report, indent=1) + "\n")
    plot(report, config.out / "law.png")
    print(f"\nwritten: {config.out}/law.json, law.png")


def family(config: LawConfig, shared: Sequence[str] = ()) -> list[Point]:
    """Every size with every number of tokens, all of them first.

    Args:
        shared: flags of every superclip.train, whose recipe or file may say more of the model.

    Raises:
        UserError: for a model that can't be counted, an order that is none, or masks that leave
            what another leaves.
    """
    from superclip.cost import counted

    points: list[Point] = []
    for model in config.models:
        own: list[Point] = []
        for reduction in (None, *config.reductions):
            words = "--model", model, "--image-reduction", str(reduction)
            stage = counted(model, parse_train([*shared, *words]).model, 1)
            name = f"{model}, {stage.image_tokens} tokens"
            against = own[0].arm.name if own else None
            arm = Arm(name, words, against=against)
            own.append(Point(arm, model, stage.image_tokens, stage.training))
        tokens = [point.tokens for point in own]
        if tokens != sorted(set(tokens), reverse=True):
            raise UserError(
                f"--reductions give {model} {tokens} tokens; order them from many to few"
            )
        points += own
    sizes = [point.operations for point in points if point.arm.against is None]
    if sizes != sorted(sizes):
        raise UserError("--models: name them from small to large")
    return points


def judged(report: Mapping[str, Any], points: Sequence[Point], config: LawConfig) -> dict[str, Any]:
    """The report with every size's drop, and the differences between drops.

    Raises:
        UserError: if the measure was not taken.
    """
    from superclip.evaluation.tables import adjust

    arms = report["arms"]
    if config.measure not in next(iter(arms.values()))["values"]:
        known = ", ".join(next(iter(arms.values()))["values"])
        raise UserError(f"--measure {config.measure} was not taken; there are {known}")
    values = {p.arm.name: arms[p.arm.name]["values"][config.measure] for p in points}
    drops: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    for model in config.models:
        own = [point for point in points if point.model == model]
        full, short = values[own[0].arm.name], values[own[-1].arm.name]
        drops[model] = [a - b for a, b in zip(full, short, strict=True)]
        if config.seeds > 1:
            rows.append({"what": f"drop of {model}"} | over_seeds(full, short))
    if config.seeds > 1 and len(config.models) > 1:
        small, large = config.models[0], config.models[-1]
        rows.append(
            {"what": f"drop of {small} minus drop of {large}"}
            | over_seeds(drops[small], drops[large])
        )
        adjust(rows)
    return {
        **report,
        "measure": config.measure,
        "drops": drops,
        "law": rows,
        "points": [
            {"arm": p.arm.name, "model": p.model, "tokens": p.tokens, "operations": p.operations}
            for p in points
        ],
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The table, the drops, and what may be said."""
    from superclip.evaluation.tables import aligned, shown

    measure = report["measure"]
    table = [["model", "tokens", "GFLOPs a pair", "of all tokens'", "lr", "mean (SD)"]]
    whole: dict[str, float] = {}
    for point in report["points"]:
        held = report["arms"][point["arm"]]
        values = [100 * v for v in held["values"][measure]]
        spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
        cost = point["operations"]
        share = cost / whole.setdefault(point["model"], cost)
        own = [point["model"], str(point["tokens"]), f"{cost / 1e9:.3g}", f"{share:.0%}"]
        table.append([*own, f"{held['lr']:g}", f"{statistics.fmean(values):.1f}{spread}"])
    told = [f"{measure}, %", *aligned(table, "<" + ">" * 5), ""]
    for row in report["law"]:
        band = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[k] for k in BAND))
        adjusted = f", Holm {shown(row['p_holm'])}" if "p_holm" in row else ""
        told.append(f"{row['what']}: {band} points, p {shown(row['p'])}{adjusted}")
    told.append(verdict(report))
    told.append(f"{report['seeds']} seed(s) an arm, t over seeds, 95 % intervals")
    told += report["unlike"]
    for arm, search in report["searches"].items():
        if search["at_end"]:
            told.append(f"{arm}: the best rate lies at the end of its search")
    if report["tuned_on"] and len(report["searches"]) < len(report["points"]):
        told.append("rates searched with all tokens, model by model, and kept for fewer")
    if report["tuned_on"] is None:
        told.append("learning rates were not tuned (--tune N): sizes and lengths want their own")
    return told


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the drop shrinks with size here."""
    if not report["law"] or "minus" not in report["law"][-1]["what"]:
        return "one size or one seed: nothing can be said of a law"
    last, few = report["law"][-1], report["seeds"] < 6
    count = len(report["drops"])
    if few:
        return "descriptive: fewer than six seeds decide nothing"
    if last["p_holm"] < 0.05 and last["low"] > 0:
        way = "shrinks with size here" if count > 2 else "is smaller in the larger of the two here"
    elif last["p_holm"] < 0.05 and last["high"] < 0:
        way = "grows with size here, against the law"
    else:
        return "no difference between the drops of the smallest and the largest is established here"
    return f"the drop from all tokens to the fewest {way}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The measure against tokens and against operations; every seed a point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure((9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for colour, model in zip((f"C{k}" for k in range(10)), report["drops"]):
        own = [point for point in report["points"] if point["model"] == model]
        held = [report["arms"][p["arm"]]["values"][report["measure"]] for p in own]
        values = [[100 * v for v in column] for column in held]
        for axis, xs in zip(
            axes, ([p["tokens"] for p in own], [p["operations"] / 1e9 for p in own]), strict=True
        ):
            means = [statistics.fmean(v) for v in values]
            axis.plot(xs, means, "-", color=colour, label=model)
            for x, column in zip(xs, values):
                axis.plot([x] * len(column), column, "o", color=colour, alpha=0.5, markersize=3.5)
    axes[0].set_xlabel("image tokens, class token included")
    axes[1].set_xlabel("GFLOPs a pair, trained")
    axes[1].set_xscale("log")
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].xaxis.set_minor_formatter("")
    axes[0].set_ylabel(f"{report['measure']}, %")
    axes[0].legend(frameon=False)
    figure.suptitle(f"equal samples seen; {report['seeds']} seed(s) an arm", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
