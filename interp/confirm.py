"""What one model does on the confirm pictures: the measures that a hypothesis file may name.

Of generated scenes the confirm pictures are a split of their own, which no other command reads. Of
other data they are the fifth, by the hash of their ids, that no sweep scores (superclip.evaluate,
which retrieves among all held-out pictures, does read them). Heads and learning rates are chosen on
discovery pictures; confirm pictures only judge.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from interp.collect import (
    Subject,
    attention_maps,
    boxes_on_grid,
    exchangeable,
    usable_batches,
)
from interp.comparison import influence
from interp.config import HypothesisConfig, OfSweep
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.stats.intervals import first_held
from interp.stats.splits import assign_split, strata
from interp.subject import default_folder, open_pictures, subject_of, trained_ids
from superclip.config import is_scenes
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError
from superclip.evaluation.measures import Mean, Statistic, Values, Weights
from superclip.ops.world import choose_device

if TYPE_CHECKING:
    from interp.swept import Swept
    from superclip.data.batch import Record, Source
    from superclip.evaluation.encode import Encoder
    from superclip.model.weights import Checkpoint

FEWEST = 40
"""Confirm pictures that a decision needs at least."""
SCENES_READ = 1000
UNTRAINED = 5
"""Untrained towers that a contrast needs at least."""
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
    """

    measure: str
    heads: str = "all"
    minus: str | None = None
    attention: str = "class"
    pictures: int | None = None
    kinds: tuple[str, ...] = ()
    share: float = 0.5

    @property
    def question(self) -> dict[str, Any]:
        """What makes two claims ask the same of a model, whatever they expect and of how many
        pictures."""
        return {k: v for k, v in asdict(self).items() if k != "pictures"}


@dataclass(frozen=True)
class Grounding:
    """Attention and boxes of the confirm pictures that have an object.

    Attributes:
        values: what each picture adds to the excess of each head.
        ids: of those pictures.
    """

    values: Float[np.ndarray, "n l h"]
    ids: list[str]


class NothingToTell(Exception):
    """Why a measure says nothing of a model."""


@dataclass(frozen=True, eq=False)
class OfMeans(Statistic):
    """A function of the means of `k` values a picture.

    Attributes:
        values: of each picture.
        function: `[..., k]` means -> `[...]`.
    """

    values: Float[np.ndarray, "n k"]
    function: Callable[[np.ndarray], np.ndarray]

    @property
    def pictures(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.values)

    @property
    def queries(self) -> int:
        return len(self.values)

    def __call__(self, weights: Weights) -> Values:
        return self.function(weights @ self.values / weights.sum(1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Confirm:
    """A checkpoint, and the confirm pictures of its held-out data.

    Attributes:
        found: the checkpoint. source: the pictures; `rows` of them are of confirm.
    """

    found: Checkpoint
    source: Source
    rows: list[int]
    wanted: Wanted
    config: HypothesisConfig

    @cached_property
    def subject(self) -> Subject:
        return subject_of(self.found)

    @cached_property
    def swept(self) -> Swept:
        """The sweep beside the checkpoint, whose discovery pictures choose.

        Raises:
            UserError: as `open_swept`.
        """
        from interp.swept import open_swept

        of = OfSweep(
            self.found.path,
            default_folder(self.found.path, self.wanted.attention),
            device=self.config.device,
            batch_size=self.config.batch_size,
        )
        return open_swept(of)

    @cached_property
    def grounding(self) -> Grounding:
        self.found.model.to(choose_device(self.config.device))
        return self.ground(HookedVisionTransformer(self.found.model.clip.visual))

    def ground(self, tower: HookedVisionTransformer) -> Grounding:
        """The excess of a tower's heads, picture by picture."""
        device, preprocess = choose_device(self.config.device), self.found.preprocess
        model, maps = self.found.model.to(device), []
        records: list[Record] = []
        batches = usable_batches(
            *(self.source, preprocess, self.rows),
            self.config.batch_size,
            Counter(),
            f"confirm, {self.found.path.parent.name}",
        )
        for pixels, some in batches:
            images = model.normalise(torch.from_numpy(pixels).to(device))
            kind: Any = self.wanted.attention
            maps.append(attention_maps(tower, images, kind)[0])
            records += [replace(record, picture=b"") for record in some]
        if len(records) < FEWEST:
            raise UserError(
                f"{self.source.name}: {len(records)} confirm pictures with objects; {FEWEST} are "
                "needed"
            )
        grid = tower.cfg.grid
        boxes = [boxes_on_grid(record, preprocess, grid)[:2] for record in records]
        coverage, valid = (np.stack(part).astype(np.float32) for part in zip(*boxes))
        stratum = strata(*exchangeable(records, preprocess, grid, coverage, valid))
        kept = stratum >= 0
        values = influence(np.concatenate(maps), coverage, valid, stratum)
        return Grounding(values[kept], [r.key for r, k in zip(records, kept) if k])

    def chosen(self, layers: str) -> Head:
        """The best head of discovery among these layers."""
        results = self.swept.results
        mean = results.metrics["excess"][results.rows("discovery")].astype(np.float64).mean(axis=0)
        within = layers_of(layers, len(mean))
        if not within.any():
            raise UserError(f"heads {layers!r}: a tower of {len(mean)} layer(s) has none")
        best = np.where(within[:, None], mean, -np.inf).argmax()
        return Head(*(int(i) for i in np.unravel_index(best, mean.shape)))

    def untrained(self) -> tuple[Float[np.ndarray, " n"], str]:
        """The excess of the untrained tower's head that discovery found best, of all that the sweep
        looked at."""
        from superclip.model.factory import build_clip

        facts = self.swept.results.manifest["untrained"]
        if len(facts) < UNTRAINED:
            raise UserError(
                f"{self.swept.folder} has {len(facts)} untrained towers, {UNTRAINED} are needed; "
                "interp.sweep --overwrite sweeps them"
            )
        best = max(facts, key=lambda f: f["discovery_excess"])
        subject, head = self.subject, Head.parse(best["head"])
        clip = build_clip(subject.model_config, best["seed"], subject.init_scale).eval()
        visual = clip.visual.to(choose_device(self.config.device))
        found = self.ground(HookedVisionTransformer(visual))
        told = f"{head} of seed {best['seed']}, best of {len(facts)} untrained towers"
        return found.values[:, head.layer, head.index], told

    @cached_property
    def encoder(self) -> Encoder:
        from superclip.data.loader import tokenizer_for
        from superclip.evaluation.encode import Encoder
        from superclip.model.factory import tokenizer

        device = choose_device(self.config.device)
        self.found.model.to(device)
        tokenize = tokenizer_for(tokenizer(self.found.model_config))
        return Encoder(self.found.preprocess, tokenize, device)


def layers_of(name: str, depth: int) -> Bool[np.ndarray, " l"]:
    """Which layers a name stands for.

    >>> layers_of("first half", 5).tolist()
    [True, True, False, False, False]
    """
    layer = np.arange(depth)
    return {
        "all": layer >= 0,
        "first half": layer < depth // 2,
        "second half": layer >= depth // 2,
        "last": layer == depth - 1,
        "all but the last": layer < depth - 1,
    }[name]


def open_confirm(found: Checkpoint, wanted: Wanted, config: HypothesisConfig) -> Confirm:
    """The confirm pictures of a checkpoint's held-out data.

    Raises:
        UserError: if they are too few, or some of them were trained on.
    """
    assert found.config is not None
    run = found.config.data
    held_out = run.val_data or held_out_spec(run.train_data)
    if is_scenes(held_out):
        source = open_source("scenes:confirm", wanted.pictures or SCENES_READ, run.data_seed, True)
        return Confirm(found, source, list(range(source.num_images)), wanted, config)
    source, rows = open_pictures(None, None, None, None, run)
    trained, keys = trained_ids(run, False), source.keys
    mine = [row for row in rows if assign_split(keys[row]) == "confirm"]
    if wanted.pictures is not None and wanted.pictures > len(mine):
        raise UserError(f"{source.name} has {len(mine)} confirm pictures, not {wanted.pictures}")
    mine = mine[: wanted.pictures]
    if both := [keys[row] for row in mine if keys[row] in trained]:
        raise UserError(f"{found.path} was trained on {len(both)} confirm pictures, as {both[0]}")
    if len(mine) < FEWEST:
        raise UserError(f"{source.name}: {len(mine)} confirm pictures; {FEWEST} are needed")
    return Confirm(found, source, mine, wanted, config)


def pictures_sha256(asked: Confirm) -> str:
    """Of the confirm pictures' ids and their data."""
    ids = [asked.source.keys[row] for row in asked.rows]
    return hashlib.sha256("\n".join([asked.source.digest, *ids]).encode()).hexdigest()


def grounding_sha256(asked: Confirm) -> str | None:
    """Of the pictures that a measure of grounding kept; None if none was taken."""
    if "grounding" not in vars(asked):
        return None
    return hashlib.sha256("\n".join(asked.grounding.ids).encode()).hexdigest()


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


def excess(models: Sequence[Confirm]) -> tuple[Statistic, str]:
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
    return _mean(values), told


def depth(models: Sequence[Confirm]) -> tuple[Statistic, str]:
    """Where in depth the grounding lies: mean of (layer + 1) / layers, weighted by each layer's
    mean excess over its heads."""
    (one,) = models
    layers = _grounded(one)
    place = np.arange(1, layers.shape[1] + 1) / layers.shape[1]
    told = "layers " + " ".join(f"{mean:.3f}" for mean in layers.mean(0))
    return OfMeans(layers, lambda means: means @ place / means.sum(-1)), told


def onset(models: Sequence[Confirm]) -> tuple[Statistic, str]:
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
    return OfMeans(np.stack([*curves.values()], 1), _reached(steps, one.wanted.share)), told


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


def causal(models: Sequence[Confirm]) -> tuple[Statistic, str]:
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
    place = int((losses.mean(0) > losses[:, mine].mean()).sum()) + 1
    told = f"{head}, number {place} of {len(heads)} by loss"
    told += f"; {passes} heads cost more than the rest of their layer"
    return _mean(lead[:, mine]), told


def binding(models: Sequence[Confirm]) -> tuple[Statistic, str]:
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
    return mean, f"{len(items)} questions"


def sensitivity(models: Sequence[Confirm]) -> tuple[Statistic, str]:
    """How much the learning rate matters: image-to-text R@1 at the best rate, less its mean at half
    and at twice of it. `models` are those three, the best one first (see `best_rate`)."""
    columns = [_hits(one, one.source, one.rows) for one in models]
    rates = " ".join(f"{one.found.config.lr:g}" for one in models if one.found.config)
    return _mean(columns[0] - (columns[1] + columns[2]) / 2), f"best, half, twice: {rates}"


def best_rate(side: Mapping[float, Sequence[Confirm]]) -> tuple[float, float, float]:
    """The rate of highest mean R@1 over seeds, on discovery pictures; with its half and its double.

    Raises:
        UserError: if those two are not among the rates.
    """
    scores = {rate: float(np.mean([_discovery(one) for one in own])) for rate, own in side.items()}
    best = max(scores, key=lambda rate: scores[rate])
    near = [next((r for r in scores if abs(r / (best * f) - 1) < 0.01), None) for f in (0.5, 2)]
    if near[0] is None or near[1] is None:
        told = ", ".join(f"{rate:g}: {100 * score:.1f}" for rate, score in sorted(scores.items()))
        raise UserError(
            f"the best learning rate is {best:g} (R@1 on discovery: {told}); half and twice of it "
            "must be given, too"
        )
    return best, near[0], near[1]


def _discovery(one: Confirm) -> float:
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


@dataclass(frozen=True)
class Measured:
    """A measure that a hypothesis may name.

    Attributes:
        of: the checkpoints of one seed -> the statistic, and what it is of.
        unit: of its values. level: what a model that has learned nothing scores, which the value of
            one side is counted from. chance: that of the value, in words.
        options: of `Wanted`, that it reads beside `pictures`.
        rates: whether a seed has several checkpoints, at different learning rates.
    """

    of: Callable[[Sequence[Confirm]], tuple[Statistic, str]]
    unit: str
    chance: str
    options: tuple[str, ...] = ()
    rates: bool = False
    level: float = 0.0


MEASURES: Mapping[str, Measured] = {
    "excess": Measured(excess, "excess", "0", ("heads", "minus", "attention")),
    "depth": Measured(depth, "of the depth", "none", ("attention",)),
    "onset": Measured(onset, "steps", "none", ("attention", "share")),
    "causal": Measured(causal, "margin", "0, of a head like its layer's", ("heads", "attention")),
    "binding": Measured(binding, "share right", "0, from .5", ("kinds",), level=0.5),
    "sensitivity": Measured(sensitivity, "R@1", "0", rates=True),
}


def default_result(ckpt: Path, name: str) -> Path:
    """Where a decision stands."""
    return ckpt.parent / f"hypothesis-{name}.json"
