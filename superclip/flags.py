"""argv (+ `--config FILE`, + `--recipe NAME`) -> config. The only file that knows flags exist."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import tyro

from superclip.config import OptimConfig, TrainConfig, owner_of_keys, to_dict, train_config
from superclip.errors import UserError, nearest
from superclip.loss_options import LOSS_OPTIONS

T = TypeVar("T")

TRAIN_HELP = """Train a CLIP-family model. With no flags: SuperCLIP on generated scenes, into logs/.

Precedence: defaults < --recipe NAME < --config FILE (TOML, or a run.json) < flags.
--recipe list shows the {recipes} published and shipped runs. Losses: {losses} (--loss NAME --help
shows its options).
"""


def parse(
    cls: Any,
    argv: Sequence[str],
    prog: str,
    description: str,
    default: Any = tyro.MISSING_NONPROP,
    known: Sequence[str] = (),
) -> Any:
    """`tyro.cli` with flat flag names; a mistake becomes a one-line `UserError` with the nearest
    flag.

    Args:
        cls: the dataclass to build.
        default: an instance that supplies the defaults.
        known: flag names for the "did you mean" line; taken from the dataclass where empty.
    """
    _refuse_odd_lists(cls, argv)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=list(argv),
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(captured.getvalue(), known or _names(cls))) from None


def _refuse_odd_lists(cls: Any, argv: Sequence[str]) -> None:
    """The last of two flags wins, as shell scripts count on; of two lists that would lose items.

    Raises:
        UserError: for a list flag given twice, or with nothing after it, which tyro takes for the
            default.
    """
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    lists = {f"--{f.name.replace('_', '-')}" for f in fields if str(f.type).startswith("tuple[")}
    for flag in lists:
        found = [k for k, item in enumerate(argv) if item.partition("=")[0] == flag]
        if len(found) > 1:
            raise UserError(f"{flag} is given twice; give it once, with all its items")
        if found and argv[found[0]] == flag and [*argv, "--"][found[0] + 1].startswith("--"):
            raise UserError(f"{flag} is empty; name something, or leave it out")


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _one_line(text: str, known: Sequence[str]) -> str:
    """The message in tyro's box as one line, with the nearest known flag where one is unknown."""
    lines = [line.strip("│ ").rstrip() for line in text.splitlines() if line.startswith("│")]
    rule = next((k for k, line in enumerate(lines) if line.startswith("───")), len(lines))
    message = " ".join(" ".join(lines[:rule]).split())
    if "nrecognized" in message:
        words = re.sub(r"^.*?options: |\(applied to [^)]*\)|Arguments are applied.*", "", message)
        flag = words.replace(",", " ").split()[0]
        hint = nearest(flag.lstrip("-").replace("-", "_"), known).replace("_", "-")
        return f"unknown option {flag}; {hint}"
    if message.startswith("Missing from"):
        missing = re.findall(r"--[\w-]+|\{[\w,]+\}", message)
        return f"required: {', '.join(missing) or message}; see --help"
    if typed := re.match(r"Error parsing (--[\w-]+): .*(int\(\)|float)[^:]*: (.*)", message):
        kind = "a number" if typed[2] == "float" else "a whole number"
        return f"{typed[1]} takes {kind}, not {typed[3]}"
    message = re.sub(r"\[/?(bold|italic|[a-z]+ [a-z]+)\]", "", message)
    return re.sub(r"^Error parsing \w+: ", "", message) or "the flags can't be read; see --help"


def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = resources.files("superclip") / "recipes"
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".toml")}


def read_recipe(name: str) -> dict[str, Any]:
    """Options of a shipped recipe, on top of those of the one that it extends.

    Raises:
        UserError: if there is none of this name.
    """
    known = recipes()
    if name not in known:
        raise UserError(f"--recipe {name!r} is unknown; {nearest(name, known)}, or --recipe list")
    own = read_config_file(known[name])
    if "extends" not in own:
        return own
    base = read_recipe(own.pop("extends"))
    return _for_loss(base, own.get("loss", base["loss"])) | own


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Options without the sections that they may stand in."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        section = key in ("options", "model", "data", "optim") and isinstance(value, dict)
        flat |= value if section else {key: value}
    return flat


def _for_loss(values: dict[str, Any], loss: str) -> dict[str, Any]:
    """Options without those of their own loss, if another one takes its place."""
    if loss == values.get("loss", loss):
        return values
    owners = owner_of_keys(values["loss"])
    kept = {k: v for k, v in values.items() if owners.get(k) != "options"}
    for tau in ("lr_tau", "lr_tau_schedule", "init_scale"):  # the temperature is the loss's, too
        kept.pop(tau, None)
    return kept


def _for_optimizer(values: dict[str, Any], optimizer: str | None) -> dict[str, Any]:
    """Options without those of their own optimizer, if another one takes its place."""
    if optimizer in (None, values.get("optimizer", OptimConfig.optimizer)):
        return values
    return {k: v for k, v in values.items() if k not in OF_THE_OPTIMIZER}


OF_THE_OPTIMIZER = "beta1", "beta2", "eps", "wd", "momentum", "nesterov"
"""Options whose meaning another optimizer does not share."""


def recipe_list() -> str:
    """Every recipe with the first line of its file."""
    known = recipes()
    told = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in known.items()}
    width = max(map(len, told))
    return "\n".join(f"{name:<{width}}  {told[name]}" for name in sorted(told))


def read_config_file(path: Path) -> dict[str, Any]:
    """Options of a TOML file or of a run's own `run.json`.

    Raises:
        UserError: if the file is missing, malformed or of another kind.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    try:
        if path.suffix == ".json":
            import json

            values = json.loads(text)
            values = dict(values.get("config", values))
            values.pop("overwrite", None)  # what that run was once allowed
            return values
        return tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is neither TOML nor a run.json: {error}") from None


def _peek(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag` and the remaining arguments."""
    rest, value, items = [], None, iter(argv)
    for item in items:
        if item.partition("=")[0] == flag:
            value = item.partition("=")[2] if "=" in item else next(items, None)
            if value is None:
                raise UserError(f"{flag} needs a value")
        else:
            rest.append(item)
    return value, rest


def parse_train(argv: Sequence[str]) -> TrainConfig[Any]:
    """Two passes: `--recipe`, `--config` and `--loss` fix the class and its defaults, then tyro
    reads the rest."""
    recipe, argv = _peek(argv, "--recipe")
    config, argv = _peek(argv, "--config")
    loss, argv = _peek(argv, "--loss")
    values: dict[str, Any] = {}
    if recipe == "list":
        print(recipe_list())
        raise SystemExit(0)
    if recipe is not None:
        values |= read_recipe(recipe)
        if _peek(argv, "--train-data")[0] is not None:  # its held-out data goes with its own
            values.pop("val_data", None)
    if config is not None:
        own = _flat(read_config_file(Path(config)))
        if values:
            values = _for_loss(values, own.get("loss", values["loss"]))
            values = _for_optimizer(values, own.get("optimizer"))
        values |= own
    if loss is not None:
        if loss not in LOSS_OPTIONS:
            raise UserError(f"--loss {loss!r} is unknown; {nearest(loss, LOSS_OPTIONS)}")
        values = _for_loss(values, loss) | {"loss": loss}
    values = _for_optimizer(values, _peek(argv, "--optimizer")[0])
    default = train_config(values, f"--config {config}" if config else f"--recipe {recipe}")
    cls = TrainConfig[LOSS_OPTIONS[default.loss]]
    _refuse_other_losses(argv, default.loss)
    description = TRAIN_HELP.format(recipes=len(recipes()), losses=", ".join(LOSS_OPTIONS))
    names = [*owner_of_keys(default.loss), "recipe", "config"]
    return parse(cls, argv, "python -m superclip.train", description, default, names)


SHORT = (
    "image_reduction",
    "text_reduction",
    "context_length",
    "pretrained",
    "init_from",
    "init_scale",
    "stage_two",
)
"""Options of a first stage that a second one does not inherit."""
MOST_STAGES = 9


def all_stages(argv: Sequence[str]) -> list[TrainConfig[Any]]:
    """The run of a command, and those that `--stage-two` chains to it."""
    stages = [parse_train(argv)]
    recipe, argv = _peek(argv, "--recipe")
    if _peek(argv, "--config")[0] is not None:
        recipe = None
    while (following := second_stage(stages[-1], recipe)) is not None:
        recipe = stages[-1].stage_two
        stages.append(following)
    return stages


def second_stage(config: TrainConfig[Any], recipe: str | None = None) -> TrainConfig[Any] | None:
    """The run that `--stage-two` names, if any: in OUT/stage2 (a third one in OUT/stage3).

    Where that is a recipe, what it only repeats of the first stage's `recipe` is as in this run: so
    flags that name other data or another model count for both.

    Raises:
        UserError: if its options are no options.
    """
    named = config.stage_two
    if not named:
        return None
    if named not in recipes() and not Path(named).is_file():
        raise UserError(
            f"--stage-two {named} is no file and no recipe; {nearest(named, recipes())}"
        )
    own = read_recipe(named) if named in recipes() else read_config_file(Path(named))
    if odd := [key for key, value in own.items() if "-" in key or isinstance(value, dict)]:
        raise UserError(
            f"--stage-two {named}: {odd[0]!r}: write options flat, with underscores (lr = 1e-4)"
        )
    for key in ("init_from", "out"):
        if key in own:
            raise UserError(f"--stage-two {named}: {key} is where the first stage ends; leave it")
    if named in recipes() and recipe in recipes():
        before = read_recipe(recipe)
        own = {k: v for k, v in own.items() if k in SHORT or before.get(k) != v}
        if config.data.train_data != before.get("train_data"):
            own.pop("val_data", None)
    kept = {k: v for k, v in _flat(to_dict(config)).items() if k not in SHORT}
    kept = _for_optimizer(kept, own.get("optimizer"))
    flat = _for_loss(kept, own.get("loss", config.loss)) | own
    begun = config.model.init_from
    later = begun is not None and config.out.parent in (begun.parent, begun.parent.parent)
    number = re.fullmatch(r"stage(\d+)", config.out.name) if later else None
    next_one = int(number[1]) + 1 if number else 2
    if next_one > MOST_STAGES:
        raise UserError(
            f"--stage-two {named}: more than {MOST_STAGES} stages; does a file name an earlier one?"
        )
    place = config.out.parent if number else config.out
    flat["out"] = str(place / f"stage{next_one}")
    flat["init_from"] = str(config.out / "final_epoch.pt")
    return train_config(flat, f"--stage-two {named}")


def _refuse_other_losses(argv: Sequence[str], loss: str) -> None:
    mine = owner_of_keys(loss)
    for other in LOSS_OPTIONS:
        for item in argv:
            name = item.split("=")[0].removeprefix("--").replace("-", "_")
            if item.startswith("--") and name in owner_of_keys(other) and name not in mine:
                raise UserError(
                    f"{item.split('=')[0]} belongs to --loss {other}; this run is --loss {loss}"
                )


def command_line() -> list[str]:
    """The command as typed, for the log."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
