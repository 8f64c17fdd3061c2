"""The measures that a hypothesis file may name, each of one seed's model(s)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from interp.confirm import Confirm
from interp.stats.intervals import first_held
from interp.stats.splits import assign_split
from interp.subject import open_pictures
from superclip.data.batch import Source
from superclip.errors import UserError
from superclip.evaluation.measures import Mean, PerPicture, Statistic, Values, Weights


class NothingToTell(Exception):
    """Why a measure says nothing of a model."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a measure tells of one seed.

    Attributes:
        statistic: its value and spread over pictures.
        told: what it is of: the head, the rates.
        course: name of an axis, places on it, and what is there: the mean excess of all heads, or
            R@1 along learning rates.
    """

    statistic: Statistic
    told: str
    course: tuple[str, list[float], list[float]] | None = None


@dataclass(frozen=True, eq=False)
class OfMeans(PerPicture):
    """A function of the means of `k` values a picture.

    Attributes:
        values: of each picture.
        function: `[..., k]` means -> `[...]`.
    """

    function: Callable[[np.ndarray], np.ndarray]

    def __call__(self, weights: Weights) -> Values:
        return self.function(weights @ self.values / weights.sum(1, keepdims=True))


def _grounded(one: Confirm) -> Float[np.ndarray, "n l"]:
    """Mean excess of each layer's heads.

    Raises:
        NothingToTell: if their mean is not above 0 beyond doubt: where there is no grounding, there
            is none to lie early or late.
    """
    layers = one.grounding.values.mean(axis=2)
    whole = layers.mean(axis=1)
    if whole.mean() <= 3 * whole.std(ddof=1) / np.sqrt(len(whole)):
        name = one.found.path.parent.name
        raise NothingToTell(f"{name} does not ground: mean excess {whole.mean():.4f}")
    return layers


def excess(models: Sequence[Confirm]) -> Answer:
    """Excess of the head that discovery chose, less that of another."""
    (one,) = models
    head = one.chosen(one.wanted.heads)
    values, told = one.grounding.values[:, head.layer, head.index], str(head)
    if one.wanted.minus == "untrained":
        other, name = one.untrained()
        values, told = values - other, f"{told} - {name}"
    elif one.wanted.minus is not None:
        less = one.chosen(one.wanted.minus)
        values = values - one.grounding.values[:, less.layer, less.index]
        told = f"{told} - {less}"
    return Answer(_mean(values), told)


def depth(models: Sequence[Confirm]) -> Answer:
    """Where in depth the grounding lies: mean of (layer + 1) / layers, weighted by each layer's
    mean excess over its heads."""
    (one,) = models
    layers = _grounded(one)
    place = np.arange(1, layers.shape[1] + 1) / layers.shape[1]
    mean = layers.mean(axis=0)
    told = "layers " + " ".join(f"{value:.3f}" for value in mean)
    statistic = OfMeans(layers, lambda means: means @ place / means.sum(-1))
    return Answer(statistic, told, ("layer", [*range(len(mean))], mean.tolist()))


def onset(models: Sequence[Confirm]) -> Answer:
    """Optimizer step from which on the mean excess of all heads holds a share of its last value;
    linear between checkpoints, and from 0 at step 0."""
    from interp.timeline import numbered
    from superclip.model.weights import load_checkpoint

    (one,) = models
    if one.found.path.name != "final_epoch.pt":
        raise UserError(f"{one.found.path}: name final_epoch.pt, which stands for its run's course")
    _grounded(one)
    curves: dict[int, np.ndarray] = {}
    for step, path in numbered(one.found.path.parent / "*.pt"):
        if step not in curves:  # the last step may end an epoch
            other = replace(one, found=load_checkpoint(path))
            curves[step] = other.grounding.values.mean(axis=(1, 2))
    steps = np.array([0.0, *curves])
    told = f"checkpoints at {' '.join(map(str, curves))}"
    values = np.stack([*curves.values()], 1)
    statistic = OfMeans(values, _reached(steps, one.wanted.share))
    return Answer(statistic, told, ("optimizer step", [*curves], values.mean(axis=0).tolist()))


def _reached(steps: np.ndarray, share: float) -> Callable[[np.ndarray], np.ndarray]:
    def reached(means: np.ndarray) -> np.ndarray:
        curve = np.concatenate([np.zeros((*means.shape[:-1], 1)), means], -1)
        level, ends = share * curve[..., -1:], curve[..., -1] > 0
        at = np.maximum(first_held(curve >= level), 1)
        at = np.where(ends, at, len(steps) - 1)[..., None]
        low, high = (np.take_along_axis(curve, at - k, -1) for k in (1, 0))
        part = np.clip((level - low) / np.where(high > low, high - low, 1), 0, 1)
        part = np.where(ends[..., None], part, 1)  # a curve that ends at 0 is never there
        return (steps[at - 1] + part * (steps[at] - steps[at - 1]))[..., 0]

    return reached


def causal(models: Sequence[Confirm]) -> Answer:
    """Loss of contrastive margin under mean ablation of the head that discovery chose, less the
    mean loss over the other heads of its layer."""
    from interp.causal.ablation import contrastive_margin
    from interp.causal.sweep import ablated_embeddings
    from interp.causal.units import Ablation, every, mean_activations

    (one,) = models
    swept, head = one.swept, one.chosen(one.wanted.heads)
    if swept.tower.cfg.n_heads < 2:
        raise UserError("causal compares with the other heads of a layer; here is one a layer")
    means = mean_activations(swept.tower, swept.batches(swept.rows("discovery"), "means"))[0]
    units = every(swept.tower.cfg, "head")
    captions = [one.source.read(row).captions for row in one.rows]
    owner = torch.tensor([k for k, own in enumerate(captions) for _ in own], device=swept.device)
    texts = swept.encoder.texts(swept.model, [text for own in captions for text in own])
    size, chunks = one.config.batch_size, []
    for start in range(0, len(one.rows), size):
        chunks.append(one.rows[start : start + size])
    pictures = replace(swept, source=one.source).pictures(chunks)
    found = ablated_embeddings(swept.tower, pictures, Ablation("mean", "all", means), units)

    def margin(features: torch.Tensor) -> np.ndarray:
        return contrastive_margin(features.to(texts), texts, owner).double().cpu().numpy()

    intact = margin(found.intact)
    losses = np.stack([intact - margin(features) for features in found.features[0]], 1)
    heads = [unit.heads[0] for unit in units]
    layer = np.array([h.layer for h in heads])
    lead = np.empty_like(losses)
    for k in range(len(heads)):
        beside = (layer == layer[k]) & (np.arange(len(heads)) != k)
        lead[:, k] = losses[:, k] - losses[:, beside].mean(axis=1)
    passes = int((lead.mean(0) > 1.96 * lead.std(0, ddof=1) / np.sqrt(len(lead))).sum())
    mine = heads.index(head)
    means = losses.mean(0)
    place = int((means > means[mine]).sum()) + 1
    told = f"{head}, number {place} of {len(heads)} by loss; {passes} heads lie 1.96 standard "
    told += f"errors above the rest of their layer (by chance about {len(heads) / 40:.1f})"
    return Answer(_mean(lead[:, mine]), told)


def binding(models: Sequence[Confirm]) -> Answer:
    """Mean over kinds of compositional question of the share answered right."""
    from superclip.data.scene_checks import KINDS, scene_checks
    from superclip.data.scenes import Scenes
    from superclip.evaluation.compositional import compositional

    (one,) = models
    if not isinstance(one.source, Scenes):
        raise UserError(f"binding asks questions about scenes; {one.source.name} are none")
    kinds = one.wanted.kinds or tuple(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    mine, every = set(one.rows), scene_checks(one.source)
    items = tuple(i for i in every.items if i.row in mine and i.category in kinds)
    found = compositional(one.found.model, one.encoder, replace(every, items=items))
    (mean,) = (m.statistic for m in found.measures if m.name == "mean over categories")
    return Answer(mean, f"{len(items)} questions: {', '.join(sorted(kinds))}")


def sensitivity(models: Sequence[Confirm]) -> Answer:
    """How much the learning rate matters: image-to-text R@1 at the best rate, less its mean over
    all rates of the claim. `models` are one a rate, the best rate first (see `best_rate`).

    The mean takes in the best rate itself and does not depend on which it is: where two rates are
    alike, whichever the draw of the seeds calls best, the value is nearly the same.
    """
    rates = sorted(one.found.config.lr for one in models if one.found.config)
    asked = sorted(models[0].wanted.rates)
    if len(rates) != len(asked) or not np.allclose(rates, asked, rtol=1e-6):
        told = " ".join(f"{rate:g}" for rate in asked)
        raise UserError(f"the claim is of the learning rates {told}; give each, once a seed")
    columns = np.stack([_hits(one, one.source, one.rows) for one in models])
    best = models[0].found.config
    assert best is not None
    told = f"best of {len(rates)}: {best.lr:g}"
    course = sorted(
        (one.found.config.lr, float(hits.mean()))
        for one, hits in zip(models, columns)
        if one.found.config
    )
    at, recalls = (list(values) for values in zip(*course))
    statistic = _mean(columns[0] - columns.mean(axis=0))
    return Answer(statistic, told, ("learning rate", at, recalls))


def best_rate(scores: Mapping[float, Sequence[float]]) -> float:
    """The rate of highest mean R@1 over seeds, on discovery pictures.

    Raises:
        NothingToTell: if it is the first or the last: a better one may lie beyond.
    """
    means = {rate: float(np.mean(own)) for rate, own in sorted(scores.items())}
    best = max(means, key=lambda rate: means[rate])
    if best in (min(means), max(means)):
        told = ", ".join(f"{rate:g}: {100 * score:.1f}" for rate, score in means.items())
        raise NothingToTell(f"the best learning rate ends the range (R@1 on discovery: {told})")
    return best


def discovery_recall(one: Confirm) -> float:
    """R@1 on the discovery pictures of a sweep."""
    assert one.found.config is not None
    source, rows = open_pictures(None, None, None, None, one.found.config.data)
    mine = [row for row in rows if assign_split(source.keys[row]) == "discovery"]
    return float(_hits(one, source, mine).mean())


def _hits(one: Confirm, source: Source, rows: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Whether each picture's first caption is its own."""
    from superclip.evaluation.retrieval import retrieve

    found = retrieve(one.found.model, one.encoder, source, rows=rows)
    (hits,) = (m.statistic for m in found.measures if m.name == "image-to-text R@1")
    assert isinstance(hits, Mean)
    return hits.sums / np.maximum(hits.counts, 1)


def _mean(values: np.ndarray) -> Mean:
    return Mean(values, np.arange(len(values)), len(values))


ANSWERS: Mapping[str, Callable[[Sequence[Confirm]], Answer]] = {
    "excess": excess,
    "depth": depth,
    "onset": onset,
    "causal": causal,
    "binding": binding,
    "sensitivity": sensitivity,
}
"""Of every measure that a file may name (`claim.MEASURES`): the checkpoints of one seed -> its
answer."""
