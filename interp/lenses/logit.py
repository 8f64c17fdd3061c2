"""Lenses: the residual stream before the first layer and after each, read as if it were the last.

A reading is what the model itself would take off the stream: through the final LayerNorm the mean
of the patches (for SuperCLIP's token head), or the pooled and projected feature. Early streams
stand in another basis than the last, so every lens has three forms: `raw`; `corrected`, less the
mean over discovery pictures, which is the words' frequency; `tuned`, after an affine map to the
last reading (Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens",
2023, here by ridge regression). How well a form foretells the last reading is its R^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.hooked import HookedVisionTransformer

PENALTIES = 10.0 ** np.arange(-6, 3)
"""Of the ridge, a picture, in units of the readings' variance; leaving one out chooses."""

Source = Literal["patches", "pooled"]
Pieces = tuple[tuple[int, ...], ...]
Summary = Callable[[Tensor, Pieces], Tensor]


@torch.no_grad()
def read(
    tower: HookedVisionTransformer, images: Float[Tensor, "image 3 height width"], source: Source
) -> tuple[Float[Tensor, "image layer read"], Float[Tensor, "image layer patch read"]]:
    """Readings of pictures and of their patches: of the embedded picture, then after each layer.

    Args:
        source: `patches` reads the mean of the normalised patches; `pooled` the tower's output,
            where a patch is read as if it were what is pooled.
    """
    last, visual = tower.cfg.n_layers, tower.visual
    sites = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(last))]
    _, cache = tower.run_with_cache(images, names_filter=sites)
    streams, first = [cache[site] for site in sites], tower.cfg.prefix_tokens
    patches = torch.stack([visual.ln_post(stream[:, first:]) for stream in streams], dim=1)
    if source == "patches":
        return patches.mean(dim=2), patches
    pooled = torch.stack([tower(stream, start_at_layer=last) for stream in streams], dim=1)
    return pooled, patches if visual.proj is None else patches @ visual.proj


@dataclass(frozen=True)
class Lens:
    """What a reading says of candidates: log-probabilities of caption tokens by the model's own
    token head, or cosines with texts, one a word.

    Attributes:
        norm, weight, bias: what comes before the linear map, and that map's rows of the candidates.
        pieces: the tokens of each word, as places among the candidates.
        tokens: whether the candidates are tokens.
    """

    norm: Callable[[Tensor], Tensor]
    weight: Float[Tensor, "candidate read"]
    bias: Float[Tensor, " candidate"] | None
    pieces: Pieces
    tokens: bool

    def logits(self, reading: Float[Tensor, "*rows read"]) -> Float[Tensor, "*rows candidate"]:
        """Of the last reading, the token logits or cosines of the model itself."""
        return F.linear(self.norm(reading), self.weight, self.bias)


def word_scores(
    scores: Float[Tensor, "*rows candidate"], pieces: Pieces
) -> Float[Tensor, "*rows word"]:
    """A word's score: the mean over all its pieces."""
    return torch.stack([scores[..., list(own)].mean(dim=-1) for own in pieces], dim=-1)


def word_ranks(
    scores: Float[Tensor, "*rows candidate"], pieces: Pieces
) -> Float[Tensor, "*rows word 2"]:
    """Mean and minimum over a word's pieces of the rank, 1 + number larger + half of the ties.

    A random order gives (candidates + 1) / 2.
    """

    def rank(place: int) -> Tensor:
        own = scores[..., place, None]
        return 0.5 + (scores > own).sum(dim=-1) + (scores == own).sum(dim=-1) / 2

    ranks = [torch.stack([rank(place) for place in own], dim=-1) for own in pieces]
    return torch.stack([torch.stack([r.mean(-1), r.amin(-1)], dim=-1) for r in ranks], dim=-2)


@dataclass(frozen=True)
class Forms:
    """A lens in its three forms, fitted on discovery.

    Attributes:
        mean, logits: means over pictures of the readings and of what the lens makes of them.
        weight, bias: `reading @ weight + bias` foretells the last reading.
    """

    lens: Lens
    mean: Float[Tensor, "layer read"]
    logits: Float[Tensor, "layer candidate"]
    weight: Float[Tensor, "layer read read"]
    bias: Float[Tensor, "layer read"]

    def scores(
        self, reading: Float[Tensor, "image layer *patch read"], summary: Summary = word_scores
    ) -> Float[Tensor, "image form layer *patch ..."]:
        """The words' scores, or their ranks, in each form."""
        logits, found = self.lens.logits, []
        for layer, x in enumerate(reading.unbind(dim=1)):  # all at once would not fit the memory
            tuned = logits(x @ self.weight[layer] + self.bias[layer])
            if self.lens.tokens:
                raw = logits(x)
                forms = (f.log_softmax(-1) for f in (raw, raw - self.logits[layer], tuned))
            else:
                forms = (logits(x), logits(x - self.mean[layer]), tuned)
            found.append(torch.stack([summary(f, self.lens.pieces) for f in forms], dim=1))
        return torch.stack(found, dim=2)

    def errors(
        self, reading: Float[Tensor, "image layer read"]
    ) -> Float[Tensor, "image form layer"]:
        """Squared errors of the last reading as each form takes it from each layer's."""
        shifted = reading - self.mean + self.mean[-1]
        tuned = torch.einsum("blr,lrs->bls", reading, self.weight) + self.bias
        foretold = torch.stack([reading, shifted, tuned], dim=1)
        return (foretold - reading[:, None, None, -1]).square().sum(dim=-1)


@torch.no_grad()
def fit(lens: Lens, readings: Float[Tensor, "image layer read"]) -> Forms:
    """Means and tuned maps of the discovery pictures; the last layer's map is the identity."""
    from sklearn.linear_model import RidgeCV

    width = readings.shape[-1]
    weight = torch.eye(width).to(readings).repeat(readings.shape[1], 1, 1)
    bias = torch.zeros(readings.shape[1:]).to(readings)
    values = readings.double().cpu().numpy()
    for layer in range(readings.shape[1] - 1):
        x = values[:, layer]
        unit = len(x) * max(float(x.var(axis=0).mean()), 1e-12)
        found = RidgeCV(alphas=PENALTIES * unit).fit(x, values[:, -1])
        weight[layer] = torch.from_numpy(np.asarray(found.coef_).T)
        bias[layer] = torch.from_numpy(np.asarray(found.intercept_))
    return Forms(lens, readings.mean(dim=0), lens.logits(readings).mean(dim=0), weight, bias)
