"""What images score intact and without each unit: every effect, from a bank of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.causal.ablation import contrastive_margin
from interp.causal.bank import AblationBank
from interp.causal.direct import caption_directions, cosines
from interp.stats.intervals import Interval
from superclip.evaluation.measures import MeanAveragePrecision, Measure
from superclip.evaluation.statistics import redrawn
from superclip.model.superclip import TokenHead
from superclip.ops.retrieval import ranks

PLACES = 1, 5, 10
"""A retrieved answer hits at these places."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What embeddings are asked; all on one device.

    Attributes:
        texts: captions, any scale. owner: the row of the image that each describes.
        classes: zero-shot classifier, any scale. present: whether an image shows a class.
        head: reads the bank's patch means, or its features.
        columns: of the head's output, the tokens that are ranked. held: whether a caption of the
            image holds one.
    """

    texts: Float[Tensor, "caption embed"]
    owner: Int[Tensor, " caption"]
    classes: Float[Tensor, "class embed"] | None = None
    present: Bool[np.ndarray, "image class"] | None = None
    head: TokenHead | None = None
    columns: Int[Tensor, " column"] | None = None
    held: Bool[Tensor, "image column"] | None = None


@dataclass(frozen=True, eq=False)
class Effects:
    """What images score intact and without each unit.

    Attributes:
        units: names, in the order of the axis.
        intact, ablated: by measure; `ablated[m] - intact[m]` is the effect. Averaged over draws.
            `margin`: mean cosine with own captions less that with the most similar wrong one,
            whichever that is under the ablation. `frozen`: the same against the caption that was
            the most similar wrong one intact, which is linear in the unit feature and blind to
            captions that only come near under the ablation. `i2t@k`: 1 where an own caption is
            among the k most similar. `t2i@k`: share of the image's captions that have it among
            their k most similar images. `token AP`: average precision of the captions' tokens among
            all, by the token head. Ties are misses.
        captions: of every image; weights that turn `t2i@k` into recall over captions.
        removed: norm of what the removal takes from the stream.
        mean_ap: zero-shot mean average precision over classes: intact, and the change by unit with
            its paired bootstrap interval over images; None without classes.
    """

    units: list[str]
    intact: dict[str, Float[np.ndarray, " image"]]
    ablated: dict[str, Float[np.ndarray, "unit image"]]
    captions: Int[np.ndarray, " image"]
    removed: Float[np.ndarray, "unit image"]
    mean_ap: tuple[float, list[Interval]] | None = None

    def change(self, measure: str) -> Float[np.ndarray, "unit image"]:
        """Ablated minus intact."""
        return self.ablated[measure] - self.intact[measure]


@torch.no_grad()
def effects(bank: AblationBank, asked: Questions, draws: int = 1000, seed: int = 0) -> Effects:
    """Every measure of every unit, image by image, on the device of the texts.

    Args:
        draws: of the bootstrap of mean average precision, which no single image has.

    Raises:
        UserError: The bank is not complete, or an image has no caption, or all of them.
    """
    texts, device = F.normalize(asked.texts.float(), dim=-1), asked.texts.device
    pairs = torch.stack([asked.owner, torch.arange(len(texts), device=device)], 1)
    captions = torch.bincount(asked.owner)
    whole = bank.read().to(device)
    contrastive_margin(whole, texts, asked.owner)  # checks the owners
    rows = torch.arange(len(whole), device=device)
    frozen = caption_directions(whole, texts, asked.owner, rows)[:, 2:]

    def measure(unit: str | None, draw: int = 0) -> dict[str, np.ndarray]:
        features = bank.read(unit, draw).to(device)
        images = F.normalize(features, dim=-1)
        found = {
            "margin": contrastive_margin(images, texts, asked.owner),
            "frozen": cosines(features, frozen)[:, 0],
        }
        to_text, to_image = ranks(images, texts, pairs)
        for k in PLACES:
            hits = torch.zeros(len(images), device=device)
            hits.index_add_(0, asked.owner, (to_image.rank < k).float())
            found |= {f"i2t@{k}": (to_text.rank < k).float(), f"t2i@{k}": hits / captions}
        if asked.head is not None and asked.columns is not None and asked.held is not None:
            patches = asked.head.source == "patches"
            read = bank.read(unit, draw, "patches").to(device) if patches else features
            logits = asked.head(read)[:, asked.columns]
            found["token AP"] = average_precision(logits, asked.held)
        return {name: values.double().cpu().numpy() for name, values in found.items()}

    intact, draws_of = measure(None), range(bank.facts["draws"])
    ablated = {name: np.zeros((len(bank.units), len(values))) for name, values in intact.items()}
    for number, unit in enumerate(bank.units):
        for draw in draws_of:
            for name, values in measure(unit, draw).items():
                ablated[name][number] += values / len(draws_of)
    return Effects(
        bank.units,
        intact,
        ablated,
        captions.cpu().numpy(),
        bank.removed.double().numpy(),
        _mean_ap(bank, asked, draws, seed),
    )


def average_precision(
    scores: Float[Tensor, "image column"], right: Bool[Tensor, "image column"]
) -> Float[Tensor, " image"]:
    """Of every image's right columns; wrong ones that tie stand before them. 0 without a right
    one."""
    wrong_first = right.int().argsort(dim=1, stable=True)
    order = scores.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)
    hits = right.gather(1, wrong_first).gather(1, order).double()
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    return (hits.cumsum(1) / places * hits).sum(1) / hits.sum(1).clamp_min(1)


def _mean_ap(
    bank: AblationBank, asked: Questions, draws: int, seed: int
) -> tuple[float, list[Interval]] | None:
    if asked.classes is None or asked.present is None:
        return None
    classes, present = F.normalize(asked.classes.float(), dim=-1), asked.present

    def measure(unit: str | None, draw: int = 0) -> Measure:
        images = F.normalize(bank.read(unit, draw).to(classes.device), dim=-1)
        scores = (images @ classes.T).double().cpu().numpy()
        return Measure("mAP", MeanAveragePrecision(scores, present), 0.0)

    def rows(found: Sequence[Measure]) -> Float[np.ndarray, " values"]:
        """The value and its draws, mean over the draws of donors."""
        values = [m.statistic.value for m in found]
        return np.concatenate([[np.mean(values)], redrawn(found, draws, seed).mean(0)])

    whole, intervals = rows([measure(None)]), []
    for unit in bank.units:
        change = rows([measure(unit, draw) for draw in range(bank.facts["draws"])]) - whole
        low, high = np.nanquantile(change[1:], [0.025, 0.975])
        intervals.append(Interval(float(change[0]), float(low), float(high), len(present)))
    return float(whole[0]), intervals
