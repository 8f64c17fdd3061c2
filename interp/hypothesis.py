"""`python -m interp.hypothesis`: a claim written down beforehand, decided once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.config import HypothesisConfig
from superclip.errors import UserError, check_writable, replace_text, run_command

if TYPE_CHECKING:
    from interp.claim import Decision, Hypothesis
    from interp.confirm import Confirm
    from interp.measures import Answer
    from superclip.evaluation.measures import Measure
    from superclip.evaluation.statistics import Difference
    from superclip.model.weights import Checkpoint

SCHEMA = 2
"""Of a result."""
SEEDS = 6
"""Runs a side below which nothing is decided of a recipe."""
DESCRIPTION = """Decide a claim that a file states beforehand, on the confirm pictures, which no
sweep ever scores: supported, refuted or not decided, with interval and power.

  python -m interp.hypothesis research/hypotheses/early_grounding.toml --ckpt logs/final_epoch.pt
  python -m interp.hypothesis FILE.toml --ckpt A-*/final_epoch.pt --against B-*/final_epoch.pt

The file's hash goes into the result. A file that was changed after its result is refused, unless
--exploratory says that the claim was made after a look at the answer. Checkpoints are swept before
(interp.sweep); where seeds are compared, six a side are the least that decide."""


def main(argv: list[str]) -> None:
    """Parse, decide or open what was decided, print."""
    from superclip.flags import parse

    config = parse(HypothesisConfig, argv, "python -m interp.hypothesis", DESCRIPTION)
    from interp.render.canvas import png
    from interp.render.claim import figure

    report, path = decide_one(config)
    print("\n".join(lines(report)))
    print(f"\nresult: {path}")
    if (drawn := figure(report)) is not None:
        picture = path.with_suffix(".png")
        picture.write_bytes(png(drawn))
        print(f"figure: {picture}")


def decide_one(config: HypothesisConfig) -> tuple[dict[str, Any], Path]:
    """The result of a claim on these checkpoints: the one that stands, or a new one.

    Raises:
        UserError: if the file changed since its result, sides are missing, no recipe, or of other
            pictures.
    """
    from interp.claim import read_hypothesis
    from superclip.training.folder import commit

    assert config.file is not None
    hypothesis = read_hypothesis(config.file)
    two = len(hypothesis.losses) == 2
    if (config.against is None) == two:
        needs = "compares two sides: give --against" if two else "is of one side: leave --against"
        raise UserError(f"{config.file} {needs}")
    path = config.out or default_result(config.ckpt[0], config.file.stem)
    if config.exploratory:
        path = path.with_name(f"{path.stem}-exploratory.json")
    check_writable(path, "--out")
    flags = "--ckpt", "--against"
    sides = [_open_side(*s, hypothesis) for s in zip(config.sides, flags, hypothesis.losses)]
    if two:
        _refuse_unlike(sides[0][0][0], sides[1][0][0], hypothesis)
    checkpoints = [[c for seed in side for c in seed] for side in sides]
    asked = {
        "file_sha256": hypothesis.sha256,
        "checkpoints": [[c.sha256 for c in side] for side in checkpoints],
        "beside": [[_beside(c, hypothesis) for c in side] for side in checkpoints],
        "draws": config.draws,
    }
    if path.exists() and not config.exploratory:
        held = _held(path)
        if held["asked"] == asked:
            return held, path
        _refuse_other(held, asked, path, config.file)
    ledgers = dict.fromkeys(c.path.parent / LEDGER for side in checkpoints for c in side)
    mine = {c.sha256 for side in checkpoints for c in side}

    def looks() -> list[dict[str, Any]]:
        return [one for path in ledgers for one in _looks(path) if one["checkpoint"] in mine]

    same = [look for look in looks() if look["question"] == hypothesis.wanted.question]
    if same and not config.exploratory:
        raise UserError(
            f"these models' confirm pictures have answered {hypothesis.wanted.measure} of these "
            f"heads before ({LEDGER} beside them: {same[-1]['decision']}, file sha256 "
            f"{same[-1]['file_sha256'][:12]}); whatever is asked again is exploratory: "
            "--exploratory decides it and says so"
        )
    report = {
        "schema": SCHEMA,
        "asked": asked,
        "exploratory": config.exploratory,
        "before": [{k: look[k] for k in ("file_sha256", "decision")} for look in same],
        "commit": commit(),
    }
    report |= decide(hypothesis, sides, config)
    others = {one["file_sha256"] for one in looks()} - {hypothesis.sha256}  # some decided meanwhile
    report["claim_number"] = 1 + len(others)
    replace_text(path, json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    look = {"question": hypothesis.wanted.question, "file_sha256": hypothesis.sha256}
    look |= {"decision": report["decision"], "exploratory": config.exploratory}
    for one in (c for side in checkpoints for c in side):
        with (one.path.parent / LEDGER).open("a") as file:
            file.write(json.dumps(look | {"checkpoint": one.sha256}) + "\n")
    return report, path


def default_result(ckpt: Path, name: str) -> Path:
    """Where a decision stands."""
    return ckpt.parent / f"hypothesis-{name}.json"


LEDGER = "confirm.jsonl"
"""Beside every checkpoint: what its confirm pictures have answered, one line a look."""


def _looks(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        kept = {"question", "file_sha256", "decision", "checkpoint"}
        if not all(kept <= {*look} for look in found):
            raise ValueError("a line is not whole")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} can't be read ({error}); it tells what was looked at before, so mend it"
        ) from None
    return [
        look | {"question": look["question"] | {"kinds": tuple(look["question"]["kinds"])}}
        for look in found
    ]


def _beside(checkpoint: Checkpoint, hypothesis: Hypothesis) -> list[str]:
    """What decides the number beside the weights: the sweep that chooses, and for a course the
    checkpoints that it goes through."""
    from interp.subject import default_folder
    from superclip.model.weights import file_sha256, resumable

    path, found = checkpoint.path, []
    if {"heads", "minus"} & {*_options(hypothesis)}:
        sweep = default_folder(path, hypothesis.wanted.attention) / "results.json"
        found += [file_sha256(sweep)] if sweep.is_file() else []
    if hypothesis.wanted.measure == "onset":
        found += [f"{p.name} {p.stat().st_size}" for p in resumable(path.parent)]
    return found


def _options(hypothesis: Hypothesis) -> tuple[str, ...]:
    from interp.measures import MEASURES

    return MEASURES[hypothesis.wanted.measure].options


def _refuse_unlike(one: Checkpoint, other: Checkpoint, hypothesis: Hypothesis) -> None:
    """Raises UserError for an option in which two sides may not differ."""
    from superclip.config import differences

    assert one.config is not None and other.config is not None
    free = {"loss", "lr", "seed", *hypothesis.differs}
    found = differences(one.config, other.config)
    if odd := [line for line in found if line.partition(":")[0] not in free]:
        raise UserError(
            f"the sides differ in {odd[0]}; the claim is of losses alone (its file may list more: "
            f"differs = [{odd[0].partition(':')[0]!r}])"
        )


def _held(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        if held["schema"] != SCHEMA:
            raise ValueError(f"schema {held['schema']}")
        lines(held)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no result of this version ({error}); --out FILE") from None
    return held


def _refuse_other(held: dict[str, Any], asked: dict[str, Any], path: Path, claim: Path) -> None:
    """Raises UserError: a result stands there, of another claim or of other models."""
    before, now = held["asked"]["file_sha256"], asked["file_sha256"]
    if before == now:
        raise UserError(
            f"{path} decided this claim on other checkpoints, sweeps or draws; name another --out"
        )
    raise UserError(
        f"{claim} was changed after {path} decided it (sha256 {before[:12]} then, "
        f"{now[:12]} now): a claim made after a look at the answer is exploratory; "
        "--exploratory decides it and says so"
    )


def _open_side(
    paths: Sequence[Path], flag: str, loss: str | None, hypothesis: Hypothesis
) -> list[list[Checkpoint]]:
    """Checkpoints by seed; several of a seed only where learning rates are compared.

    Raises:
        UserError: if they are not seeds of one recipe.
    """
    from interp.measures import MEASURES
    from superclip.evaluation.tasks import seeds_of_one_recipe
    from superclip.model.weights import load_checkpoint

    by_rate: dict[float, list[Checkpoint]] = {}
    rates = MEASURES[hypothesis.wanted.measure].rates
    for found in map(load_checkpoint, paths):
        found.model.to("meta")  # opened again when its turn comes
        assert found.config is not None
        if loss not in (None, found.config.loss):
            raise UserError(
                f"{flag}: {found.path} was trained with --loss {found.config.loss}; the claim is "
                f"of {loss}"
            )
        by_rate.setdefault(found.config.lr if rates else 0.0, []).append(found)
    columns = []
    for _, column in sorted(by_rate.items()):
        column.sort(key=lambda c: c.config.seed if c.config else 0)
        seeds_of_one_recipe(column, flag)
        columns.append(column)
        if len({c.config.loss for c in (columns[0][0], column[0]) if c.config}) > 1:
            raise UserError(f"{flag} names runs of several losses; a side is of one")
        _refuse_unlike(columns[0][0], column[0], hypothesis)
    seeds = [[c.config.seed for c in column if c.config] for column in columns]
    if any(other != seeds[0] for other in seeds):
        raise UserError(f"{flag}: give the same seeds at every learning rate; they are {seeds}")
    return [list(row) for row in zip(*columns)]


def decide(
    hypothesis: Hypothesis, sides: Sequence[list[list[Checkpoint]]], config: HypothesisConfig
) -> dict[str, Any]:
    """Measure every model on its confirm pictures, and decide."""
    from interp.measures import MEASURES, NothingToTell
    from superclip.evaluation.measures import Measure
    from superclip.evaluation.tasks import share_initial_weights

    measure = MEASURES[hypothesis.wanted.measure]
    models = [[_facts(c) for seed in side for c in seed] for side in sides]
    report: dict[str, Any] = {
        "hypothesis": {k: v for k, v in asdict(hypothesis).items() if k != "sha256"},
        "rule": hypothesis.rule,
        "unit": measure.unit,
        "chance": "0" if len(sides) == 2 else measure.chance,
        "level": measure.level,
        "models": models,
        "seeds": [len(side) for side in sides],
    }
    if measure.rates:
        sides = [_best_and_neighbours(side, hypothesis, config) for side in sides]
    answers: list[list[Answer]] = []
    pictures: dict[str, Any] = {}
    try:
        for side in sides:
            arm = []
            for seed in side:
                found, identity = _measured(seed, hypothesis, config)
                for key, value in identity.items():
                    if pictures.setdefault(key, value) != value:
                        raise UserError(f"{seed[0].path} is of other confirm pictures ({key})")
                arm.append(found)
            answers.append(arm)
    except NothingToTell as error:
        return report | {"decision": "not decided", "nothing": str(error)}
    name = hypothesis.wanted.measure
    arms = [[Measure(name, a.statistic, 0.0, percent=False) for a in arm] for arm in answers]
    paired = len(sides) == 2 and share_initial_weights(*([s[0] for s in side] for side in sides))
    found = compared(arms, hypothesis, config.draws, paired)
    least = min(map(len, arms))
    few = least < SEEDS and (least > 1 or len(arms) == 2)
    sure = found.high - found.low > 1e-12
    decision: Decision = "not decided"
    if sure and not few:
        decision = hypothesis.decide(found.low, found.high)
    return report | {
        "of": [[a.told for a in arm] for arm in answers],
        "courses": [[a.course for a in arm] for arm in answers],
        "values": [[m.statistic.value for m in arm] for arm in arms],
        "pictures": pictures,
        "paired": paired,
        **{k: getattr(found, k) for k in ("value", "low", "high", "freedom", "detectable")},
        "test": "bootstrap over pictures" if found.freedom is None else found.test,
        "power": chance_of_verdict(hypothesis, found),
        "too_few_seeds": few,
        "no_spread": not sure,
        "decision": decision,
    }


def _best_and_neighbours(
    side: list[list[Checkpoint]], hypothesis: Hypothesis, config: HypothesisConfig
) -> list[list[Checkpoint]]:
    """Of each seed the model at the side's best rate, at half and at twice of it."""
    from interp.confirm import open_confirm
    from interp.measures import best_rate
    from superclip.model.weights import load_checkpoint

    by_rate: dict[float, list[Confirm]] = {}
    for one in (c for seed in side for c in seed):
        assert one.config is not None
        opened = open_confirm(load_checkpoint(one.path), hypothesis.wanted, config)
        by_rate.setdefault(one.config.lr, []).append(opened)
    rates = best_rate(by_rate)
    return [
        [next(c for c in seed if c.config and c.config.lr == rate) for rate in rates]
        for seed in side
    ]


def _measured(
    seed: Sequence[Checkpoint], hypothesis: Hypothesis, config: HypothesisConfig
) -> tuple[Answer, dict[str, Any]]:
    """What one seed's model(s) answer, and which pictures they saw."""
    from interp.confirm import FEWEST, grounding_sha256, open_confirm, pictures_sha256
    from interp.measures import MEASURES
    from superclip.model.weights import load_checkpoint

    wanted = hypothesis.wanted
    models: list[Confirm] = [open_confirm(load_checkpoint(c.path), wanted, config) for c in seed]
    answer = MEASURES[wanted.measure].of(models)
    statistic = answer.statistic
    if statistic.pictures < FEWEST:
        raise UserError(
            f"{models[0].source.name}: {statistic.pictures} confirm pictures can be asked this; "
            f"{FEWEST} are needed: the file may say pictures = N"
        )
    identity = {"sha256": pictures_sha256(models[0]), "data": models[0].source.name}
    identity |= {"confirm": len(models[0].rows), "n": statistic.pictures}
    identity |= {"kept": grounding_sha256(models[0])}
    if wanted.measure == "onset":
        identity |= {"course": answer.told}
    for one in models:
        one.found.model.to("meta")
    return answer, identity


def compared(
    arms: Sequence[Sequence[Measure]], hypothesis: Hypothesis, draws: int, paired: bool
) -> Difference:
    """The value with its interval: of one side, or of the first minus the second.

    One side is set against its chance level on the same pictures, so that the same two-way error
    (pictures and seeds) serves both.
    """
    import numpy as np

    from interp.measures import MEASURES
    from superclip.evaluation.measures import Mean
    from superclip.evaluation.statistics import compare

    first, second = arms[0], arms[-1]
    if len(arms) == 1:
        n = first[0].statistic.pictures
        level = MEASURES[hypothesis.wanted.measure].level
        nothing = Mean(np.full(n, level), np.arange(n), n)
        second = [dataclasses.replace(m, statistic=nothing) for m in first]
    return compare(first, second, paired or len(arms) == 1, abs(hypothesis.margin), draws)


def chance_of_verdict(hypothesis: Hypothesis, found: Difference) -> tuple[float, str] | None:
    """Which verdict a true value of 0 would get, and with what chance; None where the margin is 0,
    or nothing varies."""
    from scipy.stats import norm, t

    half, way = (found.high - found.low) / 2, hypothesis.decide(0.0, 0.0)
    if half <= 1e-12 or way == "not decided":
        return None
    if hypothesis.test != "within":
        return None if found.power is None else (found.power, way)
    law = norm if found.freedom is None else t(found.freedom)
    error = half / float(law.ppf(0.975))
    return max(0.0, 2 * float(law.cdf((hypothesis.margin - half) / error)) - 1), way


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    assert config is not None
    return {
        "sha256": checkpoint.sha256,
        "model": config.model.name,
        "loss": config.loss,
        "lr": config.lr,
        "seed": config.seed,
        "epoch": checkpoint.epoch,
    }


def lines(report: dict[str, Any]) -> list[str]:
    """A result as text."""
    held, unit = report["hypothesis"], report["unit"]
    told = [held["claim"], f"  claimed: {report['rule']} (chance: {report['chance']})"]
    if nothing := report.get("nothing"):
        told.append(f"NOT DECIDED ({nothing})")
        return [*told, *_last_lines(report)]
    digits = 0 if unit == "steps" else 4
    number = f".{digits}f"
    for name, models, values, what in zip(
        ("first", "second"), report["models"], report["values"], report["of"]
    ):
        rates = sorted({m["lr"] for m in models})
        recipe = f"{models[0]['loss']} {models[0]['model']} lr {', '.join(f'{r:g}' for r in rates)}"
        told.append(f"  {name}: {recipe}" if len(report["models"]) > 1 else f"  {recipe}")
        told += [f"    {v:{number}} ({w})" for v, w in zip(values, what)]
    pictures, seeds = report["pictures"], report["seeds"]
    band = f"{report['value']:{number}} [{report['low']:{number}}, {report['high']:{number}}]"
    told.append(
        f"  {band} {unit}, n = {pictures['n']} confirm pictures of {pictures['data']}, "
        f"{' and '.join(map(str, seeds))} seed(s), {report['test']}"
    )
    if report["detectable"] and held["test"] != "within":
        told.append(
            f"  a true value {report['detectable']:.{max(digits, 1)}f} {unit} beyond the margin "
            "would be told in 8 of 10 such tests"
        )
    if report["power"] is not None:
        chance, way = report["power"]
        told.append(f"  a true value of 0 would be {way} with chance {chance:.2f}")
    why = ""
    if report["too_few_seeds"]:
        why = f" ({min(seeds)} seed(s) a side; {SEEDS} are the least that decide: descriptive)"
    elif report["no_spread"]:
        why = " (nothing varies, so that nothing is known of the error)"
    elif seeds == [1]:
        why = " (of this checkpoint; nothing is said of its recipe)"
    return [*told, f"{report['decision'].upper()}{why}", *_last_lines(report)]


def _last_lines(report: dict[str, Any]) -> list[str]:
    told = []
    if report["exploratory"]:
        looks = [f"{look['decision']}, {look['file_sha256'][:12]}" for look in report["before"]]
        told_before = "; ".join(dict.fromkeys(looks))  # a look stands beside every seed
        seen = f"; these pictures answered before: {told_before}" if looks else ""
        told.append(f"EXPLORATORY: the claim may have followed a look at the answer{seen}")
    number = report["claim_number"]
    told.append(f"file sha256 {report['asked']['file_sha256'][:12]}")
    told.append(f"claim {number} on these models' confirm pictures, each at 5 %")
    return told


if __name__ == "__main__":
    run_command(main)
