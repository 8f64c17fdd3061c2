"""`python -m superclip.compare`: losses and optimizers at equal budget, each at its own learning
rate, with seeds as the outer level."""

from __future__ import annotations

import dataclasses
import json
import statistics
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superclip.config import OptimConfig
from superclip.errors import UserError, check_writable, nearest, replace_text, run_command
from superclip.loss_options import LOSS_OPTIONS
from superclip.study import BAND, Arm, Study, StudyConfig

DESCRIPTION = """Train every loss with every optimizer from several seeds, at equal budget, and set
each beside CLIP: image-to-text and text-to-image R@1, zero-shot top-1 and their average, mean and
standard deviation over seeds, and the paired difference with Holm's adjustment. What stands after
-- goes to every superclip.train:

  python -m superclip.compare --losses clip,sogclr,fastclip-v3 --seeds 6 --tune 3 \\
      -- --train-num-samples 9600 --epochs 4

--tune N searches each arm's learning rate on held-out data that the comparison never sees; one rate
for all losses is no comparison. Done runs are kept: the same command goes on."""


@dataclass(frozen=True)
class GridConfig(StudyConfig):
    """What `superclip.compare` sets side by side."""

    losses: tuple[str, ...] = ("clip", "superclip")
    """Losses, with commas or blanks between them."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Optimizers, each with every loss."""
    set: tuple[str, ...] = ()
    """Options of single losses or optimizers, as NAME.option=value: fastclip-v3.rho=8.5 sgd.wd=1e-4
    sgd.momentum=0.95."""
    against: str = "clip"
    """The loss that the others are compared with."""
    out: Path = Path("logs/compare")
    """Folder of all runs, of compare.json and of compare.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("losses", "optimizers"):
            given = [part for item in getattr(self, name) for part in item.split(",") if part]
            object.__setattr__(self, name, tuple(given))
            if len(dict.fromkeys(given)) < len(given) or not given:
                raise UserError(f"--{name} {' '.join(given)}: name each once, and at least one")
        for loss in self.losses:
            if loss not in LOSS_OPTIONS:
                raise UserError(f"--losses: {loss!r} is unknown; {nearest(loss, LOSS_OPTIONS)}")
        known = typing.get_args(typing.get_type_hints(OptimConfig)["optimizer"])
        for optimizer in self.optimizers:
            if optimizer not in known:
                raise UserError(
                    f"--optimizers: {optimizer!r} is unknown; {nearest(optimizer, known)}"
                )
        for item in self.set:
            name, _, option = item.partition(".")
            if name not in (*self.losses, *self.optimizers) or "=" not in option:
                raise UserError(
                    f"--set {item}: write NAME.option=value, for one of --losses or --optimizers"
                )
            known = {"lr_tau", "lr_tau_schedule", "init_scale"}  # what is no budget
            if name in self.losses:
                known |= {f.name for f in dataclasses.fields(LOSS_OPTIONS[name])}
            else:
                known = {"wd", "momentum", "nesterov", "beta1", "beta2", "eps"}
            own = option.partition("=")[0].replace("-", "_")
            if own not in known:
                way_out = nearest(own, known)
                raise UserError(f"--set {item}: {own} is no option of {name}; {way_out}")
        if self.against not in self.losses:
            raise UserError(f"--against {self.against} is not among --losses")

    @property
    def options(self) -> list[tuple[str, str]]:
        """Loss and flag (as name=value) of every `set`."""
        found = []
        for item in self.set:
            loss, _, option = item.partition(".")
            name, _, value = option.partition("=")
            found.append((loss, f"{name.replace('_', '-')}={value}"))
        return found


def main(argv: list[str]) -> None:
    """Parse, search rates, train, measure, write."""
    from superclip.flags import parse

    end = argv.index("--") if "--" in argv else len(argv)
    config = parse(GridConfig, argv[:end], "python -m superclip.compare", DESCRIPTION)
    study = grid(config, argv[end + 1 :])
    rates = {arm: study.rate(arm) for arm in study.arms}
    report = {"against": config.against, "without_memory": without_memory(study, config)}
    report |= study.compared(rates)
    print("\n".join(lines(report)))
    replace_text(config.out / "compare.json", json.dumps(report, indent=1) + "\n")
    plot(report, config.out / "compare.png")
    print(f"\nwritten: {config.out}/compare.json, compare.png")


def named(loss: str, optimizer: str) -> str:
    """An arm's name."""
    return loss if optimizer == "adamw" else f"{loss}+{optimizer}"


def grid(config: GridConfig, shared: Sequence[str]) -> Study:
    """Every loss with every optimizer.

    Raises:
        UserError: as `Study`.
    """
    check_writable(config.out / "compare.json", "--out")
    arms = []
    for optimizer in config.optimizers:
        for loss in config.losses:
            own = [f"--{item}" for name, item in config.options if name in (loss, optimizer)]
            words = "--loss", loss, "--optimizer", optimizer, *own
            against = None if loss == config.against else named(config.against, optimizer)
            arms.append(Arm(named(loss, optimizer), words, optimizer, against))
    return Study(config, config.out, arms, shared, ("--loss", "--optimizer"))


def without_memory(study: Study, config: GridConfig) -> list[str]:
    """Losses whose moving averages would never be used."""
    if study.first.epochs > 1:
        return []
    return [loss for loss in config.losses if LOSS_OPTIONS[loss].keeps_samples]


def lines(report: Mapping[str, Any]) -> list[str]:
    """The table, and what may be said."""
    from superclip.evaluation.tables import aligned, shown

    names = list(next(iter(report["arms"].values()))["values"])
    rows = {(row["arm"], row["measure"]): row for row in report["differences"]}
    table = [["arm", "lr", *(f"{n}, mean (SD)" for n in names), *(f"d {n}" for n in names)]]
    for arm, held in report["arms"].items():
        cells = [arm, f"{held['lr']:g}"]
        for name in names:
            values = [100 * v for v in held["values"][name]]
            spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        for name in names:
            row = rows.get((arm, name))
            found = "{:+.1f} [{:+.1f}, {:+.1f}]"
            cells.append("-" if row is None else found.format(*(100 * row[k] for k in BAND)))
        table.append(cells)
    n = ", ".join(f"{task} on {d.get('name')}" for task, d in report["data"].items())
    told = [*aligned(table, "<" + ">" * (len(table[0]) - 1)), ""]
    told.append(
        f"{report['seeds']} seed(s) an arm; {n}; d: minus {report['against']}, 95 % interval"
    )
    for row in report["differences"]:
        said = f"{row['arm']}, {row['measure']}: p {shown(row['p'])}, Holm {shown(row['p_holm'])}"
        told.append(f"  {said}: {row['verdict']}")
    told.append("average: tested over seeds alone; the rest over seeds and pictures")
    told += report.get("unlike", [])
    if idle := report.get("without_memory"):
        told.append(
            f"one pass over the data: {', '.join(idle)} saw every sample once, so that no moving "
            "average was ever used; take fewer pictures and more --epochs"
        )
    for arm, search in report.get("searches", {}).items():
        if search["at_end"]:
            told.append(f"{arm}: the best rate lies at the end of its search")
    if report["tuned_on"] is None:
        told.append(
            "learning rates were not tuned (--tune N): this compares rates as much as losses"
        )
    return told


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Every seed a point, the mean a bar, measure by measure."""
    from matplotlib.figure import Figure

    arms = report["arms"]
    names = list(next(iter(arms.values()))["values"])
    figure = Figure((3.2 * len(names), 1.2 + 0.32 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names):
        for k, held in enumerate(arms.values()):
            values = [100 * v for v in held["values"][name]]
            axis.plot(values, [k] * len(values), "o", color="#1f6fb2", alpha=0.6, markersize=4)
            axis.plot([statistics.fmean(values)], [k], "|", color="black", markersize=14)
        reference = [100 * v for v in arms[report["against"]]["values"][name]]
        axis.axvline(statistics.fmean(reference), color="gray", linewidth=0.8)
        axis.set_title(f"{name}, %", fontsize=10)
        axis.set_yticks(range(len(arms)), list(arms))
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{report['seeds']} seed(s) an arm; line: mean of {report['against']}", fontsize=9
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
