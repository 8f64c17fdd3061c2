"""What is measured on held-out data while a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from superclip.data.batch import Source
from superclip.evaluation.encode import Encoder
from superclip.evaluation.retrieval import NAMES, retrieve
from superclip.model.superclip import SuperCLIP

SHORT = {"image-to-text ": "i2t_", "text-to-image ": "t2i_", " ": "_"}


@runtime_checkable
class Evaluator(Protocol):
    """`names` are known beforehand; `run` yields each with its value, the same on every rank."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def described(self) -> str:
        """What is measured on how much, in one line."""
        ...

    def run(self, model: SuperCLIP) -> Iterator[tuple[str, float]]: ...


def run_evaluators(
    evaluators: Iterable[Evaluator], model: SuperCLIP
) -> Iterator[tuple[str, float]]:
    """All metrics of all evaluators, the model in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        for evaluator in evaluators:
            yield from evaluator.run(model)
    finally:
        model.train(training)


@dataclass(frozen=True)
class Retrieval:
    """Retrieval of held-out data, every caption counted."""

    name: str
    source: Source
    encoder: Encoder
    pool: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._short(name) for name in NAMES)

    @property
    def described(self) -> str:
        n = self.source.num_images
        pool = min(self.pool or n, n)
        pools = f", in pools of {pool}" if pool < n else ""
        return (
            f"{self.name}_: retrieval on {self.source.name}, n = {n} pictures{pools}; chance of "
            f"R@1 about {1 / max(pool, 1):.2g}"
        )

    def run(self, model: SuperCLIP) -> Iterator[tuple[str, float]]:
        for measure in retrieve(model, self.encoder, self.source, pool=self.pool).measures:
            yield self._short(measure.name), measure.statistic.value

    def _short(self, name: str) -> str:
        for long, short in SHORT.items():
            name = name.replace(long, short)
        return f"{self.name}_{name}"
