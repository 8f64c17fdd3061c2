"""Linear probe: how much of the classes a straight line through frozen features can tell."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from superclip.data.coco import hash_split
from superclip.data.geometry import BadPicture
from superclip.data.labelled import LabelledSource
from superclip.errors import UserError
from superclip.evaluation.cache import Kept, cached
from superclip.evaluation.classification import judge, ranks
from superclip.evaluation.encode import Encoder
from superclip.evaluation.measures import MeanAveragePrecision, Measure, Result
from superclip.model.superclip import SuperCLIP
from superclip.progress import progress

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-10, 7))
"""scikit-learn's C, the inverse of the L2 penalty: 0.00001 to 1000, two a decade."""
FOLDS = 5
SHARES = {"train": 0.7, "test": 0.3}
SALT = "superclip linear probe"
ITERATIONS = 1000
"""Of L-BFGS, for each C that is tried (CLIP's number); the final fit may take ten times as many."""
ROUGH, FINE = 1e-4, 1e-6
"""Largest gradient at which a fit has converged: while C is sought, and at the end, where log-odds
are then off by less than 0.001 and equal on other machines for all that can be seen."""

Labels = Int[np.ndarray, " n"] | Bool[np.ndarray, "n c"]
Features = Float[np.ndarray, "n d"]


@dataclass(frozen=True, eq=False)
class Seen:
    """Encoded pictures of one part.

    Attributes:
        features: by kind, pooled and (where the tower has any) patches.
        missing: key -> cause of the pictures that can't be read.
    """

    features: dict[str, Features]
    labels: Labels
    keys: list[str]
    missing: dict[str, str]

    def part(self, chosen: Bool[np.ndarray, " n"]) -> Seen:
        keys = [key for key, take in zip(self.keys, chosen) if take]
        features = {kind: x[chosen] for kind, x in self.features.items()}
        return Seen(features, self.labels[chosen], keys, self.missing)


def probe(
    model: SuperCLIP,
    encoder: Encoder,
    train: LabelledSource,
    test: LabelledSource | None = None,
    checkpoint_sha256: str | None = None,
    cache: Path | None = None,
) -> Result:
    """Logistic regression (L-BFGS, L2) on frozen features: `pooled`, the unit image features, and
    `patches`, the mean of the final patch tokens.

    C is chosen on the training part alone, by the quality of five-fold stratified cross-validation,
    the strongest penalty of equally good ones (CLIP, Radford et al. 2021, A.3, sweeps it on a
    validation set; its own towers' features are taken before the projection, ours after it).
    Features are moved to mean 0 and divided by one number, their root mean variance: that scales C
    and changes nothing else, whereas a number for each dimension would change what is penalised.
    Several labels a picture: one regression a class with one C for all.

    Args:
        test: without it, 30 % of the training pictures, by the sha256 of their keys.
        checkpoint_sha256, cache: with both, features are kept in that folder.

    Returns:
        The measures of `judge` on the test part for each kind of feature; their chance level is the
        best constant answer. Notes: `C`; `cross_validation`, the score of every C and how many
        fits did not converge; `C_at_edge`, the kinds whose best C may lie beyond those tried;
        `no_verdict`, classes without pictures, and those of several-label data that one of the
        parts has never or always.

    Raises:
        UserError: if the parts are the same data or have other classes, a class has test but no
            training pictures (one label a picture), or the final fit does not converge.
    """
    look = partial(_look, model, encoder, checkpoint_sha256, cache)
    if test is None:
        whole = look(train)
        chosen = np.array([hash_split(key, SALT, SHARES) == "train" for key in whole.keys])
        seen, held = whole.part(chosen), whole.part(~chosen)
        split = f"{SHARES['train']:.0%} of the pictures train, by the sha256 of '{SALT}:KEY'"
    else:
        refuse_unlike(train, test)
        seen, held = look(train), look(test)
        split = "test pictures of their own"
    keep = _tellable(seen, held, train)
    classes = [key for key, kept in zip(train.classes, keep) if kept]
    names = [name for name, kept in zip(train.names or train.classes, keep) if kept]
    learn, truth = (_narrowed(part.labels, keep) for part in (seen, held))
    if truth.ndim == 1 and len(np.unique(truth)) < 2:
        raise UserError(
            f"the {len(truth)} test picture(s) of {(test or train).name} are of one class; give "
            "more, or --probe-test DATA"
        )
    measures: list[Measure] = []
    notes: dict[str, Any] = {"C": {}, "cross_validation": {}}
    folds = _folds(seen.keys, learn)
    for kind in seen.features:
        scores, strength, tried = _probed(seen.features[kind], learn, held.features[kind], folds)
        found, said = judge(scores, truth, classes, names, "constant", f"{kind} ")
        measures += found
        notes["C"][kind], notes["cross_validation"][kind] = strength, tried
        notes[kind] = said
    edges = (STRENGTHS[0], STRENGTHS[-1])
    notes["C_at_edge"] = [kind for kind, strength in notes["C"].items() if strength in edges]
    notes["no_verdict"] = [key for key, kept in zip(train.classes, keep) if not kept]
    data = {
        "name": train.name,
        "train_sha256": train.digest,
        "test_sha256": (test or train).digest,
        "protocol": split,
        "pictures": {"train": len(seen.keys), "test": len(held.keys)},
        "missing": {"train": seen.missing} | ({"test": held.missing} if test else {}),
        "classes": len(classes),
    }
    return Result("probe", data, measures, notes)


def refuse_unlike(train: LabelledSource, test: LabelledSource) -> None:
    """Raises UserError where the parts share pictures (of one key: compared byte by byte), or have
    other classes."""
    if train.digest == test.digest:
        raise UserError(f"--probe-test is the same data as --probe ({train.name})")
    if train.several != test.several or train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"--probe-test has other classes than --probe (first: {odd[0] if odd else 'order'}); "
            "both parts need the same class folders"
        )
    row_of = {key: row for row, key in enumerate(train.source.keys)}
    for row, key in enumerate(test.source.keys):
        if key in row_of and _same_picture(train, row_of[key], test, row):
            raise UserError(
                f"--probe-test holds pictures of --probe (first: {key}); a test on them tells "
                "nothing, take them out of one"
            )


def _same_picture(train: LabelledSource, a: int, test: LabelledSource, b: int) -> bool:
    try:
        return train.source.read(a).picture == test.source.read(b).picture
    except BadPicture:  # listed as missing when it is encoded
        return False


def _look(
    model: SuperCLIP,
    encoder: Encoder,
    checkpoint_sha256: str | None,
    cache: Path | None,
    data: LabelledSource,
) -> Seen:
    """Features of all pictures, from the cache where they are kept there."""
    patches = model.patch_width > 0

    def compute() -> Kept:
        seen = encoder.pictures(model, data.source, data.rows, patches)
        tensors = {"pooled": seen.features}
        if seen.patches is not None:
            tensors["patches"] = seen.patches
        tensors["row"] = torch.tensor([record.row for record in seen.records])
        return tensors, {"missing": seen.missing}

    if checkpoint_sha256 is None or cache is None:
        tensors, said = compute()
    else:
        facts = {
            "schema": 1,
            "checkpoint": checkpoint_sha256,
            "data": [data.digest, data.stamp],
            "preprocess": encoder.preprocess.to_dict(),
            "precision": encoder.precision,
            "device": encoder.device.type,
            "batch_size": encoder.batch_size,
            "patches": patches,
            "versions": {name: version(name) for name in ("torch", "open_clip_torch", "pillow")},
        }
        tensors, said = cached(cache, facts, compute, encoder.world)
    row, every = tensors["row"].numpy(), data.source.keys
    features = {
        kind: tensors[kind].double().cpu().numpy()
        for kind in ("pooled", "patches")
        if kind in tensors
    }
    return Seen(features, data.labels[row], [every[k] for k in row], said["missing"])


def _tellable(seen: Seen, held: Seen, data: LabelledSource) -> Bool[np.ndarray, " c"]:
    """The classes that can be learned and judged."""
    c = len(data.classes)
    if data.several:
        share = seen.labels.mean(0)
        keep = (share > 0) & (share < 1) & held.labels.any(0)
    else:
        learned, judged = (np.bincount(p.labels, minlength=c) for p in (seen, held))
        if (lost := np.flatnonzero((learned == 0) & (judged > 0))).size:
            raise UserError(
                f"class {data.classes[lost[0]]} has test pictures, but none to learn from "
                f"({lost.size} such classes); add some, or take it out"
            )
        keep = learned > 0
    if keep.sum() < (1 if data.several else 2) or not len(held.keys):
        raise UserError(
            f"{data.name}: {len(seen.keys)} training and {len(held.keys)} test pictures are "
            "too few to learn and judge its classes; name more with --probe and --probe-test"
        )
    return keep


def _narrowed(
    labels: Labels, keep: Bool[np.ndarray, " c"]
) -> Int[np.ndarray, " n"] | Bool[np.ndarray, "n kept"]:
    """Labels among the kept classes alone."""
    return labels[:, keep] if labels.ndim == 2 else (np.cumsum(keep) - 1)[labels]


def _folds(keys: list[str], labels: Labels) -> Int[np.ndarray, " n"]:
    """The fold of every picture: each class, in the order of hashed keys, is dealt to the folds."""
    hashes = [hashlib.sha256(f"{SALT}:fold:{key}".encode()).hexdigest() for key in keys]
    single = labels if labels.ndim == 1 else np.zeros(len(keys))
    order = sorted(range(len(keys)), key=lambda row: (single[row], hashes[row]))
    folds = np.empty(len(keys), int)
    folds[order] = np.arange(len(keys)) % FOLDS
    return folds


def _probed(
    x: Features, labels: Labels, queries: Float[np.ndarray, "m d"], folds: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "m c"], float, list[dict[str, float]]]:
    """Scores of the queries, the C behind them, and what cross-validation said of every C."""
    centre, scale = x.mean(0), float(np.sqrt(x.var(0).mean())) or 1.0
    x, queries = (x - centre) / scale, (queries - centre) / scale
    c = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    quality, unconverged = np.zeros((2, len(STRENGTHS)))
    for fold in progress(np.unique(folds), "folds", leave=False):
        held = folds == fold
        fits = regressions(x[~held], labels[~held], x[held], STRENGTHS, c, ITERATIONS, ROUGH)
        # By fold: scores of different fits have no common origin and can't be ranked together.
        quality += [_quality(scores, labels[held]) * held.mean() for scores, _ in fits]
        unconverged += [failed for _, failed in fits]
    best = STRENGTHS[int(np.argmax(quality))]
    ((scores, failed),) = regressions(x, labels, queries, [best], c, 10 * ITERATIONS, FINE)
    if failed:
        raise UserError(
            f"the linear probe did not converge in {10 * ITERATIONS} iterations at C = {best:g}; "
            "the features may be degenerate"
        )
    tried = [
        {"C": C, "score": float(score), "unconverged": int(failed)}
        for C, score, failed in zip(STRENGTHS, quality, unconverged)
    ]
    return scores, best, tried


def _quality(scores: Float[np.ndarray, "n c"], labels: Labels) -> float:
    if labels.ndim == 2:
        return MeanAveragePrecision(scores, labels).value if labels.any() else 0.0
    return float((ranks(scores, labels) == 0).mean())


def regressions(
    x: Features,
    labels: Labels,
    queries: Float[np.ndarray, "m d"],
    strengths: Sequence[float],
    c: int,
    iterations: int,
    tolerance: float,
) -> list[tuple[Float[np.ndarray, "m c"], int]]:
    """Scores of queries for every C, each fit starting from the one before, and how many of its
    fits did not converge; -inf for classes without an example among the labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if labels.ndim == 1:
        problems = [(np.unique(labels), labels)]
    else:
        both = np.flatnonzero(labels.any(0) & ~labels.all(0))
        problems = [(np.array([k]), labels[:, k]) for k in both]
    found = [np.full((len(queries), c), -np.inf) for _ in strengths]
    failed = [0 for _ in strengths]
    for columns, target in problems:
        if len(columns) == len(np.unique(target)) == 1:
            continue
        solver = LogisticRegression(tol=tolerance, max_iter=iterations, warm_start=True)
        for k, strength in enumerate(strengths):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                solver.set_params(C=strength).fit(x, target)
            failed[k] += any(issubclass(w.category, ConvergenceWarning) for w in said)
            raw = solver.decision_function(queries).reshape(len(queries), -1)
            found[k][:, columns] = np.hstack([-raw, raw]) if len(columns) == 2 else raw
    return list(zip(found, failed))
