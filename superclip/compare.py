"""`python -m superclip.compare`: losses and optimizers at equal budget, each at its own learning
rate, with seeds as the outer level."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import threading
import typing
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superclip.config import (
    EvalConfig,
    OptimConfig,
    Task,
    TrainConfig,
    is_scenes,
    to_dict,
)
from superclip.errors import UserError, check_writable, nearest, replace_text, run_command
from superclip.flags import parse_train
from superclip.loss_options import LOSS_OPTIONS, at_least_one

if TYPE_CHECKING:
    from superclip.evaluation.measures import Result

DESCRIPTION = """Train every loss with every optimizer from several seeds, at equal budget, and set
each beside CLIP: image-to-text and text-to-image R@1, zero-shot top-1 and their average, mean and
standard deviation over seeds, and the paired difference with Holm's adjustment. What stands after
-- goes to every superclip.train:

  python -m superclip.compare --losses clip,sogclr,fastclip-v3 --seeds 6 --tune 3 \\
      -- --train-num-samples 9600 --epochs 4

--tune N searches each arm's learning rate on held-out data that the comparison never sees; one rate
for all losses is no comparison. Done runs are kept: the same command goes on."""
SCHEMA = 1
DIVERGED = -1.0
"""Score of a rate at which training did not stay finite."""
STEP = 2.0
"""Ratio of neighbouring learning rates of a search."""
MOST_BEYOND = 4
"""Rates tried beyond a search's range while the best lies at its end."""
TUNING_SEED = 1000
"""Of the searches, so that no seed of the comparison was chosen by."""
RATES = {"adamw": 5e-4, "adam": 5e-4, "sgd": 0.1, "lamb": 2e-3, "lion": 1e-4}
"""Middle of a search from scratch; from pretrained weights a tenth of it."""
SHOWN = {"image-to-text R@1": "TR@1", "text-to-image R@1": "IR@1", "top-1": "top-1", "mAP": "mAP"}
"""Measures of the table, and the course of small-batch losses' names for them."""


class Diverged(UserError):
    """A run whose numbers are no longer finite."""


@dataclass(frozen=True)
class GridConfig:
    """What `superclip.compare` sets side by side."""

    losses: tuple[str, ...] = ("clip", "superclip")
    """Losses, with commas or blanks between them."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Optimizers, each with every loss."""
    seeds: int = 6
    """Runs of each arm, from seeds 0, 1, ...: six pairs are the least that can tell anything."""
    tune: int | None = None
    """Learning rates to try for each arm, by factors of 2; more while the best lies at an end."""
    tune_data: str | None = None
    """Held-out data of that search. Default: scenes:tune on scenes."""
    data: str | None = None
    """Training data, spelled like --train-data of superclip.train. Default: scenes."""
    val_data: str | None = None
    """Pictures and captions that judge. Default: the held-out data of --data."""
    zeroshot: str | None = None
    """Labelled pictures that judge. Default: scenes' own on scenes, else none."""
    set: tuple[str, ...] = ()
    """Options of single losses or optimizers, as NAME.option=value: fastclip-v3.rho=8.5 sgd.wd=1e-4
    sgd.momentum=0.95."""
    against: str = "clip"
    """The loss that the others are compared with."""
    jobs: int = 1
    """Runs at a time."""
    launcher: str = "python"
    """What starts a run: 'torchrun --nproc-per-node 8', say."""
    bootstrap: int = 2000
    """Draws of the bootstrap over pictures."""
    device: str = "auto"
    """Where checkpoints are measured."""
    out: Path = Path("logs/compare")
    """Folder of all runs, of compare.json and of compare.png."""

    def __post_init__(self) -> None:
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
        at_least_one(self, "seeds", "tune", "jobs")
        if not self.launcher.strip():
            raise UserError("--launcher is empty; name what starts a run, or leave it out")
        if self.bootstrap < 100:
            raise UserError(f"--bootstrap {self.bootstrap} must be at least 100")
        if self.tune_data is not None and not self.tune:
            raise UserError("--tune-data goes with --tune N")

    @property
    def options(self) -> list[tuple[str, str]]:
        """Loss and flag (as name=value) of every `set`."""
        found = []
        for item in self.set:
            loss, _, option = item.partition(".")
            name, _, value = option.partition("=")
            found.append((loss, f"{name.replace('_', '-')}={value}"))
        return found


@dataclass(frozen=True)
class Arm:
    """A loss with an optimizer."""

    loss: str
    optimizer: str

    def __str__(self) -> str:
        return self.loss if self.optimizer == "adamw" else f"{self.loss}+{self.optimizer}"


def main(argv: list[str]) -> None:
    """Parse, search rates, train, measure, write."""
    from superclip.flags import parse

    end = argv.index("--") if "--" in argv else len(argv)
    config = parse(GridConfig, argv[:end], "python -m superclip.compare", DESCRIPTION)
    grid = Grid(config, argv[end + 1 :])
    rates = {arm: grid.rate(arm) for arm in grid.arms}
    report = grid.compared(rates)
    print("\n".join(lines(report)))
    replace_text(config.out / "compare.json", json.dumps(report, indent=1) + "\n")
    plot(report, config.out / "compare.png")
    print(f"\nwritten: {config.out}/compare.json, compare.png")


class Grid:
    """All runs of a comparison, under one folder.

    Args:
        config: what is compared.
        shared: flags of every superclip.train.

    Raises:
        UserError: for whatever one of the runs would refuse; nothing is trained then.
    """

    def __init__(self, config: GridConfig, shared: Sequence[str]):
        self.config, self.shared = config, [*shared]
        check_writable(config.out / "compare.json", "--out")
        for flag in ("--loss", "--optimizer", "--seed", "--out", "--lr"):
            if any(word.partition("=")[0] == flag for word in shared):
                raise UserError(f"{flag} is the comparison's own; leave it out after --")
        self.arms = [Arm(loss, o) for o in config.optimizers for loss in config.losses]
        if config.against not in config.losses:
            raise UserError(f"--against {config.against} is not among --losses")
        self.searches: dict[str, dict[str, Any]] = {}
        self.facts: dict[Path, dict[str, Any]] = {}
        first = self.parsed(self.arms[0], TUNING_SEED, None, config.out)
        for arm in self.arms:
            self.parsed(arm, TUNING_SEED, None, config.out)
        if first.epochs == 1:
            with_tables = [a for a in config.losses if LOSS_OPTIONS[a].keeps_samples]
        else:
            with_tables = []
        self.without_memory = with_tables
        self.pretrained = not first.model.from_scratch
        self.scenes = is_scenes(first.data.train_data)
        self.dev = config.tune_data or ("scenes:tune" if self.scenes else None)
        if config.tune and self.dev is None:
            raise UserError("--tune needs --tune-data: data that the comparison never sees")
        if config.tune:
            self._refuse_judged(first, str(self.dev))

    def _refuse_judged(self, first: TrainConfig[Any], dev: str) -> None:
        """Raises UserError if rates would be chosen on the pictures that train or judge."""
        from superclip.data.sources import held_out_spec, open_source

        judged = self.config.val_data or first.data.val_data or held_out_spec(first.data.train_data)
        seed, digest = first.data.data_seed, {}
        for what, spec in (("judge", judged), ("train", first.data.train_data), ("tune", dev)):
            digest[what] = open_source(spec, None, seed, held_out=what != "train").digest
        for what in ("judge", "train"):
            if digest[what] == digest["tune"]:
                raise UserError(f"--tune-data {dev} are the pictures that {what}; name others")

    @property
    def launcher(self) -> list[str]:
        """What starts a run; by default this very Python."""
        named = self.config.launcher
        return [sys.executable] if named == "python" else shlex.split(named)

    def words(self, arm: Arm, seed: int, lr: float | None, out: Path) -> list[str]:
        """Flags of one run."""
        own = [f"--{item}" for name, item in self.config.options if name in vars(arm).values()]
        words = [*self.shared, "--loss", arm.loss, "--optimizer", arm.optimizer, *own]
        if self.config.data is not None:
            words += ["--train-data", self.config.data]
        rate = [] if lr is None else ["--lr", f"{lr:g}"]
        return [*words, *rate, "--seed", str(seed), "--out", str(out)]

    def parsed(self, arm: Arm, seed: int, lr: float | None, out: Path) -> TrainConfig[Any]:
        """The configuration that these flags make."""
        return parse_train(self.words(arm, seed, lr, out))

    def train(self, runs: Sequence[tuple[Arm, int, float | None, Path]]) -> None:
        """Train what is not yet done, some side by side.

        Raises:
            Diverged: naming the first run that ended in numbers that are not finite.
            UserError: naming the run that failed, with its last line; no other is begun then.
        """
        failed = threading.Event()

        def one(run: tuple[Arm, int, float | None, Path]) -> None:
            if failed.is_set():
                return
            arm, seed, lr, out = run
            command = [*self.launcher, "-m", "superclip.train", *self.words(*run)]
            done, log = (out.parent / f"{out.name}.{kind}" for kind in ("done", "log"))
            final = out / "final_epoch.pt"
            if final.is_file() and done.is_file() and done.read_text() == shlex.join(command):
                return
            told = f"{arm}, seed {seed}" + ("" if lr is None else f", lr {lr:g}")
            print(f"training {told} -> {out}", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:  # the trainer goes on where it was, or says what differs
                status = subprocess.run(command, stdout=file, stderr=file).returncode
            if status or not final.is_file():
                failed.set()
                last = (log.read_text().strip().splitlines() or ["nothing said"])[-1]
                kind = Diverged if "not finite" in last else UserError
                raise kind(f"{told} did not finish (see {log}): {last}")
            replace_text(done, shlex.join(command))

        with ThreadPoolExecutor(self.config.jobs) as pool:
            list(pool.map(one, runs))

    def rate(self, arm: Arm) -> float | None:
        """The learning rate of an arm: the best of its search, or the trainer's default."""
        if not self.config.tune:
            return None
        middle = RATES[arm.optimizer] / (10 if self.pretrained else 1)
        count = self.config.tune
        rates = [middle * STEP ** (k - (count - 1) // 2) for k in range(count)]
        scores: dict[float, float] = {}
        while True:
            self._search(arm, [lr for lr in rates if lr not in scores], scores)
            best = max(rates, key=lambda lr: scores[lr])
            ends = min(rates), max(rates)
            if best not in ends or len(rates) >= count + MOST_BEYOND:
                break
            rates.append(best / STEP if best == ends[0] else best * STEP)
        told = ", ".join(f"{lr:g} {100 * scores[lr]:.1f}" for lr in sorted(rates))
        at_end = " (the best is at the end of the range)" if best in ends else ""
        if scores[best] < 0:
            raise UserError(f"{arm}: no run of the search stayed finite ({told})")
        self.searches[str(arm)] = {"recalls": scores, "chosen": best, "at_end": best in ends}
        print(f"{arm}: mean recall on {self.dev}: {told}; chosen {best:g}{at_end}", flush=True)
        return best

    def _search(self, arm: Arm, rates: Sequence[float], scores: dict[float, float]) -> None:
        folder = self.config.out / "tune" / str(arm)
        runs = [(arm, TUNING_SEED, lr, folder / f"lr-{lr:g}") for lr in rates]
        self._train_or_score(runs, scores)
        for _, _, lr, out in (run for run in runs if run[2] not in scores):
            (found,) = self.measured(out, EvalConfig(val_data=self.dev, tasks=("retrieval",)))
            recalls = [m.statistic.value for m in found.measures if " R@" in m.name]
            scores[lr] = statistics.fmean(recalls)

    def _train_or_score(
        self, runs: Sequence[tuple[Arm, int, float | None, Path]], scores: dict[float, float]
    ) -> None:
        """Train the runs of a search; one that diverges is the worst, not the end of all."""
        try:
            self.train(runs)
        except Diverged as error:
            print(error, flush=True)
            for run in runs:
                try:
                    self.train([run])
                except Diverged:
                    assert run[2] is not None
                    scores[run[2]] = DIVERGED

    def measured(self, out: Path, config: EvalConfig) -> list[Result]:
        """Results of a finished run."""
        from superclip.evaluation.tasks import Evaluation
        from superclip.model.weights import open_checkpoint
        from superclip.ops.world import choose_device

        evaluation = Evaluation(config, choose_device(self.config.device))
        checkpoint = open_checkpoint(out / "final_epoch.pt", None)
        self.facts[out] = checkpoint.facts
        return list(evaluation.run(checkpoint, evaluation.prepare(checkpoint)))

    def unlike(self) -> list[str]:
        """In which circumstances the measured runs differ, one line each.

        Raises:
            UserError: if two of them were trained on other data.
        """
        first, *rest = self.facts.items()
        for out, facts in rest:
            if facts["data_sha256"] != first[1]["data_sha256"]:
                raise UserError(
                    f"{out} was trained on other data than {first[0]}: they changed in between; "
                    "delete one of the two, and the same command trains it anew"
                )
        told = []
        for name in ("versions", "world_size", "threads", "device", "commit"):
            found = list(dict.fromkeys(str(facts.get(name)) for facts in self.facts.values()))
            if len(found) > 1:
                told.append(f"runs differ in {name}: {' and '.join(found)}")
        return told

    def compared(self, rates: Mapping[Arm, float | None]) -> dict[str, Any]:
        """Train every arm from every seed, measure, and test each against the reference."""
        config, seeds = self.config, range(self.config.seeds)
        place = {(a, s): config.out / str(a) / f"seed{s}" for a in self.arms for s in seeds}
        self.train([(arm, seed, rates[arm], out) for (arm, seed), out in place.items()])
        classes = config.zeroshot is not None or (self.scenes and config.val_data is None)
        tasks: tuple[Task, ...] = ("retrieval", "zeroshot") if classes else ("retrieval",)
        asked = EvalConfig(val_data=config.val_data, zeroshot=config.zeroshot, tasks=tasks)
        found: dict[Arm, list[list[Result]]] = {}
        for arm in self.arms:
            print(f"measuring {arm}", flush=True)
            found[arm] = [[*map(_kept, self.measured(place[arm, s], asked))] for s in seeds]
        return {
            "schema": SCHEMA,
            "against": config.against,
            "seeds": config.seeds,
            "tuned_on": self.dev if config.tune else None,
            "searches": self.searches,
            "shared": self.shared,
            "data": {r.task: r.data for r in found[self.arms[0]][0]},
            "without_memory": self.without_memory,
            "unlike": self.unlike(),
            "arms": {
                str(arm): {
                    "config": to_dict(self.parsed(arm, 0, rates[arm], place[arm, 0])),
                    "lr": self.parsed(arm, 0, rates[arm], place[arm, 0]).lr,
                    "values": _values(results),
                }
                for arm, results in found.items()
            },
            "differences": tested(found, config.against, config.bootstrap),
        }


def _kept(result: Result) -> Result:
    """Only what the table shows."""
    kept = [m for m in result.measures if m.name in SHOWN]
    return replace(result, measures=kept)


def _values(results: Sequence[Sequence[Result]]) -> dict[str, list[float]]:
    """Of each measure the values of all seeds, and of their average."""
    columns: dict[str, list[float]] = {}
    for seed in results:
        for measure in (m for result in seed for m in result.measures):
            columns.setdefault(SHOWN[measure.name], []).append(measure.statistic.value)
    columns["average"] = [statistics.fmean(row) for row in zip(*columns.values(), strict=True)]
    return columns


def tested(
    found: Mapping[Arm, Sequence[list[Result]]], against: str, draws: int
) -> list[dict[str, Any]]:
    """Each arm minus the reference of its optimizer, measure by measure, with Holm's p over all
    rows.

    The average is tested over seeds alone: its parts are of unlike pictures.
    """
    from superclip.evaluation.tables import adjust, unadjusted_differences

    rows: list[dict[str, Any]] = []
    for arm, results in found.items():
        if arm.loss == against:
            continue
        reference = Arm(against, arm.optimizer)
        own = unadjusted_differences(results, found[reference], True, 2.0, draws)
        rows += [row | {"arm": str(arm), "measure": SHOWN[row["name"]]} for row in own]
        values = [_values(r)["average"] for r in (results, found[reference])]
        if len(results) > 1:
            rows.append({"arm": str(arm), "measure": "average"} | _over_seeds(*values))
    adjust(rows)
    return rows


def _over_seeds(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Student's t of the differences of equal seeds."""
    from scipy.stats import ttest_rel

    from superclip.evaluation.statistics import verdict

    gains, floor = [a - b for a, b in zip(first, second)], 2.0 ** (1 - len(first))
    value = statistics.fmean(gains)
    if statistics.pstdev(gains) > 1e-12:
        found: Any = ttest_rel(first, second)
        interval = found.confidence_interval(0.95)
        low, high, p = float(interval.low), float(interval.high), float(found.pvalue)
    else:  # all seeds differ by the same: t knows no spread, relabelling the seeds does
        low, high, p = value, value, floor if abs(value) > 1e-12 else 1.0
    return {
        "first": statistics.fmean(first),
        "second": statistics.fmean(second),
        "value": value,
        "low": low,
        "high": high,
        "p": p,
        "test": "t over seeds",
        "least_p": floor,
        "verdict": verdict(low, high, p, True, len(first), len(second), True),
    }


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


BAND = "value", "low", "high"


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
