"""Naive versions of the numbers of classifiers: one picture, one class at a time."""

import itertools
import math

import numpy as np
from scipy.optimize import minimize


def in_top(scores, label, k):
    """Whether the right class is among the first k, wrong ones that tie before it."""
    listed = sorted(range(len(scores)), key=lambda c: (-scores[c], c == label))
    return label in listed[:k]


def recall(hits, labels):
    """Mean over the classes that have pictures of their share of hits (balanced accuracy)."""
    classes = sorted(set(labels))
    return sum(
        sum(h for h, label in zip(hits, labels) if label == c) / list(labels).count(c)
        for c in classes
    ) / len(classes)


def random_average_precision(right, of):
    """Mean over all orders of `right` good things among `of`."""
    found = []
    for places in itertools.combinations(range(1, of + 1), right):
        found.append(sum(hits / place for hits, place in enumerate(places, 1)) / right)
    return sum(found) / len(found)


def softmax_regression(x, labels, queries, strength, c):
    """Log-probabilities under weights that minimise C * sum of losses + |W|^2 / 2."""
    x, labels = np.asarray(x), np.asarray(labels)

    def logits(w, rows):
        w = w.reshape(c, -1)
        return rows @ w[:, :-1].T + w[:, -1]

    def logs(w, rows):
        z = logits(w, rows)
        return (
            z
            - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
            - z.max(1, keepdims=True)
        )

    def objective(w):
        penalty = (w.reshape(c, -1)[:, :-1] ** 2).sum() / 2
        return penalty - strength * logs(w, x)[np.arange(len(x)), labels].sum()

    found = minimize(objective, np.zeros(c * (x.shape[1] + 1)), method="BFGS", tol=1e-6)
    return logs(found.x, np.asarray(queries))


def sigmoid_regression(x, right, queries, strength):
    """Log-odds of one yes-or-no question, penalised alike."""

    def objective(w):
        z = x @ w[:-1] + w[-1]
        losses = np.logaddexp(0, np.where(right, -z, z))
        return strength * losses.sum() + (w[:-1] ** 2).sum() / 2

    found = minimize(objective, np.zeros(x.shape[1] + 1), method="BFGS", tol=1e-6)
    return queries @ found.x[:-1] + found.x[-1]


def unit(vector):
    return [v / math.sqrt(sum(w * w for w in vector)) for v in vector]


def class_vector(prompts):
    """The mean of unit vectors, made a unit vector again."""
    units = [unit(p) for p in prompts]
    return unit([sum(column) / len(units) for column in zip(*units)])
