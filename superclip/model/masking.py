"""The patches that a vision tower sees in training: a module in the place of open_clip's
`patch_dropout`, between position embeddings and first block."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from superclip.config import ImageReduction
from superclip.errors import UserError
from superclip.ops.reduction import Mask, kept_patches, keys


class PatchMask(nn.Module):
    """Keeps the class token and some patches of each training picture, in their order; everything
    in evaluation.

    Which ones, `choose` decides before the forward pass: a picture keeps the same ones in every
    forward pass of a step, on any rank and in any micro-batch. There are no parameters and nothing
    in the state dict.

    Args:
        side: patches a side.
        kind, kept: as of `kept_patches`.
        seed: of the run.
    """

    keys: Tensor

    def __init__(self, side: int, kind: Mask, kept: int, seed: int):
        super().__init__()
        self.side, self.kept, self.seed = side, kept, seed
        self.kind: Mask = kind
        self.register_buffer("keys", torch.zeros(1, dtype=torch.long), persistent=False)

    def choose(self, rows: Int[Tensor, " b"], epoch: int) -> None:
        """Decide for the pictures of the next forward pass."""
        self.keys = keys(self.seed, epoch, rows)

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b k w"]:
        if not self.training:
            return tokens
        index = kept_patches(self.keys, self.side, self.kind, self.kept)[..., None]
        patches = tokens[:, 1:].gather(1, index.expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], patches], 1)


def mask_patches(clip: Any, reduction: ImageReduction, seed: int) -> PatchMask:
    """Put the mask into the slot of a model.

    Raises:
        UserError: if its vision tower has no such slot, or its grid can't be thinned out so.
    """
    visual = clip.visual
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"--image-reduction {reduction}: {type(visual).__name__} has no slot for masks; use "
            "one of open_clip's vision transformers"
        )
    if getattr(visual.patch_dropout, "prob", 0):
        raise UserError(
            f"--image-reduction {reduction}: the model's own configuration drops patches "
            "(patch_dropout); take it out there, or leave the flag out"
        )
    high, wide = visual.grid_size
    assert high == wide, "preprocessing refuses what is not square"
    kind = reduction.kind
    assert kind != "resize"
    mask = PatchMask(high, kind, reduction.kept(high), seed)
    visual.patch_dropout = mask  # pyright: ignore[reportAttributeAccessIssue]
    return mask
