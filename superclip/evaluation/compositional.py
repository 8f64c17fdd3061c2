"""Does the model prefer what is true of a picture to a lie made of nearly the same words?"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsmr

from superclip.data.checks import Checks, Item
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import Mean, Measure, Result, Statistic, Values, Weights
from superclip.model.superclip import SuperCLIP

CHANCE = 0.5
CHUNK = 8192
FOLDS, ENOUGH = 5, 50
ROUNDING = 1e-9
"""A blind score this near to 0 is a tie."""


@dataclass(frozen=True, eq=False)
class CategoryMean(Statistic):
    """Mean over categories of each one's mean; a category that a draw leaves empty is left out.

    Attributes:
        parts: one a category, all over the same pictures.
    """

    parts: tuple[Mean, ...]

    @property
    def pictures(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.parts[0].pictures

    @property
    def queries(self) -> int:
        return sum(part.queries for part in self.parts)

    def __call__(self, weights: Weights) -> Values:
        return np.nanmean([part(weights) for part in self.parts], axis=0)


def compositional(
    model: SuperCLIP, encoder: Encoder, checks: Checks, limit: int | None = None
) -> Result:
    """Share of questions in which the positive scores strictly above the negative.

    On SugarCrepe's files this is the number of its own script, and CLIP_benchmark's `text_acc`
    (`image_caption_selection` without amp), but for exact ties: CLIP_benchmark takes the first of
    two equal scores, which is the positive; here a tie counts against the model.

    Args:
        limit: only the first so many questions of each category.

    Returns:
        A row for each category, the mean over categories, and all questions together; pictures that
        can't be read are left out and listed. Notes: `ties` of each category, and what `text_only`
        scores, which is the honest chance level where the texts give themselves away.
    """
    checks = checks if limit is None else checks.limited(limit)
    seen = encoder.pictures(model, checks.source, sorted({item.row for item in checks.items}))
    place = {record.row: k for k, record in enumerate(seen.records)}
    items = [item for item in checks.items if item.row in place]
    picture = np.array([place[item.row] for item in items])
    lead = _leads(model, encoder, items, seen.features[picture])
    label = np.array([item.category for item in items])

    def mean(chosen: np.ndarray, owner: np.ndarray, pictures: int) -> Mean:
        return Mean((lead[chosen] > 0).astype(float), owner, pictures)

    def measure(name: str, statistic: Statistic) -> Measure:
        return Measure(name, statistic, CHANCE, hits=isinstance(statistic, Mean), candidates=2)

    categories = [name for name in checks.categories if name in label]
    chosen = {name: np.flatnonzero(label == name) for name in categories}
    measures = []
    for name, rows in chosen.items():
        own, owner = np.unique(picture[rows], return_inverse=True)
        measures.append(measure(name, mean(rows, owner, len(own))))
    n = len(seen.records)
    parts = tuple(mean(rows, picture[rows], n) for rows in chosen.values())
    measures.append(measure("mean over categories", CategoryMean(parts)))
    measures.append(measure("all items", mean(np.arange(len(items)), picture, n)))
    data = {
        "name": checks.name,
        "sha256": checks.sha256,
        "protocol": "the positive scores strictly above the negative",
        "items": dict(Counter(item.category for item in items)),
        "pictures": n,
        "missing": seen.missing,
    }
    ties = {name: int((lead[rows] == 0).sum()) for name, rows in chosen.items()}
    return Result("compositional", data, measures, {"ties": ties, "text_only": text_only(checks)})


def _leads(
    model: SuperCLIP, encoder: Encoder, items: list[Item], seen: Float[torch.Tensor, "q d"]
) -> Float[np.ndarray, " q"]:
    """By how much each positive scores above its negative; 0 exactly where their vectors are the
    same."""
    texts = [item.positive for item in items] + [item.negative for item in items]
    positive, negative = encoder.texts(model, texts).chunk(2)
    parts = zip(positive.split(CHUNK), negative.split(CHUNK), seen.split(CHUNK))
    leads = [((p.double() - n.double()) * s.double()).sum(1) for p, n, s in parts]
    return torch.cat(leads).cpu().numpy()


@lru_cache(maxsize=4)
def text_only(checks: Checks) -> dict[str, dict[str, float]]:
    """How often the texts alone give the positive away, by category (SugarCrepe's own worry).

    Ridge regression on counts of words and of pairs of neighbours, cross-validated over pictures
    in 5 folds, says which of two texts is the true one.

    Returns:
        `value` in [0, 1], ties counting half, and the number of questions `n`; categories of fewer
        than 50 questions are left out, there is too little to learn from.
    """
    sizes = Counter(item.category for item in checks.items)
    return {name: _blind(checks, name) for name, n in sizes.items() if n >= ENOUGH}


def _blind(checks: Checks, category: str) -> dict[str, float]:
    items = [item for item in checks.items if item.category == category]
    pictures = {row: k for k, row in enumerate(dict.fromkeys(item.row for item in items))}
    fold = np.array([pictures[item.row] % FOLDS for item in items])
    counts, score = _differences(items), np.zeros(len(items))
    for k in range(FOLDS):
        learn, judge = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if len(learn) and len(judge):
            score[judge] = counts[judge] @ lsmr(counts[learn], np.ones(len(learn)), damp=1.0)[0]
    hits = (score > ROUNDING) + (np.abs(score) <= ROUNDING) / 2
    return {"value": float(hits.mean()), "n": len(items)}


def _differences(items: list[Item]) -> csr_array:
    """Counts of words and pairs in each positive less those in its negative, `[q, features]`."""
    index: dict[object, int] = {}
    entries: list[tuple[int, int, float]] = []
    for row, item in enumerate(items):
        for text, sign in ((item.positive, 1.0), (item.negative, -1.0)):
            words = ["^", *re.findall(r"\w+|[^\w\s]", text.lower()), "$"]
            for feature in [*words, *pairwise(words)]:
                entries.append((row, index.setdefault(feature, len(index)), sign))
    rows, columns, signs = zip(*entries)
    return csr_array((signs, (rows, columns)), shape=(len(items), len(index)))
