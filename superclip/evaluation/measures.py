"""A number that still knows what each picture adds to it.

Every statistic here is a function of how often each picture counts. All of them once is the
estimate; weights drawn from a multinomial are a bootstrap in which captions stay with their
picture; the same weights for two models are a paired bootstrap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

Weights = Float[np.ndarray, "draws n"]
Values = Float[np.ndarray, " draws"]


class Statistic(ABC):
    """A function of the pictures' weights.

    Attributes:
        pictures: how many there are; `n` below.
        queries: how many single answers stand behind the number.
    """

    pictures: int

    @property
    @abstractmethod
    def queries(self) -> int: ...

    @abstractmethod
    def __call__(self, weights: Weights) -> Values:
        """The statistic when picture i counts `weights[:, i]` times."""

    @property
    def value(self) -> float:
        """The estimate: every picture once."""
        return float(self(np.ones((1, self.pictures)))[0])


@dataclass(frozen=True, eq=False)
class Mean(Statistic):
    """Mean over queries.

    Attributes:
        values: one a query (a hit, a reciprocal rank, ...).
        picture: the picture of each query, in [0, pictures).
    """

    values: Float[np.ndarray, " q"]
    picture: Int[np.ndarray, " q"]
    pictures: int

    @property
    def queries(self) -> int:
        return len(self.values)

    @property
    def sums(self) -> Float[np.ndarray, " n"]:
        """Sum of each picture's values."""
        return np.bincount(self.picture, weights=self.values, minlength=self.pictures)

    @property
    def counts(self) -> Float[np.ndarray, " n"]:
        """Queries of each picture."""
        return np.bincount(self.picture, minlength=self.pictures).astype(float)

    def __call__(self, weights: Weights) -> Values:
        total = weights @ self.counts
        return np.divide(weights @ self.sums, total, np.full(len(weights), np.nan), where=total > 0)


@dataclass(frozen=True, eq=False)
class Median(Statistic):
    """Median over queries: the mean of the two middle ones, as `np.median` has it."""

    values: Float[np.ndarray, " q"]
    picture: Int[np.ndarray, " q"]
    pictures: int

    @property
    def queries(self) -> int:
        return len(self.values)

    def __call__(self, weights: Weights) -> Values:
        order = np.argsort(self.values, kind="stable")
        ranked, owner = self.values[order], self.picture[order]
        found = np.full(len(weights), np.nan)
        for row, weight in enumerate(weights):
            upto = np.cumsum(weight[owner])
            if upto[-1] > 0:
                half = upto[-1] / 2
                low = np.searchsorted(upto, half - 1e-9 * upto[-1])
                high = np.searchsorted(upto, half + 1e-9 * upto[-1])
                found[row] = (ranked[low] + ranked[min(high, len(ranked) - 1)]) / 2
        return found


@dataclass(frozen=True, eq=False)
class PerPicture(Statistic):
    """A statistic of what each picture adds once.

    Attributes:
        values: of each picture one, or a row of them.
    """

    values: Float[np.ndarray, "n ..."]

    @property
    def pictures(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.values)

    @property
    def queries(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class ClassMean(PerPicture):
    """Mean over classes of the mean over a class's pictures (mean per-class recall).

    Classes that a draw leaves empty are left out of it; classes without any picture, always.

    Attributes:
        values: one a picture. label: its class.
    """

    label: Int[np.ndarray, " n"]

    def __call__(self, weights: Weights) -> Values:
        order = np.argsort(self.label, kind="stable")
        _, starts = np.unique(self.label[order], return_index=True)
        drawn = weights[:, order]
        size = np.add.reduceat(drawn, starts, axis=1)
        hits = np.add.reduceat(drawn * self.values[order], starts, axis=1)
        share = np.divide(hits, size, np.full(size.shape, np.nan), where=size > 0)
        return np.nanmean(share, axis=1)


@dataclass(frozen=True, eq=False)
class MeanAveragePrecision(Statistic):
    """Mean over classes of the average precision of ranking pictures by a class's score.

    Wrong pictures that tie with a right one stand before it. Classes without a picture, in the data
    or in a draw, are left out.

    Attributes:
        scores, right: `[n, c]`, a class's score of each picture and whether it is there.
    """

    scores: Float[np.ndarray, "n c"]
    right: Bool[np.ndarray, "n c"]

    @property
    def pictures(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.scores)

    @property
    def queries(self) -> int:
        return int(self.right.any(0).sum())

    def per_class(self, weights: Weights) -> Float[np.ndarray, "draws c"]:
        """Average precision of every class; NaN where it has no picture."""
        found = np.full((len(weights), self.scores.shape[1]), np.nan)
        for c in np.flatnonzero(self.right.any(0)):
            order = np.lexsort((self.right[:, c], -self.scores[:, c]))
            weight, right = weights[:, order], self.right[order, c]
            mine = weight[:, right]
            above = np.cumsum(mine, axis=1)
            total = np.cumsum(weight, axis=1)[:, right]
            precision = np.divide(above, total, np.zeros_like(above), where=total > 0)
            size = mine.sum(1)
            found[:, c] = np.divide(
                (mine * precision).sum(1), size, np.full(len(size), np.nan), where=size > 0
            )
        return found

    def __call__(self, weights: Weights) -> Values:
        return np.nanmean(self.per_class(weights), axis=1)


@dataclass(frozen=True)
class Measure:
    """One row of an evaluation.

    Attributes:
        name: what it is ("image-to-text R@1").
        statistic: the number, and how it depends on the pictures.
        chance: what a model that has learned nothing scores.
        percent: whether it is a share, shown as 0 to 100.
        higher_is_better: False for ranks.
        hits: whether each value is 0 or 1, so that two models compare by McNemar's test.
        candidates: how many things a query is ranked among (one pool), where that means anything.
    """

    name: str
    statistic: Statistic
    chance: float
    percent: bool = True
    higher_is_better: bool = True
    hits: bool = False
    candidates: int | None = None


@dataclass(frozen=True)
class Result:
    """What one task says of one model.

    Attributes:
        task: retrieval, zeroshot, compositional or probe.
        data: what was looked at, as plain values (name, sha256, protocol, missing pictures, ...);
            two models compare only where it is equal.
        measures: the rows.
        notes: further plain values for the report (ceilings, per-class tables, ...).
    """

    task: str
    data: dict[str, object]
    measures: list[Measure]
    notes: dict[str, object] = field(default_factory=dict)
