"""A claim as a TOML file states it, and the rule that decides it."""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from superclip.errors import UserError, nearest
from superclip.loss_options import LOSS_OPTIONS

SCHEMA = 1
FEWEST = 40
"""Confirm pictures that a decision needs at least."""
KEYS = (
    *("schema", "claim", "why", "measure", "test", "margin"),
    *("pictures", "first", "second", "differs", "same_rate"),
)
"""Of a file; the first six must be given."""
Test = Literal["above", "below", "within"]
Decision = Literal["supported", "refuted", "not decided"]


LAYERS = ("all", "first half", "second half", "last", "all but the last")
"""Where a hypothesis may look for its head."""


@dataclass(frozen=True)
class Wanted:
    """What a hypothesis measures.

    Attributes:
        measure: name in `MEASURES`.
        heads: layers whose best head of discovery is measured. minus: layers (or "untrained") whose
            best head is taken off.
        attention: of the class token, or of the patches.
        pictures: of confirm; None: 1 000 scenes, or all of other data.
        kinds: of compositional questions.
        share: of its last value, at which a curve counts as there.
        rates: learning rates over which sensitivity is asked.
    """

    measure: str
    heads: str = "all"
    minus: str | None = None
    attention: str = "class"
    pictures: int | None = None
    kinds: tuple[str, ...] = ()
    share: float = 0.5
    rates: tuple[float, ...] = ()

    @property
    def question(self) -> dict[str, Any]:
        """What makes two claims ask the same of a model, whatever they expect and of how many
        pictures."""
        held = {k: v for k, v in asdict(self).items() if k != "pictures"}
        return held | {"kinds": sorted(self.kinds), "rates": sorted(self.rates)}


@dataclass(frozen=True)
class Measured:
    """A measure that a hypothesis may name.

    Attributes:
        unit: of its values. level: what a model that has learned nothing scores, which the value of
            one side is counted from. chance: that of the value, in words.
        options: of `Wanted`, that it reads beside `pictures`.
        rates: whether a seed has several checkpoints, at different learning rates.
    """

    unit: str
    chance: str
    options: tuple[str, ...] = ()
    rates: bool = False
    level: float = 0.0

    def chance_of(self, wanted: Wanted) -> str:
        """`chance`, or that it is another where unlike numbers of heads are chosen from."""
        alike = wanted.minus is None or wanted.minus == "untrained"
        return self.chance if alike else "0 of equally many heads; below 0 of fewer"


MEASURES: Mapping[str, Measured] = {
    "excess": Measured("excess", "0", ("heads", "minus", "attention")),
    "depth": Measured("of the depth", "none", ("attention",)),
    "onset": Measured("steps", "none", ("attention", "share")),
    "causal": Measured("margin", "0, of a head like its layer's", ("heads", "attention")),
    "binding": Measured("share right", "0, from .5", ("kinds",), level=0.5),
    "sensitivity": Measured("R@1", "0", ("rates",), rates=True),
}


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
        differs: options in which two sides may differ, beside loss, its own options and rate.
        same_rate: whether the learning rate must be the same for both.
        why: of the margin, and whatever a reader should know.
        sha256: of the file.
    """

    claim: str
    test: Test
    margin: float
    wanted: Wanted
    losses: tuple[str | None, ...]
    differs: tuple[str, ...]
    same_rate: bool
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

    def edges(self, value: float) -> tuple[float, ...]:
        """The margin(s) that a value must be told from: of `within` both, from inside."""
        if self.test != "within":
            return (self.margin,)
        inside = abs(value) < self.margin
        return (-self.margin, self.margin) if inside else (math.copysign(self.margin, value),)

    @property
    def rule(self) -> str:
        """What is claimed, in numbers."""
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
    try:
        data = path.read_bytes()
        held = tomllib.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no hypothesis file: {str(error)[:200]}") from None

    def take(key: str, kind: type, default: Any = None) -> Any:
        value = held.pop(key, default)
        if kind is float and type(value) is int and abs(value) < 1e9:
            value = float(value)
        empty = isinstance(value, str) and not (value.strip() and value.isprintable())
        if type(value) is not kind or empty:
            told = f"{value!r}"[:80]
            raise UserError(f"{path}: {key} must be given, as {kind.__name__}; it is {told}")
        return value

    known = (*KEYS, *{option for one in MEASURES.values() for option in one.options})
    if unknown := next((key for key in held if key not in known), None):
        raise UserError(f"{path}: {unknown!r} is no key; {nearest(unknown, known)}")
    if missing := [key for key in KEYS[:6] if key not in held]:
        raise UserError(f"{path}: {' and '.join(missing)} must be given")
    if type(schema := held.pop("schema")) is not int or schema != SCHEMA:
        raise UserError(f"{path} is of schema {schema}; this version reads schema {SCHEMA}")
    claim, test, why = take("claim", str), take("test", str), take("why", str)
    margin, measure = take("margin", float), take("measure", str)
    losses: tuple[str | None, ...] = (None,)
    if "first" in held or "second" in held:
        first = take("first", str)
        losses = (first, take("second", str)) if "second" in held else (first,)
    differs = take("differs", list, []) if len(losses) == 2 else []
    same_rate = take("same_rate", bool, False) if len(losses) == 2 else False
    if measure not in MEASURES:
        raise UserError(f"{path}: measure {measure!r} is unknown; {nearest(measure, MEASURES)}")
    options: dict[str, Any] = {}
    kinds_of = {"pictures": int, "kinds": list, "share": float, "rates": list}
    for key in ("pictures", *MEASURES[measure].options):
        if key in held:
            options[key] = take(key, kinds_of.get(key, str))
    if held:
        reads = ", ".join(("pictures", *MEASURES[measure].options))
        raise UserError(f"{path}: {next(iter(held))!r} is nothing that {measure} reads ({reads})")
    kinds = options.get("kinds", ["any"])
    if not kinds or not all(type(k) is str for k in kinds) or len({*kinds}) < len(kinds):
        raise UserError(f"{path}: kinds must name some, each once; it is {kinds!r}"[:200])
    options["kinds"] = tuple(options.get("kinds", ()))
    if MEASURES[measure].rates:
        rates = options.get("rates", [])
        good = all(type(r) is float and 0 < r < math.inf for r in rates)
        if len({*rates}) < 3 or len({*rates}) < len(rates) or not good:
            raise UserError(f"{path}: rates must be three numbers at least; it is {rates!r}"[:200])
        options["rates"] = tuple(rates)
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
    if wanted.pictures is not None and not FEWEST <= wanted.pictures <= 10**7:
        raise UserError(f"{path}: pictures {wanted.pictures} must lie in {FEWEST}..10^7")
    if wanted.minus == wanted.heads:
        raise UserError(f"{path}: heads and minus are both {wanted.minus!r}; nothing is left")
    digest = hashlib.sha256(data).hexdigest()
    return Hypothesis(claim, test, margin, wanted, losses, tuple(differs), same_rate, why, digest)
