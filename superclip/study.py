"""Arms that are trained from several seeds at equal budget, each at its own learning rate, measured
alike and tested against one another: what `superclip.compare` and `superclip.scaling_law` share."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superclip.config import TrainConfig, is_scenes, to_dict
from superclip.errors import UserError, replace_text
from superclip.evaluation.config import EvalConfig, Task
from superclip.flags import all_stages, parse_train, second_stage
from superclip.loss_options import at_least_one

if TYPE_CHECKING:
    from superclip.evaluation.measures import Result

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
BAND = "value", "low", "high"


class Diverged(UserError):
    """A run whose numbers are no longer finite."""


@dataclass(frozen=True)
class StudyConfig:
    """How arms are trained and measured."""

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
    jobs: int = 1
    """Runs at a time."""
    launcher: str = "python"
    """What starts a run: 'torchrun --nproc-per-node 8', say."""
    bootstrap: int = 2000
    """Draws of the bootstrap over pictures."""
    device: str = "auto"
    """Where checkpoints are measured."""

    def __post_init__(self) -> None:
        at_least_one(self, "seeds", "tune", "jobs")
        if not self.launcher.strip():
            raise UserError("--launcher is empty; name what starts a run, or leave it out")
        if self.bootstrap < 100:
            raise UserError(f"--bootstrap {self.bootstrap} must be at least 100")
        if self.tune_data is not None and not self.tune:
            raise UserError("--tune-data goes with --tune N")


@dataclass(frozen=True)
class Arm:
    """What is trained from several seeds.

    Attributes:
        name: in tables, and of its folder.
        words: its flags.
        optimizer: decides the middle of the search for its rate.
        against: name of the arm that it is compared with; None if nothing is.
    """

    name: str
    words: tuple[str, ...]
    optimizer: str = "adamw"
    against: str | None = None

    def __str__(self) -> str:
        return self.name


class Study:
    """All runs under one folder.

    Args:
        config: how.
        out: the folder.
        arms: what.
        shared: flags of every superclip.train.
        own: flags that arms set, and `shared` may not.

    Raises:
        UserError: for whatever one of the runs would refuse; nothing is trained then.
    """

    def __init__(
        self,
        config: StudyConfig,
        out: Path,
        arms: Sequence[Arm],
        shared: Sequence[str],
        own: Sequence[str],
    ):
        self.config, self.out, self.arms, self.shared = config, out, [*arms], [*shared]
        for flag in (*own, "--seed", "--out", "--lr"):
            if any(word.partition("=")[0].replace("_", "-") == flag for word in shared):
                raise UserError(f"{flag} is the comparison's own; leave it out after --")
        self.searches: dict[str, dict[str, Any]] = {}
        self.facts: dict[Path, dict[str, Any]] = {}
        parsed = [self.parsed(arm, TUNING_SEED, None, out) for arm in self.arms]
        self.first = parsed[0]
        self.pretrained = not self.first.model.from_scratch
        self.scenes = is_scenes(self.first.data.train_data)
        self.dev = config.tune_data or ("scenes:tune" if self.scenes else None)
        if config.tune and self.dev is None:
            raise UserError("--tune needs --tune-data: data that the comparison never sees")
        self._refuse_data()

    def _refuse_data(self) -> None:
        """Raises UserError for data that can't be opened, and if rates would be chosen on the
        pictures that train or judge. A stream is opened by its run."""
        from superclip.data.shards import is_stream
        from superclip.data.sources import held_out_spec, open_source

        data = self.first.data
        judged = self.config.val_data or data.val_data or held_out_spec(data.train_data)
        specs = {"judge": judged, "train": data.train_data}
        specs |= {"tune": str(self.dev)} if self.config.tune else {}
        digest = {
            what: open_source(spec, None, data.data_seed, held_out=what != "train").digest
            for what, spec in specs.items()
            if not (what == "train" and is_stream(spec))
        }
        for what in ("judge", "train"):
            if self.config.tune and digest.get(what) == digest["tune"]:
                raise UserError(f"--tune-data {self.dev} are the pictures that {what}; name others")

    @property
    def launcher(self) -> list[str]:
        """What starts a run; by default this very Python."""
        named = self.config.launcher
        return [sys.executable] if named == "python" else shlex.split(named)

    def words(self, arm: Arm, seed: int, lr: float | None, out: Path) -> list[str]:
        """Flags of one run."""
        words = [*self.shared, *arm.words]
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
        kept = any(word.partition("=")[0] == "--keep-last" for word in self.shared)
        sparing = [] if kept else ["--keep-last", "1"]  # a hundred runs would fill the disk

        def one(run: tuple[Arm, int, float | None, Path]) -> None:
            if failed.is_set():
                return
            arm, seed, lr, out = run
            command = [*self.launcher, "-m", "superclip.train", *self.words(*run)]
            done, log = (out.parent / f"{out.name}.{kind}" for kind in ("done", "log"))
            final, whole = self.last(out), self.identity(run)
            if final.is_file() and done.is_file() and done.read_text() == whole:
                return
            told = f"{arm}, seed {seed}" + ("" if lr is None else f", lr {lr:g}")
            print(f"training {told} -> {out}", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:  # the trainer goes on where it was, or says what differs
                status = subprocess.run([*command, *sparing], stdout=file, stderr=file).returncode
            if status or not final.is_file():
                failed.set()
                last = (log.read_text().strip().splitlines() or ["nothing said"])[-1]
                kind = Diverged if "not finite" in last else UserError
                raise kind(f"{told} did not finish (see {log}): {last}")
            replace_text(done, whole)

        with ThreadPoolExecutor(self.config.jobs) as pool:
            list(pool.map(one, runs))

    def identity(self, run: tuple[Arm, int, float | None, Path]) -> str:
        """All options of a run and of its later stages, whatever files they come from."""
        stages = [to_dict(stage) for stage in all_stages(self.words(*run))]
        return json.dumps([self.launcher, stages], indent=1)

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
        folder = self.out / "tune" / str(arm)
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
        checkpoint = open_checkpoint(self.last(out), None)
        self.facts[out] = checkpoint.facts
        return list(evaluation.run(checkpoint, evaluation.prepare(checkpoint)))

    def last(self, out: Path) -> Path:
        """The checkpoint that a run, with all its stages, ends in."""
        run = self.first
        while (following := second_stage(replace(run, out=out))) is not None:
            run, out = following, following.out
        return out / "final_epoch.pt"

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
        """Train every arm from every seed, measure, and test each against its reference."""
        config, seeds = self.config, range(self.config.seeds)
        place = {(a, s): self.out / str(a) / f"seed{s}" for a in self.arms for s in seeds}
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
            "seeds": config.seeds,
            "tuned_on": self.dev if config.tune else None,
            "searches": self.searches,
            "shared": self.shared,
            "data": {r.task: r.data for r in found[self.arms[0]][0]},
            "unlike": self.unlike(),
            "arms": {
                str(arm): {
                    "config": to_dict(self.parsed(arm, 0, rates[arm], place[arm, 0])),
                    "lr": self.parsed(arm, 0, rates[arm], place[arm, 0]).lr,
                    "values": values_of(results),
                }
                for arm, results in found.items()
            },
            "differences": tested(found, config.bootstrap),
        }


def _kept(result: Result) -> Result:
    """Only what the table shows."""
    kept = [m for m in result.measures if m.name in SHOWN]
    return replace(result, measures=kept)


def values_of(results: Sequence[Sequence[Result]]) -> dict[str, list[float]]:
    """Of each measure the values of all seeds, and of their average."""
    columns: dict[str, list[float]] = {}
    for seed in results:
        for measure in (m for result in seed for m in result.measures):
            columns.setdefault(SHOWN[measure.name], []).append(measure.statistic.value)
    columns["average"] = [statistics.fmean(row) for row in zip(*columns.values(), strict=True)]
    return columns


def tested(found: Mapping[Arm, Sequence[list[Result]]], draws: int) -> list[dict[str, Any]]:
    """Each arm minus its reference, measure by measure, with Holm's p over all rows.

    The average is tested over seeds alone: its parts are of unlike pictures.
    """
    from superclip.evaluation.tables import adjust, unadjusted_differences

    rows: list[dict[str, Any]] = []
    for arm, results in found.items():
        if arm.against is None:
            continue
        reference = next(other for other in found if other.name == arm.against)
        own = unadjusted_differences(results, found[reference], True, 2.0, draws)
        rows += [row | {"arm": str(arm), "measure": SHOWN[row["name"]]} for row in own]
        values = [values_of(r)["average"] for r in (results, found[reference])]
        if len(results) > 1:
            rows.append({"arm": str(arm), "measure": "average"} | over_seeds(*values))
    adjust(rows)
    return rows


def over_seeds(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
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
