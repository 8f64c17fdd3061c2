"""Remove heads and measure what the joint embedding loses.

A head is ablated at `hook_z`, before the output projection, where heads are still apart; the bias
of the projection stays. Zero ablation is the blunt form (it also removes a head's constant part);
mean ablation puts the head's average over other images in its place, token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from superclip.errors import UserError

KINDS = ("zero", "mean")
TOKENS = ("all", "class")
Means = Float[Tensor, "layer token head d_head"]

SIMILARITY_BUDGET = 2**26  # cosines held at once: 256 MiB in float32


@contextmanager
def ablate(
    tower: HookedVisionTransformer,
    heads: Sequence[Head],
    kind: str,
    means: Means | None = None,
    tokens: str = "all",
) -> Iterator[HookedVisionTransformer]:
    """Within the `with` block, the heads' `z` is zero or its mean; afterwards nothing is left.

    Args:
        heads: The heads to remove, all at once.
        kind: `zero` or `mean`.
        means: For `kind="mean"`: what `mean_activations` returned on images that judge nothing.
        tokens: Replace `z` at `all` tokens, or only where the `class` token is the query.

    Raises:
        UserError: No head, a head the tower does not have, an unknown option, or means that are
            missing, unused or of another tower.
    """
    _check(tower, heads, kind, means, tokens)
    at = slice(None) if tokens == "all" else slice(0, tower.cfg.prefix_tokens)
    hooks = []
    for layer in sorted({head.layer for head in heads}):
        indices = sorted({head.index for head in heads if head.layer == layer})
        value = None if means is None else means[layer][at, indices]
        replace = partial(_replace, at=at, indices=indices, value=value)
        hooks.append((f"blocks.{layer}.attn.hook_z", replace))
    with tower.hooks(fwd_hooks=hooks):
        yield tower


def _replace(
    z: Float[Tensor, "batch token head d_head"],
    hook: object,
    *,
    at: slice,
    indices: list[int],
    value: Float[Tensor, "at ablated d_head"] | None,
) -> Float[Tensor, "batch token head d_head"]:
    z = z.clone()
    z[:, at, indices] = 0 if value is None else value.to(z)
    return z


def _check(
    tower: HookedVisionTransformer,
    heads: Sequence[Head],
    kind: str,
    means: Means | None,
    tokens: str,
) -> None:
    cfg = tower.cfg
    if kind not in KINDS:
        raise UserError(f"ablation kind {kind!r} is unknown; choose from {', '.join(KINDS)}")
    if tokens not in TOKENS:
        raise UserError(f"tokens {tokens!r} is unknown; choose from {', '.join(TOKENS)}")
    if not heads:
        raise UserError("no head to ablate; name at least one, like L11H5")
    for head in heads:
        if not (0 <= head.layer < cfg.n_layers and 0 <= head.index < cfg.n_heads):
            raise UserError(
                f"the tower has no head {head}: layers are 0 to {cfg.n_layers - 1}, heads 0 to "
                f"{cfg.n_heads - 1}"
            )
    if (kind == "mean") != (means is not None):
        raise UserError(f"{kind} ablation {'needs' if kind == 'mean' else 'takes no'} means")
    expected = (cfg.n_layers, cfg.n_ctx, cfg.n_heads, cfg.d_head)
    if means is not None and tuple(means.shape) != expected:
        raise UserError(f"means are {list(means.shape)}; this tower's are {list(expected)}")


def contrastive_margin(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "caption embed"],
    owner: Int[Tensor, " caption"],
) -> Float[Tensor, " image"]:
    """Mean cosine with an image's own captions, less that with the most similar wrong caption.

    Args:
        image_features: Any scale.
        text_features: Any scale.
        owner: The row of `image_features` that each caption describes.

    Raises:
        UserError: An image has no caption, or all of them.
    """
    chunks = []
    for similarity, own in _similarities(image_features, text_features, owner):
        mean_own = (similarity * own).sum(dim=1) / own.sum(dim=1)
        chunks.append(mean_own - similarity.masked_fill(own, -torch.inf).amax(dim=1))
    return torch.cat(chunks)


def _similarities(
    image_features: Tensor, text_features: Tensor, owner: Tensor
) -> Iterator[tuple[Float[Tensor, "chunk caption"], Bool[Tensor, "chunk caption"]]]:
    """Cosines of some images with all captions, and which captions are theirs, chunk by chunk."""
    images, texts = _unit_vectors(image_features, text_features, owner)
    rows = torch.arange(len(images), device=owner.device).unsqueeze(1)
    size = max(1, SIMILARITY_BUDGET // len(owner))
    for chunk, row in zip(images.split(size), rows.split(size), strict=True):
        yield chunk @ texts.T, row == owner


def _unit_vectors(
    image_features: Tensor, text_features: Tensor, owner: Tensor
) -> tuple[Float[Tensor, "image embed"], Float[Tensor, "caption embed"]]:
    n = len(image_features)
    if not bool(((owner >= 0) & (owner < n)).all()):
        raise UserError(f"a caption's owner lies outside the {n} images")
    counts = torch.bincount(owner, minlength=n)
    if bool((counts == 0).any()) or n < 2:
        raise UserError(
            f"{int((counts == 0).sum())} of {n} images have no caption; every image needs one of "
            "its own and one of another"
        )
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    images, texts = (F.normalize(x.to(dtype), dim=-1) for x in (image_features, text_features))
    return images, texts
