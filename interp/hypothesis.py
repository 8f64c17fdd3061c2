"""`python -m interp.hypothesis`: a claim written down beforehand, decided once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from interp.config import HypothesisConfig
from superclip.errors import UserError, check_writable, nearest, replace_text, run_command
from superclip.loss_options import LOSS_OPTIONS

if TYPE_CHECKING:
    from interp.confirm import Confirm, Wanted
    from superclip.evaluation.measures import Measure
    from superclip.evaluation.statistics import Difference
    from superclip.model.weights import Checkpoint

SCHEMA = 1
SEEDS = 6
"""Runs a side below which nothing is decided of a recipe."""
Test = Literal["above", "below", "within"]
Decision = Literal["supported", "refuted", "not decided"]

DESCRIPTION = """Decide a claim that a file states beforehand, on the confirm pictures, which no
sweep ever scores: supported, refuted or not decided, with interval and power.

  python -m interp.hypothesis research/hypotheses/early_grounding.toml --ckpt logs/final_epoch.pt
  python -m interp.hypothesis FILE.toml --ckpt A-*/final_epoch.pt --against B-*/final_epoch.pt

The file's hash goes into the result. A file that was changed after its result is refused, unless
--exploratory says that the claim was made after a look at the answer. Checkpoints are swept before
(interp.sweep); where seeds are compared, six a side are the least that decide."""


@dataclass(frozen=True)
class Hypothesis:
    """A claim, as a TOML file states it.

    Attributes:
        claim: in words.
        test: above, below: the value lies beyond `margin` on that side. within: it lies closer to 0
            than `margin`.
        margin: the least that would matter, in the measure's unit.
        wanted: what is measured.
        losses: that --ckpt and, where two sides compare, --against were trained with; None for
            any. With two of them the value is that of the first minus that of the second.
        why: of the margin, and whatever a reader should know.
        sha256: of the file.
    """

    claim: str
    test: Test
    margin: float
    wanted: Wanted
    losses: tuple[str | None, ...]
    why: str
    sha256: str

    def decide(self, low: float, high: float) -> Decision:
        """By where the whole 95 % interval lies."""
        m = self.margin
        if self.test == "above":
            yes, no = low > m, high < m
        elif self.test == "below":
            yes, no = high < m, low > m
        else:
            yes, no = -m < low and high < m, low > m or high < -m
        return "supported" if yes else "refuted" if no else "not decided"

    @property
    def rule(self) -> str:
        """What is claimed, in numbers."""
        from interp.confirm import MEASURES

        what, unit = self.wanted.measure, MEASURES[self.wanted.measure].unit
        told = f"{what} (first - second)" if len(self.losses) == 2 else what
        if self.test == "within":
            return f"{told} within {-self.margin:g} .. {self.margin:g} {unit}"
        return f"{told} {self.test} {self.margin:g} {unit}"


def read_hypothesis(path: Path) -> Hypothesis:
    """A claim from its file.

    Raises:
        UserError: naming the key that is missing, unknown, idle or of the wrong kind.
    """
    from interp.confirm import LAYERS, MEASURES, Wanted

    try:
        data = path.read_bytes()
        held = tomllib.loads(data.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no hypothesis file: {error}") from None

    def take(key: str, kind: type, default: Any = None) -> Any:
        value = held.pop(key, default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (kind is str and not value):
            raise UserError(f"{path}: {key} must be given, as {kind.__name__}; it is {value!r}")
        return value

    if (schema := held.pop("schema", None)) != SCHEMA:
        raise UserError(f"{path} is of schema {schema}; this version reads schema {SCHEMA}")
    claim, test, why = take("claim", str), take("test", str), take("why", str)
    margin, measure = take("margin", float), take("measure", str)
    losses: tuple[str | None, ...] = (None,)
    if "first" in held or "second" in held:
        losses = tuple(take(key, str) for key in ("first", "second") if key in held)
    if measure not in MEASURES:
        raise UserError(f"{path}: measure {measure!r} is unknown; {nearest(measure, MEASURES)}")
    options: dict[str, Any] = {}
    for key in ("pictures", *MEASURES[measure].options):
        if key in held:
            kind: type = {"pictures": int, "kinds": list, "share": float}.get(key, str)
            options[key] = take(key, kind)
    if held:
        known = ("pictures", *MEASURES[measure].options)
        raise UserError(
            f"{path}: {next(iter(held))!r} is nothing that {measure} reads (it reads "
            f"{', '.join(known)})"
        )
    options["kinds"] = tuple(options.get("kinds", ()))
    wanted = Wanted(measure, **options)
    for key, value, allowed in (
        ("heads", wanted.heads, LAYERS),
        ("minus", wanted.minus or "untrained", (*LAYERS, "untrained")),
        ("attention", wanted.attention, ("class", "patches")),
        ("test", test, ("above", "below", "within")),
        ("first", losses[0] or "any", ("any", *LOSS_OPTIONS)),
        ("second", losses[-1] or "any", ("any", *LOSS_OPTIONS)),
    ):
        if value not in allowed:
            raise UserError(f"{path}: {key} {value!r} is none of {', '.join(map(str, allowed))}")
    if not math.isfinite(margin) or (test == "within" and margin <= 0):
        raise UserError(f"{path}: margin {margin} must be finite, and above 0 for test 'within'")
    if not 0 < wanted.share < 1:
        raise UserError(f"{path}: share {wanted.share} must lie between 0 and 1")
    if wanted.pictures is not None and not 200 <= wanted.pictures <= 10**7:
        raise UserError(f"{path}: pictures {wanted.pictures} must lie in 200..10^7")
    return Hypothesis(claim, test, margin, wanted, losses, why, hashlib.sha256(data).hexdigest())


def main(argv: list[str]) -> None:
    """Parse, decide or open what was decided, print."""
    from superclip.flags import parse

    config = parse(HypothesisConfig, argv, "python -m interp.hypothesis", DESCRIPTION)
    report, path = decide_one(config)
    print("\n".join(lines(report)))
    print(f"\nresult: {path}")


def decide_one(config: HypothesisConfig) -> tuple[dict[str, Any], Path]:
    """The result of a claim on these checkpoints: the one that stands, or a new one.

    Raises:
        UserError: if the file changed since its result, sides are missing, no recipe, or of other
            pictures.
    """
    from interp.confirm import default_result

    assert config.file is not None
    hypothesis = read_hypothesis(config.file)
    two = len(hypothesis.losses) == 2
    if (config.against is None) == two:
        needs = "compares two sides: give --against" if two else "is of one side: leave --against"
        raise UserError(f"{config.file} {needs}")
    path = config.out or default_result(config.ckpt[0], config.file.stem)
    check_writable(path, "--out")
    flags = "--ckpt", "--against"
    sides = [_open_side(*s, hypothesis) for s in zip(config.sides, flags, hypothesis.losses)]
    asked = {
        "file_sha256": hypothesis.sha256,
        "checkpoints": [[c.sha256 for seed in side for c in seed] for side in sides],
        "draws": config.draws,
    }
    changed = None
    if path.exists():
        held = _held(path)
        if held["asked"] == asked:
            return held, path
        changed = _refuse_other(held, asked, path, config)
    report = {
        "schema": SCHEMA,
        "asked": asked,
        "exploratory": config.exploratory,
        "changed_since": changed,
    }
    report |= decide(hypothesis, sides, config)
    replace_text(path, json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return report, path


def _held(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        if held["schema"] != SCHEMA or "asked" not in held:
            raise ValueError(f"schema {held['schema']}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no result of this version ({error}); --out FILE") from None
    return held


def _refuse_other(
    held: dict[str, Any], asked: dict[str, Any], path: Path, config: HypothesisConfig
) -> str | None:
    """The hash of the file before it was changed, if --exploratory allows that."""
    before, now = held["asked"]["file_sha256"], asked["file_sha256"]
    if before == now:
        raise UserError(
            f"{path} decided this claim on other checkpoints or draws; name another --out"
        )
    if not config.exploratory:
        raise UserError(
            f"{config.file} was changed after {path} decided it (sha256 {before[:12]} then, "
            f"{now[:12]} now): a claim made after a look at the answer is exploratory; "
            "--exploratory decides it and says so"
        )
    return str(before)


def _open_side(
    paths: Sequence[Path], flag: str, loss: str | None, hypothesis: Hypothesis
) -> list[list[Checkpoint]]:
    """Checkpoints by seed; several of a seed only where learning rates are compared.

    Raises:
        UserError: if they are not seeds of one recipe.
    """
    from interp.confirm import MEASURES
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
    seeds = [[c.config.seed for c in column if c.config] for column in columns]
    if any(other != seeds[0] for other in seeds):
        raise UserError(f"{flag}: give the same seeds at every learning rate; they are {seeds}")
    return [list(row) for row in zip(*columns)]


def decide(
    hypothesis: Hypothesis, sides: Sequence[list[list[Checkpoint]]], config: HypothesisConfig
) -> dict[str, Any]:
    """Measure every model on its confirm pictures, and decide."""
    from interp.confirm import MEASURES
    from superclip.evaluation.tasks import share_initial_weights

    measure = MEASURES[hypothesis.wanted.measure]
    told: list[list[str]] = []
    arms: list[list[Measure]] = []
    pictures: dict[str, Any] = {}
    for side in sides:
        said, arm = [], []
        for seed in side:
            found, what, identity = _measured(seed, hypothesis, config)
            for key, value in identity.items():
                if pictures.setdefault(key, value) != value:
                    raise UserError(f"{seed[0].path} is of other confirm pictures; name one data")
            said.append(what)
            arm.append(found)
        told.append(said)
        arms.append(arm)
    paired = len(sides) == 2 and share_initial_weights(*([s[0] for s in side] for side in sides))
    found = compared(arms, hypothesis, config.draws, paired)
    few = 1 < min(map(len, arms)) < SEEDS or (len(arms) == 2 and min(map(len, arms)) < SEEDS)
    decision: Decision = "not decided" if few else hypothesis.decide(found.low, found.high)
    return {
        "hypothesis": {k: v for k, v in asdict(hypothesis).items() if k != "sha256"},
        "rule": hypothesis.rule,
        "unit": measure.unit,
        "chance": measure.chance,
        "models": [[_facts(c) for seed in side for c in seed] for side in sides],
        "of": told,
        "values": [[m.statistic.value for m in arm] for arm in arms],
        "pictures": pictures,
        "seeds": [len(arm) for arm in arms],
        "paired": paired,
        **{k: getattr(found, k) for k in ("value", "low", "high", "freedom", "detectable")},
        "test": "paired bootstrap over pictures" if found.freedom is None else found.test,
        "power": chance_of_verdict(hypothesis, found),
        "too_few_seeds": few,
        "decision": decision,
    }


def _measured(
    seed: Sequence[Checkpoint], hypothesis: Hypothesis, config: HypothesisConfig
) -> tuple[Measure, str, dict[str, Any]]:
    """The measure of one seed's model(s), what it is of, and which pictures it saw."""
    from interp.confirm import MEASURES, open_confirm, pictures_sha256
    from superclip.evaluation.measures import Measure
    from superclip.model.weights import load_checkpoint

    wanted = hypothesis.wanted
    models: list[Confirm] = [open_confirm(load_checkpoint(c.path), wanted, config) for c in seed]
    statistic, told = MEASURES[wanted.measure].of(models)
    identity = {"sha256": pictures_sha256(models[0]), "data": models[0].source.name}
    identity |= {"confirm": len(models[0].rows), "n": statistic.pictures}
    for one in models:
        one.found.model.to("meta")
    return Measure(wanted.measure, statistic, 0.0, percent=False), told, identity


def compared(
    arms: Sequence[Sequence[Measure]], hypothesis: Hypothesis, draws: int, paired: bool
) -> Difference:
    """The value with its interval: of one side, or of the first minus the second.

    One side is set against zeros of the same pictures, so that the same two-way error (pictures and
    seeds) serves both.
    """
    import numpy as np

    from superclip.evaluation.measures import Mean
    from superclip.evaluation.statistics import compare

    first, second = arms[0], arms[-1]
    if len(arms) == 1:
        n = first[0].statistic.pictures
        nothing = Mean(np.zeros(n), np.arange(n), n)
        second = [dataclasses.replace(m, statistic=nothing) for m in first]
    return compare(first, second, paired or len(arms) == 1, abs(hypothesis.margin), draws)


def chance_of_verdict(hypothesis: Hypothesis, found: Difference) -> float | None:
    """What this test can tell: for `within`, the chance that a true value of 0 is supported; else
    the chance that a true value of 0 is refuted, where the margin is not 0."""
    from scipy.stats import norm, t

    half = (found.high - found.low) / 2
    if half <= 0 or (hypothesis.test != "within" and hypothesis.margin == 0):
        return None
    if hypothesis.test != "within":
        return found.power
    law = norm if found.freedom is None else t(found.freedom)
    error = half / float(law.ppf(0.975))
    return max(0.0, 2 * float(law.cdf((hypothesis.margin - half) / error)) - 1)


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
    held, unit, digits = report["hypothesis"], report["unit"], 4
    if report["unit"] == "steps":
        digits = 0
    number = f".{digits}f"
    told = [held["claim"], f"  claimed: {report['rule']} (chance: {report['chance']})"]
    for name, models, values, what in zip(
        ("first", "second"), report["models"], report["values"], report["of"]
    ):
        rates = sorted({m["lr"] for m in models})
        recipe = f"{models[0]['loss']} {models[0]['model']} lr {', '.join(f'{r:g}' for r in rates)}"
        side = f"{name}: {recipe}" if len(report["models"]) > 1 else recipe
        shown = ", ".join(f"{v:{number}} ({w})" for v, w in zip(values, what))
        told.append(f"  {side}: {shown}")
    n, seeds = report["pictures"]["n"], report["seeds"]
    band = f"{report['value']:{number}} [{report['low']:{number}}, {report['high']:{number}}]"
    told.append(
        f"  {band} {unit}, n = {n} confirm pictures of {report['pictures']['data']}, "
        f"{' and '.join(map(str, seeds))} seed(s), {report['test']}"
    )
    if report["detectable"]:
        told.append(
            f"  a true value {report['detectable']:.{max(digits, 1)}f} {unit} beyond the margin "
            "would be told in 8 of 10 such tests"
        )
    if report["power"] is not None:
        way = "supported" if held["test"] == "within" else "refuted"
        told.append(f"  a true value of 0 would be {way} with chance {report['power']:.2f}")
    why = ""
    if report["too_few_seeds"]:
        why = f" ({min(seeds)} seed(s) a side; {SEEDS} are the least that decide: descriptive)"
    elif seeds == [1]:
        why = " (of this checkpoint; nothing is said of its recipe)"
    told.append(f"{report['decision'].upper()}{why}")
    if report["exploratory"]:
        since = report["changed_since"]
        changed = f"; the file was changed since a result (sha256 {since[:12]})" if since else ""
        told.append(f"EXPLORATORY: the claim may have followed a look at the answer{changed}")
    told.append(f"file sha256 {report['asked']['file_sha256'][:12]}")
    return told


if __name__ == "__main__":
    run_command(main)
