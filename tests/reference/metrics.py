"""Grounding metrics as loops over images, heads and patches: slow, and plain to check."""

import numpy as np


def score(a: np.ndarray, coverage: np.ndarray, valid: np.ndarray) -> float:
    inside = allowed = 0.0
    for p in range(len(a)):
        inside += float(a[p]) * float(valid[p]) * float(coverage[p])
        allowed += float(a[p]) * float(valid[p])
    return inside / allowed if allowed > 0 else 0.0


def excess(maps: np.ndarray, coverage: np.ndarray, valid: np.ndarray, stratum: np.ndarray):
    """G of one head's `[n, p]` maps: own score minus the mean score of the others' maps."""
    result = []
    for i in range(len(maps)):
        others = [
            score(maps[k], coverage[i], valid[i])
            for k in range(len(maps))
            if k != i and stratum[k] == stratum[i]
        ]
        result.append(score(maps[i], coverage[i], valid[i]) - sum(others) / len(others))
    return np.array(result)


def auroc(a: np.ndarray, coverage: np.ndarray, valid: np.ndarray) -> float:
    wins = pairs = 0.0
    for p in range(len(a)):
        for q in range(len(a)):
            weight = valid[p] * coverage[p] * valid[q] * (1 - coverage[q])
            wins += weight * (1.0 if a[p] > a[q] else 0.5 if a[p] == a[q] else 0.0)
            pairs += weight
    return wins / pairs if pairs > 0 else float("nan")


def normalised_mass(a: np.ndarray, coverage: np.ndarray, valid: np.ndarray) -> float:
    area = score(np.ones(len(a)), coverage, valid)
    return (score(a, coverage, valid) - area) / (1 - area) if area <= 0.9 else float("nan")


def pointing(a: np.ndarray, hits: np.ndarray, valid: np.ndarray) -> float:
    allowed = [p for p in range(len(a)) if valid[p] > 0]
    top = max(a[p] for p in allowed)
    best = [p for p in allowed if a[p] == top]
    return sum(bool(hits[p]) for p in best) / len(best)
