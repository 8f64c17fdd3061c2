"""From which layer on a word can be read, and where on the picture.

Each statistic becomes per-image values that have its mean and, to first order, its spread: the
placement values of DeLong et al. (1988) for an AUC, the linearised ratio for an R^2 and for a mean
over categories. So `interp.stats` can draw images, the same for all forms and layers at once.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, logit
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from interp.grounding.metrics import patch_auroc
from interp.stats.draws import DRAWS
from interp.stats.intervals import LEVEL, Band, Interval, first_held, interval_of
from interp.stats.multiplicity import NO_SPREAD
from interp.stats.splits import groups

CHANCE = 0.5
ROUNDING = 1e-6
"""Scores that spread less than this share of the largest are all alike, and tie."""


def auc_values(
    scores: Float[np.ndarray, "n ..."], holds: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "n ..."]:
    """Values whose mean is the AUC: P(score with the word > score without) + ties / 2.

    Their spread has the variance of DeLong et al. where `holds` makes the strata.
    """
    alike = np.ptp(scores, axis=0) <= ROUNDING * np.abs(scores).max(axis=0)
    scores = np.where(alike, 0, scores)
    n, sides, ranks = len(holds), (holds, ~holds), rankdata(scores, axis=0)
    result = np.empty(scores.shape)
    for own, sign in zip(sides, (1, -1)):
        others = n - own.sum()
        above = (ranks[own] - rankdata(scores[own], axis=0)) / others  # share of the other side
        place = above if sign == 1 else 1 - above
        auc = place.mean(axis=0)
        result[own] = auc + n / own.sum() * (place - auc)
    return result


def unit_band(
    values: Float[np.ndarray, "n ..."],
    stratum: Int[np.ndarray, " n"],
    few: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> Band:
    """Simultaneous band of means within [0, 1], made on the logit scale (Pepe 2003).

    The half width in standard errors is the 97.5 % quantile over draws of the largest deviation,
    widened as Student's t of `few - 1` degrees of freedom is wider than the normal. In simulations
    at most 4 % of the bands missed a true AUC; up to 21 % where it was above .9 and hung on a few
    odd ones of 26 pictures. Drawing cannot tell how far a mean of exactly 0 or 1 is off; there the
    exact binomial limit holds, shared out over the curve: (0.025 / size)^(1 / few).

    Args:
        few: pictures of the smaller side, those that decide; of a mean over words or categories,
            those of the word or category that has fewest: as if that one alone were uncertain.
    """
    n, mean = len(values), values.mean(axis=0)
    variance = [values[r].var(axis=0) * (len(r) / n) ** 2 / (len(r) - 1) for r in groups(stratum)]
    right, wrong = mean > 1 - 1e-9, mean < 1e-9
    error = np.where(right | wrong, 0, np.sqrt(np.sum(variance, axis=0)))
    scale, centre = np.where(error < NO_SPREAD, np.inf, error).ravel(), mean.ravel()
    drawn = interval_of(
        lambda m: (np.abs(m - centre) / scale).max(axis=-1),
        values.reshape(n, -1),
        stratum,
        draws,
        seed,
    ).high
    critical = float(student.isf(norm.sf(drawn), few - 1))
    within = np.where(right | wrong, 0.5, mean)
    half = critical * error / (within * (1 - within))
    limit = ((1 - LEVEL) / 2 / mean.size) ** (1 / few)
    low = np.select([right, wrong], [limit, 0], expit(logit(within) - half))
    high = np.select([right, wrong], [1, 1 - limit], expit(logit(within) + half))
    return Band(mean, low, high, critical, n)


def onset(
    values: Float[np.ndarray, "n layer"],
    low: Float[np.ndarray, " layer"],
    stratum: Int[np.ndarray, " n"],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """First layer from which on the lower band stays above chance, by that rule in every draw too.

    The number of layers means never. Fewer pictures make a wider band and so a later onset.
    """
    half = values.mean(axis=0) - low
    found = interval_of(lambda m: first_held(m - half > CHANCE), values, stratum, draws, seed)
    return dataclasses.replace(found, low=np.floor(found.low), high=np.ceil(found.high))


def r2_values(
    error: Float[np.ndarray, "n ..."], total: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n ..."]:
    """Values whose mean is R^2 = 1 - sum of errors / sum of totals."""
    ratio = error.mean(axis=0) / total.mean()
    return 1 - ratio - (error - np.multiply.outer(total, ratio)) / total.mean()


def category_values(
    values: Float[np.ndarray, "row ..."],
    image: Int[np.ndarray, " row"],
    category: Int[np.ndarray, " row"],
) -> Float[np.ndarray, "n ..."]:
    """From rows (image, category) to values of images, whose mean is the mean over categories of
    the mean within each."""
    images, image = np.unique(image, return_inverse=True)
    names, category, sizes = np.unique(category, return_inverse=True, return_counts=True)
    means = np.stack([values[category == k].mean(axis=0) for k in range(len(names))])
    share = (len(images) / len(names) / sizes[category]).reshape(-1, *[1] * (values.ndim - 1))
    result = np.zeros((len(images), *values.shape[1:]))
    np.add.at(result, image, share * (values - means[category]))
    return result + means.mean(axis=0)


def patch_measures(
    maps: Float[np.ndarray, "row ... patch"],
    prior: Float[np.ndarray, "row ... patch"],
    own: Float[np.ndarray, "row patch"],
    others: Float[np.ndarray, "row patch"],
    valid: Float[np.ndarray, "row patch"],
) -> dict[str, Float[np.ndarray, "row ..."]]:
    """How well the scores of a category's word at the patches find its boxes.

    Args:
        prior: mean of the maps of the other pictures.
        own, others: coverage by the category's boxes, and by those of the other categories.

    Returns:
        `auroc` of the patches in its boxes against all others, and `specificity`, against the
        boxes of other categories alone (NaN without any); chance is .5. `gain`: auroc less that of
        the prior; chance is 0.
    """
    auroc, boxes = patch_auroc(maps, own, valid), np.maximum(own, others)
    share = np.divide(own, boxes, out=np.zeros(own.shape), where=boxes > 0)
    gain = auroc - patch_auroc(prior, own, valid)
    return {"auroc": auroc, "gain": gain, "specificity": patch_auroc(maps, share, valid * boxes)}
