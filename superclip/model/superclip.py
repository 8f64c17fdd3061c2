"""CLIP with an optional head that predicts caption tokens from the picture."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from superclip.model.grid import grid_width, pooled_and_mean
from superclip.model.masking import PatchMask
from superclip.model.output import ClipOutput


class TokenHead(nn.Module):
    """Predicts caption tokens from a picture (SuperCLIP, NeurIPS 2025).

    Args:
        width: features it reads.
        vocab_ids: the token ids its columns stand for; None is the whole vocabulary.
        vocabulary: size of the tokenizer's vocabulary.
        source: patches (mean of the tower's final patch tokens, LayerNorm, Linear: the paper) or
            pooled (the
            projected image feature, Linear alone: the small-scale variant).
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        source: Literal["patches", "pooled"] = "patches",
        vocab_ids: Int[Tensor, " v"] | None = None,
    ):
        super().__init__()
        self.source: Literal["patches", "pooled"] = source
        self.vocabulary = vocabulary
        columns = vocabulary if vocab_ids is None else len(vocab_ids)
        self.norm = nn.LayerNorm(width) if source == "patches" else nn.Identity()
        self.linear = nn.Linear(width, columns)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("vocab_ids", vocab_ids)

    def forward(self, features: Float[Tensor, "b w"]) -> Float[Tensor, "b v"]:
        """Token logits, for evaluation and lenses; training takes them in chunks from
        `ClipOutput`."""
        return self.linear(self.norm(features))


class SuperCLIP(nn.Module):
    """An open_clip model, its normalisation and the token head under one forward.

    Args:
        clip: an open_clip `CLIP`, or another model with its methods.
        mean, std: of the pictures' channels in [0, 1].
        token_head: or None.
        normalize: whether `forward` brings features to unit length, as `encode_*` always do; not
            for a loss that reads raw ones.
    """

    def __init__(
        self,
        clip: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        token_head: TokenHead | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        assert normalize or token_head is None, "a token head goes with unit vectors"
        self.normalize = normalize
        self.clip: Any = clip
        self.token_head = token_head
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None] * 255, persistent=False)

    def normalise(self, images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """The first operation on the device: uint8 pixels to the tower's input."""
        return images.to(self.mean.dtype).sub_(self.mean).div_(self.std)

    def encode_image(self, images: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """Unit vectors of pictures."""
        return F.normalize(self.clip.encode_image(self.normalise(images)), dim=-1)

    def encode_patches(
        self, images: UInt8[Tensor, "b 3 s s"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b w"]]:
        """Unit vectors of pictures, and the means of their final patch tokens.

        Raises:
            UserError: if the tower has no patch tokens.
        """
        return self._pooled_and_patches(self.normalise(images))

    @cached_property
    def patch_width(self) -> int:
        """Width of the vision tower's patch tokens; 0 where it has none."""
        return grid_width(self.clip.visual)

    @property
    def feature_width(self) -> int:
        """Dimensions of the joint space."""
        return int(self.clip.visual.output_dim)

    def encode_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts."""
        return F.normalize(self.clip.encode_text(tokens), dim=-1)

    def choose_patches(self, rows: Int[Tensor, " b"], epoch: int) -> None:
        """Decide which patches of these pictures the next forward pass keeps, where a mask is."""
        mask = getattr(self.clip.visual, "patch_dropout", None)
        if isinstance(mask, PatchMask):
            mask.choose(rows, epoch)

    def compile_towers(self, backend: str = "inductor") -> None:
        """Compile both towers for `forward`, each as one graph; a graph break is an error."""
        self._see = torch.compile(self._see, fullgraph=True, backend=backend)
        self._read = torch.compile(self._read, fullgraph=True, backend=backend)

    def forward(self, images: UInt8[Tensor, "b 3 s s"], tokens: Int[Tensor, "b l"]) -> ClipOutput:
        features, hidden = self._see(images)
        head = self.token_head
        return ClipOutput(
            features,
            self._read(tokens),
            self.clip.logit_scale.exp(),
            None if head is None else head.norm(hidden),
            None if head is None else head.linear.weight,
            None if head is None else head.linear.bias,
        )

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of pictures, and what the token head reads."""
        pixels, head = self.normalise(images), self.token_head
        if head is None or head.source == "pooled":
            features = self.clip.encode_image(pixels)
            return self._scaled(features), None if head is None else features
        return self._pooled_and_patches(pixels)

    def _pooled_and_patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, means = pooled_and_mean(self.clip.visual, pixels)
        return F.normalize(features, dim=-1), means

    def _read(self, tokens: Tensor) -> Tensor:
        return self._scaled(self.clip.encode_text(tokens))

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.normalize else features
