"""Naive versions of the statistics of an evaluation: loops over pictures, drawn and enumerated."""

import itertools

import numpy as np


def repeated(values, picture, weights):
    """The queries of a resample, written out: picture i comes `weights[i]` times."""
    return [v for v, i in zip(values, picture) for _ in range(int(weights[i]))]


def average_precision(scores, right):
    """Precision at every right one, down a list in which wrong ones that tie come first."""
    listed = sorted(zip(scores, right), key=lambda pair: (-pair[0], pair[1]))
    hits, found = 0, []
    for place, (_, good) in enumerate(listed, 1):
        if good:
            hits += 1
            found.append(hits / place)
    return sum(found) / len(found)


def swap_test(gains):
    """Share of all 2^n ways to swap the models' answers that differ at least as much."""
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains)))
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    return np.mean([s >= abs(sum(gains)) for s in sums])
