"""How alike two towers are, by loops and textbook formulas."""

import itertools
import math

import numpy as np


def correlation(first, second):
    """Of the maps `[n, p]` of two heads."""
    return float(np.corrcoef(np.float64(first).ravel(), np.float64(second).ravel())[0, 1])


def best_pairing(likeness):
    count = len(likeness)
    orders = itertools.permutations(range(count))
    return max(orders, key=lambda o: sum(likeness[k][o[k]] for k in range(count)))


def divergence(p, q):
    """Jensen-Shannon, in bits: entropy of the mean less mean of the entropies."""

    def entropy(x):
        return -sum(v * math.log2(v) for v in x if v > 0)

    p, q = ([float(v) / float(np.sum(m, dtype=float)) for v in m] for m in (p, q))
    return entropy([(a + b) / 2 for a, b in zip(p, q)]) - (entropy(p) + entropy(q)) / 2


def hsic(x, y):
    """HSIC_1 of linear kernels: Song et al. 2012, eq. 5."""
    n = len(x)
    k, other = x @ x.T, y @ y.T
    for i in range(n):
        k[i, i] = other[i, i] = 0
    one = np.ones(n)
    both = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return float((both - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3)))


def cka(x, y):
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def plain_cka(x, y):
    """Kornblith et al. 2019, eq. 3: not debiased."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def without_each(statistic, x, y):
    return [statistic(np.delete(x, k, 0), np.delete(y, k, 0)) for k in range(len(x))]
