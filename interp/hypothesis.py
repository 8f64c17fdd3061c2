"""`python -m interp.hypothesis`: a claim written down beforehand, decided once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from interp.claim import FEWEST, MEASURES, Decision, Hypothesis, read_hypothesis
from interp.config import HypothesisConfig
from interp.ledger import LEDGER, Look, looks, record, result_sha256
from superclip.errors import UserError, check_writable, replace_text, run_command

if TYPE_CHECKING:
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
(interp.sweep); where seeds are compared, six a side are the least that decide. What is remembered
stands in confirm.jsonl beside each checkpoint; copies of a folder, and lines deleted, are not seen.

A file has schema = 1, claim, why, measure, test = "above" | "below" | "within", margin, and:
  pictures           of confirm (default: 1000 scenes, or all of other data)
  first, second      losses of --ckpt and --against, where two sides compare; then also
                     differs = [options that may differ], same_rate = true
  attention          "class" (default) or "patches", for excess, depth, onset and causal
Measures:
  excess             of the best head of discovery: heads = "all" | "first half" | "second half" |
                     "last" | "all but the last"; minus = one of those, or "untrained"
  depth, onset       where in the layers the grounding lies; by which step it is there (share = 0.5)
  causal             loss without that head, less the mean of its layer's other heads (heads = ...)
  binding            of compositional questions about scenes (kinds = [...])
  sensitivity        R@1 at the best of rates = [...] less the mean over them"""


def main(argv: list[str]) -> None:
    """Parse, decide or open what was decided, print."""
    from superclip.flags import parse

    config = parse(HypothesisConfig, argv, "python -m interp.hypothesis", DESCRIPTION)
    assert config.file is not None
    report, path = decide_one(config, read_hypothesis(config.file))
    from interp.render.canvas import png
    from interp.render.claim import figure, said

    print("\n".join(said(report, code_sha256())))
    print(f"\nresult: {path}")
    if (drawn := figure(report)) is not None:
        picture = path.with_suffix(".png")
        picture.write_bytes(png(drawn))
        print(f"figure: {picture}")


def decide_one(config: HypothesisConfig, hypothesis: Hypothesis) -> tuple[dict[str, Any], Path]:
    """The result of a claim on these checkpoints: the one that stands, or a new one.

    Raises:
        UserError: if the file changed since its result, sides are missing, no recipe, or of other
            pictures.
    """
    from superclip.training.folder import commit

    assert config.file is not None
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
    flat = [c for side in checkpoints for c in side]
    asked = {
        "file_sha256": hypothesis.sha256,
        "checkpoints": [[c.sha256 for c in side] for side in checkpoints],
        "beside": [[_beside(c, hypothesis) for c in side] for side in checkpoints],
        "draws": config.draws,
    }
    if path.exists() and not config.exploratory:
        held = _held(path)
        if held["asked"] != asked:
            _refuse_other(held, asked, path, config.file)
        mine = [one for one in looks(flat) if one.file_sha256 == hypothesis.sha256]
        written = {one.result for one in mine if not one.exploratory}
        if written and result_sha256(path) not in written:
            raise UserError(f"{path} was changed since it was written ({LEDGER} knows)")
        record(path, held, flat)  # a run cut short may not have
        return held, path
    if not config.exploratory and (picture := path.with_suffix(".png")).exists():
        raise UserError(f"{picture} exists, of something else; name another --out")
    question = hypothesis.wanted.question
    spent = [look for look in looks(flat[: len(checkpoints[0])]) if look.same(question, None)]
    if spent and not config.exploratory:
        _refuse_again(hypothesis, spent[-1])
    report = {
        "schema": SCHEMA,
        "asked": asked,
        "exploratory": config.exploratory,
        "commit": commit(),
        "code": code_sha256(),
        "question": question,
    }
    report |= decide(hypothesis, sides, config)
    held = [
        [look for look in looks([c]) if look.same(question, of)]
        for c, of in zip(flat, report["told"], strict=True)
    ]
    spent = [look for own in held[: len(checkpoints[0])] for look in own]
    if spent and not config.exploratory:
        _refuse_again(hypothesis, spent[-1])
    before = {(one.decision, one.file_sha256): None for own in held for one in own}
    report["before"] = [[decision, sha[:12]] for decision, sha in before]
    others = {one.file_sha256 for one in looks(flat)} - {hypothesis.sha256}
    report["claim_number"] = 1 + len(others)
    replace_text(path, json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
    record(path, report, flat)
    return report, path


def _refuse_again(hypothesis: Hypothesis, look: Look) -> NoReturn:
    """Raises UserError: the question has its answer."""
    raise UserError(
        f"the confirm pictures of --ckpt have answered {hypothesis.wanted.measure} of these heads "
        f"before ({LEDGER} beside it: {look.decision}, file sha256 {look.file_sha256[:12]}); "
        "whatever is asked again is exploratory: --exploratory decides it and says so"
    )


def code_sha256() -> str:
    """Of the source of both packages."""
    digest = hashlib.sha256()
    for name in ("superclip", "interp"):
        folder = Path(__file__).parents[1] / name
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def default_result(ckpt: Path, name: str) -> Path:
    """Where a decision stands."""
    return ckpt.parent / f"hypothesis-{name}.json"


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
        found += [f"{p.name} {file_sha256(p)}" for p in resumable(path.parent)]
    return found


def _options(hypothesis: Hypothesis) -> tuple[str, ...]:
    return MEASURES[hypothesis.wanted.measure].options


def _refuse_unlike(one: Checkpoint, other: Checkpoint, hypothesis: Hypothesis) -> None:
    """Raises UserError for an option in which two sides may not differ."""
    from superclip.config import differences

    assert one.config is not None and other.config is not None
    free = {"loss", "seed", *hypothesis.differs, *([] if hypothesis.same_rate else ["lr"])}
    found = differences(one.config, other.config)
    if odd := [line for line in found if line.partition(":")[0] not in free]:
        raise UserError(
            f"the sides differ in {odd[0]}; the claim is of losses alone"
            + (" at one rate" if hypothesis.same_rate else "")
            + f" (its file may list more: differs = [{odd[0].partition(':')[0]!r}])"
        )


def _held(path: Path) -> dict[str, Any]:
    from interp.render.claim import said

    try:
        held = json.loads(path.read_text())
        if held["schema"] != SCHEMA:
            raise ValueError(f"schema {held['schema']}")
        said(held, "")
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
    from superclip.evaluation.tasks import seeds_of_one_recipe
    from superclip.model.weights import load_checkpoint

    by_rate: dict[float, list[Checkpoint]] = {}
    rates = MEASURES[hypothesis.wanted.measure].rates
    for found in map(load_checkpoint, paths):
        assert found.weights_sha256  # taken while the weights are here
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
    import numpy as np

    from interp.measures import NothingToTell
    from superclip.evaluation.measures import Measure
    from superclip.evaluation.statistics import relabelled
    from superclip.evaluation.tasks import share_initial_weights

    measure = MEASURES[hypothesis.wanted.measure]
    models = [[_facts(c) for seed in side for c in seed] for side in sides]
    report: dict[str, Any] = {
        "hypothesis": {k: v for k, v in asdict(hypothesis).items() if k != "sha256"},
        "rule": hypothesis.rule,
        "unit": measure.unit,
        "chance": "0" if len(sides) == 2 else measure.chance_of(hypothesis.wanted),
        "level": measure.level,
        "models": models,
        "seeds": [len(side) for side in sides],
    }
    answers: list[list[Answer]] = []
    pictures: dict[str, Any] = {}
    try:
        if measure.rates:
            sides = [_best_first(side, hypothesis, config) for side in sides]
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
        return report | {
            "decision": "not decided",
            "nothing": str(error),
            "told": ["nothing"] * sum(map(len, models)),
        }
    name = hypothesis.wanted.measure
    arms = [[Measure(name, a.statistic, 0.0, percent=False) for a in arm] for arm in answers]
    paired = len(sides) == 2 and share_initial_weights(*([s[0] for s in side] for side in sides))
    found = compared(arms, hypothesis, config.draws, paired)
    least = min(map(len, arms))
    few = least < SEEDS and (least > 1 or len(arms) == 2)
    values = [[m.statistic.value for m in arm] for arm in arms]
    if not np.isfinite([found.low, found.high, *chain(*values)]).all():
        raise UserError(f"{name} is not finite for some model: {values}")
    sure = found.high - found.low > 1e-12
    flips = None
    decision: Decision = "not decided"
    if sure and not few:
        decision = hypothesis.decide(found.low, found.high)
        if least > 1:
            shifted = [[v - measure.level for v in values[0]], *values[1:]]
            flips = max(relabelled(shifted, edge, paired) for edge in hypothesis.edges(found.value))
            decision = decision if flips <= 0.05 else "not decided"
    return report | {
        "of": [[a.told for a in arm] for arm in answers],
        "courses": [[a.course for a in arm] for arm in answers],
        "values": values,
        "told": [a.told for arm, side in zip(answers, sides) for a, s in zip(arm, side) for _ in s],
        "flips": flips,
        "pictures": pictures,
        "paired": paired,
        **{k: getattr(found, k) for k in ("value", "low", "high", "freedom", "detectable")},
        "test": "bootstrap over pictures" if found.freedom is None else found.test,
        "power": chance_of_verdict(hypothesis, found),
        "too_few_seeds": few,
        "least_seeds": SEEDS,
        "no_spread": not sure,
        "decision": decision,
    }


def _best_first(
    side: list[list[Checkpoint]], hypothesis: Hypothesis, config: HypothesisConfig
) -> list[list[Checkpoint]]:
    """Each seed's models, that at the side's best rate of discovery first."""
    from interp.confirm import open_confirm
    from interp.measures import best_rate, discovery_recall
    from superclip.model.weights import load_checkpoint

    scores: dict[float, list[float]] = {}
    for one in (c for seed in side for c in seed):
        assert one.config is not None
        opened = open_confirm(load_checkpoint(one.path), hypothesis.wanted, config)
        scores.setdefault(one.config.lr, []).append(discovery_recall(opened))
    best = best_rate(scores)
    return [sorted(seed, key=lambda c: not (c.config and c.config.lr == best)) for seed in side]


def _measured(
    seed: Sequence[Checkpoint], hypothesis: Hypothesis, config: HypothesisConfig
) -> tuple[Answer, dict[str, Any]]:
    """What one seed's model(s) answer, and which pictures they saw."""
    from interp.confirm import grounding_sha256, open_confirm, pictures_sha256
    from interp.measures import ANSWERS
    from superclip.model.weights import load_checkpoint

    wanted = hypothesis.wanted
    models: list[Confirm] = [open_confirm(load_checkpoint(c.path), wanted, config) for c in seed]
    answer = ANSWERS[wanted.measure](models)
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


if __name__ == "__main__":
    run_command(main)
