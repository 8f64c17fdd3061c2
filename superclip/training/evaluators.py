"""Evaluators: `run(model)` yields (name, value). Training, `superclip.evaluate` and sweeps share
the encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from superclip.config import Precision
from superclip.data.batch import Record, Source
from superclip.data.loader import EvalRows, Preprocess, Tokenize
from superclip.data.patience import begin_reader, start_readers
from superclip.errors import UserError
from superclip.model.superclip import SuperCLIP
from superclip.ops.retrieval import (
    chance_recall,
    cluster_bootstrap,
    image_to_text_ranks,
    text_to_image_ranks,
)
from superclip.training.optim import autocast

KS = (1, 5, 10)


@runtime_checkable
class Evaluator(Protocol):
    def run(self, model: SuperCLIP) -> Iterator[tuple[str, float]]: ...


def run_evaluators(
    evaluators: Iterable[Evaluator], model: SuperCLIP
) -> Iterator[tuple[str, float]]:
    """All metrics of all evaluators, the model in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        for evaluator in evaluators:
            yield from evaluator.run(model)
    finally:
        model.train(training)


@dataclass(frozen=True)
class Features:
    """Encoded evaluation data.

    Attributes:
        image: unit vectors `[n, d]`. text: unit vectors `[m, d]`.
        owner: for every caption the row of its picture in `image`.
        records: what is known of every picture.
        captions: the texts behind `text`.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "m d"]
    owner: Int[Tensor, " m"]
    records: list[Record]
    captions: list[str]


@dataclass(frozen=True)
class Encoder:
    """How held-out data is read and encoded."""

    preprocess: Preprocess
    tokenize: Tokenize
    device: torch.device
    precision: Precision = "fp32"
    batch_size: int = 64
    workers: int = 0

    def batches(
        self, source: Source, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, list[Record]]]:
        """uint8 pictures `[b, 3, s, s]` on the device with their records, in manifest order."""
        loader: DataLoader[Any] = DataLoader(
            EvalRows(source, self.preprocess, rows),
            self.batch_size,
            num_workers=self.workers,
            worker_init_fn=begin_reader if self.workers else None,
            collate_fn=lambda items: (
                torch.from_numpy(np.stack([i[0] for i in items])),
                [i[1] for i in items],
            ),
        )
        for images, records in tqdm(
            start_readers(loader), "pictures", len(loader), unit="batch", disable=None
        ):
            yield images.to(self.device), records

    @torch.no_grad()
    def texts(self, model: SuperCLIP, texts: Sequence[str]) -> Float[Tensor, "m d"]:
        """Unit vectors of texts; equal texts get equal bits, so that they tie exactly."""
        unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        tokens = torch.from_numpy(np.stack([self.tokenize(t) for t in unique])).to(self.device)
        parts = []
        for chunk in tokens.split(256):
            with autocast(self.precision, self.device):
                parts.append(model.encode_text(chunk).float())
        return torch.cat(parts)[[unique[text] for text in texts]]

    @torch.no_grad()
    def encode(
        self,
        model: SuperCLIP,
        source: Source,
        first_caption: bool = False,
        rows: Sequence[int] | None = None,
    ) -> Features:
        """Pictures and captions of a source as unit vectors in fp32."""
        images: list[Tensor] = []
        records: list[Record] = []
        for pixels, found in self.batches(source, rows):
            with autocast(self.precision, self.device):
                images.append(model.encode_image(pixels).float())
            records += found
        captions = [r.captions[:1] if first_caption else r.captions for r in records]
        owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts])
        flat = [text for texts in captions for text in texts]
        text = self.texts(model, flat)
        image = torch.cat(images)
        if not bool(image.isfinite().all() and text.isfinite().all()):
            raise UserError("the model's features are not finite: it has diverged; lower --lr")
        return Features(image, text, owner.to(text.device), records, flat)


@dataclass(frozen=True)
class Recall:
    """One row of the retrieval table.

    Attributes:
        value, low, high: recall in [0, 1] and its bootstrap 95 % interval over pictures.
        chance: expected recall of a random order.
        queries, pictures, candidates: sizes; `candidates` of one pool.
    """

    direction: str
    metric: str
    value: float
    low: float
    high: float
    chance: float
    queries: int
    pictures: int
    candidates: int


def retrieval_table(
    features: Features,
    pool: int | None,
    draws: int,
    directions: Sequence[str] = ("image-to-text", "text-to-image"),
) -> list[Recall]:
    """R@1/5/10 and median rank (1-based), in consecutive pools of `pool` pictures; a last partial
    pool is left out.

    Any caption of a picture counts for image-to-text; each caption is a query for text-to-image.
    """
    n = len(features.image)
    pool = min(pool or n, n)
    pools = n // pool
    table: list[Recall] = []
    owner = features.owner.cpu()
    for direction in directions:
        ranks, cluster, own, candidates = [], [], [], []
        for p in range(pools):
            inside = (owner >= p * pool) & (owner < (p + 1) * pool)
            image, text = (
                features.image[p * pool : (p + 1) * pool],
                features.text[inside.to(features.text.device)],
            )
            mine = owner[inside] - p * pool
            if direction == "image-to-text":
                ranks.append(image_to_text_ranks(image, text, mine.to(text.device)).cpu())
                cluster.append(torch.arange(pool) + p * pool)
                own.append(torch.bincount(mine, minlength=pool))
                candidates.append(len(text))
            else:
                ranks.append(text_to_image_ranks(image, text, mine.to(text.device)).cpu())
                cluster.append(mine + p * pool)
                own.append(torch.ones(len(mine), dtype=torch.long))
                candidates.append(pool)
        rank, where = torch.cat(ranks).numpy(), torch.cat(cluster).numpy()
        sizes = (len(rank), pools * pool, candidates[0])
        for k in KS:
            hits = (rank < k).astype(float)
            low, high = cluster_bootstrap(hits, where, pools * pool, draws)
            chance = float(
                np.mean([chance_recall(o.tolist(), c, k) for o, c in zip(own, candidates)])
            )
            table.append(Recall(direction, f"R@{k}", hits.mean(), low, high, chance, *sizes))
        table.append(_median_rank(direction, rank, where, draws, own, candidates, sizes))
    return table


def _median_rank(direction, rank, where, draws, own, candidates, sizes) -> Recall:
    """Median 1-based rank; the interval draws pictures anew; chance is the median of a random
    order."""
    rng = np.random.Generator(np.random.Philox(key=[0, 0x3ED]))
    members = np.argsort(where, kind="stable")
    starts = np.searchsorted(where[members], np.arange(sizes[1] + 1))
    lengths = np.diff(starts)
    medians = []
    for _ in range(min(draws, 500)):
        chosen = rng.integers(sizes[1], size=sizes[1])
        index = np.repeat(starts[chosen], lengths[chosen]) + _ramp(lengths[chosen])
        medians.append(np.median(rank[members[index]]) + 1)
    low, high = np.quantile(medians, [0.025, 0.975])
    # The best of `o` right answers among `c` candidates lies past r with probability (1 - r/c)^o.
    o, c = float(torch.cat(own).double().mean()), candidates[0]
    chance = (c + 1) / 2 if o == 1 else c * (1 - 0.5 ** (1 / o)) + 0.5
    return Recall(
        direction,
        "median rank",
        float(np.median(rank)) + 1,
        float(low),
        float(high),
        chance,
        *sizes,
    )


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each length, concatenated."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


@dataclass(frozen=True)
class Retrieval:
    """R@k of held-out data during training."""

    name: str
    source: Source
    encoder: Encoder
    pool: int | None

    def run(self, model: SuperCLIP) -> Iterator[tuple[str, float]]:
        features = self.encoder.encode(model, self.source)
        for row in retrieval_table(features, self.pool, draws=1):
            short = "i2t" if row.direction == "image-to-text" else "t2i"
            yield f"{self.name}_{short}_{row.metric.replace(' ', '_')}", row.value


def scene_category_accuracy(
    model: SuperCLIP, encoder: Encoder, features: Features, draws: int
) -> dict[str, float] | None:
    """Zero-shot category accuracy on one-object scenes; prompts are averaged over colours.

    R@k of scenes can be high without a single category known, so this stands beside it.
    """
    from superclip.data.scenes import CATEGORIES, category_prompts

    single = [i for i, r in enumerate(features.records) if len(r.boxes.categories) == 1]
    if not single:
        return None
    prompts = category_prompts()
    text = encoder.texts(model, [p for group in prompts for p in group])
    classes = F.normalize(
        torch.stack([part.mean(0) for part in text.split([len(g) for g in prompts])]), dim=-1
    )
    guess = (features.image[single] @ classes.T).argmax(1).cpu().numpy()
    truth = np.array(
        [list(CATEGORIES).index(features.records[i].boxes.categories[0]) for i in single]
    )
    hits = (guess == truth).astype(float)
    low, high = cluster_bootstrap(hits, np.arange(len(hits)), len(hits), draws)
    return {
        "value": float(hits.mean()),
        "low": low,
        "high": high,
        "chance": 1 / len(CATEGORIES),
        "n": len(hits),
    }
