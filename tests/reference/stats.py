"""The pairing permutation as loops, and coverage by rasterisation."""

import numpy as np


def pairing_test(scores: np.ndarray, members: list[np.ndarray], draws: list[list[np.ndarray]]):
    """Single-step and step-down p of `[n, n, h]` scores; `draws[b][s]` permutes stratum s.

    Row 0 of the draws is the identity. Returns mean, T, p, adjusted p.
    """
    n, heads = len(scores), scores.shape[2]
    t = np.zeros((len(draws), heads))
    mean = np.zeros(heads)
    for b, draw in enumerate(draws):
        for h in range(heads):
            values = []
            for rows, permutation in zip(members, draw):
                for place, i in enumerate(rows):
                    j = rows[permutation[place]]
                    others = [scores[k, j, h] for k in rows if k != i]
                    values.append(scores[i, j, h] - np.mean(others))
            sd = np.std(values, ddof=1)
            t[b, h] = 0 if sd < 1e-9 else np.mean(values) / (sd / np.sqrt(n))
            if b == 0:
                mean[h] = np.mean(values)
    p = [np.mean(t[:, h] >= t[0, h] - 1e-9) for h in range(heads)]
    adjusted = np.zeros(heads)
    worst = 0.0
    left = list(range(heads))
    for h in sorted(range(heads), key=lambda h: -t[0, h]):
        worst = max(worst, np.mean([row[left].max() >= t[0, h] - 1e-9 for row in t]))
        adjusted[h] = worst
        left.remove(h)
    return mean, t[0], np.array(p), adjusted


def raster_coverage(objects, ignored, size: int, grid: tuple[int, int], fine: int):
    """`coverage` and `valid` from pixels `1 / fine` wide, exact for edges on that raster."""
    side = size * fine
    inside, out = np.zeros((side, side), bool), np.zeros((side, side), bool)
    for mask, boxes in ((inside, objects), (out, ignored)):
        for box in boxes:
            left, top, right, bottom = (round(min(max(edge, 0), size) * fine) for edge in box)
            mask[top:bottom, left:right] = True
    out &= ~inside
    coverage, valid = [], []
    for row in np.array_split(np.arange(side), grid[0]):
        for column in np.array_split(np.arange(side), grid[1]):
            patch = np.ix_(row, column)
            allowed = 1 - out[patch].mean()
            valid.append(allowed)
            coverage.append(inside[patch].mean() / allowed if allowed > 0 else 0.0)
    return np.array(coverage), np.array(valid)
