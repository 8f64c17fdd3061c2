"""Lenses and their scores, one picture, word and layer at a time."""

import copy
import math

import torch

from reference.hooked import norm, tower_activations


def reading(visual, image, layer, source):
    """What the tower would give if it ended before `layer` (its own output, or patch means)."""
    cut = copy.deepcopy(visual)
    cut.transformer.resblocks = cut.transformer.resblocks[:layer]
    if source == "patches":
        cut.pool_type, cut.final_ln_after_pool, cut.proj = "avg", False, None
    return tower_activations(cut, image)["features"]


def patch_reading(visual, image, layer, patch, source):
    stream = tower_activations(visual, image)["resid_post"][layer - 1]
    read = norm(stream[1 + patch], visual.ln_post)
    return read if source == "patches" or visual.proj is None else read @ visual.proj


def log_probabilities(logits, candidates):
    total = sum(math.exp(logits[c]) for c in candidates)
    return [float(logits[c]) - math.log(total) for c in candidates]


def rank(scores, place):
    rest = [s for k, s in enumerate(scores) if k != place]
    return 1 + sum(s > scores[place] for s in rest) + 0.5 * sum(s == scores[place] for s in rest)


def auc(scores, holds):
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, own in zip(scores, holds, strict=True)
        for b, other in zip(scores, holds, strict=True)
        if own and not other
    ]
    return sum(pairs) / len(pairs)


def auc_variance(scores, holds):
    """DeLong et al. 1988: variances of both sides' placements over their sizes."""
    yes = [s for s, h in zip(scores, holds, strict=True) if h]
    no = [s for s, h in zip(scores, holds, strict=True) if not h]
    over = [sum((a > b) + 0.5 * (a == b) for b in no) / len(no) for a in yes]
    under = [sum((a > b) + 0.5 * (a == b) for a in yes) / len(yes) for b in no]
    return variance(over) / len(over) + variance(under) / len(under)


def variance(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def ridge(x, y, penalty):
    """Affine map of least squared error plus penalty, by the normal equations."""
    centred = x - x.mean(dim=0)
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(dim=0)))
    return weight, y.mean(dim=0) - x.mean(dim=0) @ weight


def left_out_error(x, y, penalty):
    total = 0.0
    for k in range(len(x)):
        kept = [i for i in range(len(x)) if i != k]
        weight, bias = ridge(x[kept], y[kept], penalty)
        total += float(((x[k] @ weight + bias - y[k]) ** 2).sum())
    return total


def r2(foretold, last, mean):
    error = sum(float(((f - y) ** 2).sum()) for f, y in zip(foretold, last, strict=True))
    return 1 - error / sum(float(((y - mean) ** 2).sum()) for y in last)


def weighted_auroc(scores, inside, outside):
    """P(a patch inside scores above one outside), patches weighted."""
    pairs = [
        (u * v, (a > b) + 0.5 * (a == b))
        for a, u in zip(scores, inside, strict=True)
        for b, v in zip(scores, outside, strict=True)
    ]
    return sum(w * s for w, s in pairs) / sum(w for w, _ in pairs)
