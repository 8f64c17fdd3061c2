"""Operations that open_clip's transformers take for one picture and one text, counted from the
configuration alone; a multiplication and an addition are two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerFlops:
    """Of one input, forward.

    Attributes:
        tokens: that the blocks see.
        embedding: the patches' convolution, of all patches, kept or not.
        blocks: all blocks and the projection.
        scores: queries times keys, a part of the blocks'.
    """

    tokens: int
    embedding: int
    blocks: int
    scores: int

    @property
    def forward(self) -> int:
        return self.embedding + self.blocks

    @property
    def training(self) -> int:
        """Forward and backward: the backward pass costs twice the forward, but nobody needs the
        gradient at the pixels, and fused attention computes its scores once more."""
        return 3 * self.blocks + 2 * self.embedding + self.scores


def vision_flops(config: Mapping[str, Any], kept: int | None = None) -> TowerFlops:
    """Of a picture.

    Args:
        config: open_clip's model configuration.
        kept: patches that stay in training (default: all).

    Raises:
        ValueError: for a tower that is no plain vision transformer.
    """
    vision = {"width": 768, "layers": 12, "patch_size": 16, "image_size": 224} | config[
        "vision_cfg"
    ]
    plain = isinstance(vision["layers"], int) and isinstance(vision["image_size"], int)
    if not plain or "timm_model_name" in vision or vision.get("attentional_pool"):
        raise ValueError("only open_clip's plain vision transformers are counted")
    width, patch = vision["width"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    tokens = 1 + (patches if kept is None else kept)
    blocks = vision["layers"] * _block(tokens, width, int(width * vision.get("mlp_ratio", 4.0)))
    embedding = 2 * 3 * patch**2 * width * patches
    scores = vision["layers"] * 2 * tokens**2 * width
    return TowerFlops(tokens, embedding, blocks + 2 * width * config["embed_dim"], scores)


def text_flops(config: Mapping[str, Any]) -> TowerFlops:
    """Of a text of the configuration's context length.

    Raises:
        ValueError: for a text tower of another library.
    """
    text = {"width": 512, "layers": 12, "context_length": 77} | config["text_cfg"]
    if "hf_model_name" in text or "hf_config" in text:
        raise ValueError("only open_clip's own text transformers are counted")
    width, tokens = text["width"], text["context_length"]
    blocks = text["layers"] * _block(tokens, width, int(width * text.get("mlp_ratio", 4.0)))
    scores = text["layers"] * 2 * tokens**2 * width
    return TowerFlops(tokens, 0, blocks + 2 * width * config["embed_dim"], scores)


def _block(tokens: int, width: int, hidden: int) -> int:
    """Four projections, scores and their mixing, two layers of the MLP."""
    return 2 * tokens * (4 * width**2 + 2 * tokens * width + 2 * width * hidden)
