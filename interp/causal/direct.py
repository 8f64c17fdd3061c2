"""What each part of the tower writes into its output directly: an exact decomposition.

Given an image's own scale s, the final LayerNorm is affine, so the output is a sum over all that
was ever added to the residual stream. A summand u contributes `D(u) = ((u - mean u) / s * w) proj`
(w, b: the norm's weight and bias), b contributes `b proj`, and nothing is left over. This is what
a part writes, not what the model loses without it: later layers read it too, and `repair` compares
the two. Gandelsman et al., "Interpreting CLIP's Image Representation via Text-Based Decomposition"
(2024), section 3; the splits of `ln_pre` and of patch-average pooling are added here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.causal.units import Ablation, Images, check_ablation, check_units, every, group
from interp.heads import Head
from interp.hooked import HookedVisionTransformer, TowerCache
from interp.hooked.blocks import layer_scaled, wide
from interp.hooked.cache import ROUNDING
from superclip.errors import UserError

CAPTIONS = ("own", "wrong", "margin")
"""The directions of `caption_directions`, in order."""

Directions = Float[Tensor, "*image direction embed"]
# A function where directions depend on the features of the pass: the hardest wrong caption does.
DirectionsOf = Directions | Callable[[Tensor], Tensor]
PerHead = Float[np.ndarray, "image *head"]
Keep = Callable[[Tensor], Tensor]

EMBEDDINGS = ("hook_embed", "hook_pos_embed")


@dataclass(frozen=True)
class Parts:
    """The tower's output, or its cosine with some directions, as a sum over its parts.

    The last axis holds the coordinates of the output (`decompose`) or the directions
    (`direct_effects`). All but `total` sum to `total`.

    Attributes:
        heads: What each head writes, LayerScale included.
        attn_bias: The output bias of each attention.
        mlps: What each MLP writes, its biases included.
        embed: Class token and patches; behind `ln_pre`, by its affine split at the image's scale.
        pos_embed: Positions, likewise.
        ln_pre_bias: The bias of `ln_pre`; 0 in a tower without one.
        output_bias: The bias of the final LayerNorm, projected.
        total: The output or the cosines themselves, taken from the forward pass.
    """

    heads: Float[Tensor, "image layer head value"]
    attn_bias: Float[Tensor, "image layer value"]
    mlps: Float[Tensor, "image layer value"]
    embed: Float[Tensor, "image value"]
    pos_embed: Float[Tensor, "image value"]
    ln_pre_bias: Float[Tensor, "image value"]
    output_bias: Float[Tensor, "image value"]
    total: Float[Tensor, "image value"]

    def named(self) -> dict[str, Float[Tensor, "image value"]]:
        """All summands in the order of the tower: `embed`, ..., `L0H0`, `L0 bias`, `L0 mlp`, ..."""
        parts = {name: getattr(self, name) for name in ("embed", "pos_embed", "ln_pre_bias")}
        for layer in range(self.heads.shape[1]):
            heads = self.heads[:, layer].unbind(dim=1)
            parts |= {str(Head(layer, index)): head for index, head in enumerate(heads)}
            parts[f"L{layer} bias"] = self.attn_bias[:, layer]
            parts[f"L{layer} mlp"] = self.mlps[:, layer]
        return parts | {"output_bias": self.output_bias}

    def sum(self) -> Float[Tensor, "image value"]:
        """The sum over all parts, which is `total` up to rounding."""
        return torch.stack(list(self.named().values())).sum(dim=0)


@dataclass(frozen=True)
class PatchParts:
    """The parts of some heads, by the token that they were read from; values are as in `Parts`.

    Attributes:
        patches: What a head moves from each patch into the output, on the grid of patches.
        class_token: What it moves from the class token.
    """

    patches: Float[Tensor, "image head value row column"]
    class_token: Float[Tensor, "image head value"]

    def sum(self) -> Float[Tensor, "image head value"]:
        """The sum over tokens, which is the head's own part up to rounding."""
        return self.patches.sum(dim=(-2, -1)) + self.class_token


def decompose(tower: HookedVisionTransformer, images: Images) -> Parts:
    """The tower's output (projected, not normalised) as a sum of vectors, in one forward pass.

    Parts are in at least float32, without autocast. With patch-average pooling every patch reaches
    the output, so `z` and MLP outputs of all layers are held until the end of the pass:
    2 x layers x tokens x width values an image. Projecting every head costs as many products as
    one image's pass, once a batch.

    Raises:
        UserError: The parts do not sum to the output, because an enclosing block intervenes on the
            stream, the final norm or the output itself.
    """
    return _parts(tower, images, partial(_identity, tower), cosine=False)


def direct_effects(
    tower: HookedVisionTransformer, images: Images, directions: DirectionsOf
) -> Parts:
    """Each image's cosine with each direction as a sum over parts, in one forward pass.

    `cos = sum over u of D(u) . t / |output|`, taken as u times t's vector in the residual stream
    (for a head: in its d_head), so that no part is ever projected.

    Args:
        directions: `[direction, embed]` for all images (class vectors) or `[image, direction,
            embed]` for each its own (captions), or a function from the features to these. Unit
            vectors give cosines, differences of unit vectors give margins.

    Raises:
        UserError: As `decompose`, or the directions have another shape.
    """
    return _parts(tower, images, directions, cosine=True)


def decompose_heads(
    tower: HookedVisionTransformer, images: Images, heads: Sequence[Head]
) -> PatchParts:
    """As `decompose`, for some heads and by token: `A[class, p] v_p W_O`, projected.

    With patch-average pooling, the mean over the queries that reach the output.

    Raises:
        UserError: As `decompose`, no head, or one that the tower does not have.
    """
    return _patch_parts(tower, images, partial(_identity, tower), heads, cosine=False)


def head_patch_map(
    tower: HookedVisionTransformer,
    images: Images,
    directions: DirectionsOf,
    heads: Sequence[Head],
) -> PatchParts:
    """What some heads move from each patch towards each text: their direct effect as a map.

    Args:
        directions: As for `direct_effects`.
        heads: In any order, which the axis `head` follows.

    Raises:
        UserError: As `decompose_heads`, or the directions have another shape.
    """
    return _patch_parts(tower, images, directions, heads, cosine=True)


def caption_directions(
    features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "caption embed"],
    owner: Int[Tensor, " caption"],
    rows: Int[Tensor, " image"],
) -> Float[Tensor, "image 3 embed"]:
    """Each image's own captions (mean), its hardest wrong one, and their difference: `CAPTIONS`.

    The cosine with the difference is `contrastive_margin` of the intact image. It stays with the
    wrong caption that was hardest for `features`, where a margin computed anew would change over.

    Args:
        features: Any scale.
        text_features: Any scale.
        owner: The image that each caption describes.
        rows: Which images `features` are, in the numbering of `owner`.

    Raises:
        UserError: An image has no caption of its own, or all of them.
    """
    texts = F.normalize(text_features.to(features), dim=-1)
    own = (owner == rows[:, None]).to(features.device)
    count = own.sum(dim=1, keepdim=True)
    if bool(((count == 0) | (count == len(texts))).any()):
        raise UserError("every image needs a caption of its own and one of another")
    mean = own.to(texts) @ texts / count
    wrong = texts[(features @ texts.T).masked_fill(own, -torch.inf).argmax(dim=1)]
    return torch.stack([mean, wrong, mean - wrong], dim=1)


def cosines(
    features: Float[Tensor, "*sets image embed"], directions: Directions
) -> Float[Tensor, "*sets image direction"]:
    """Products of the normalised features with the directions of `direct_effects`.

    Of the features under ablation, less those of the intact tower, it is the total effect.
    """
    rows = "bke" if directions.ndim == 3 else "ke"
    unit = F.normalize(features.to(wide(features.dtype)), dim=-1)
    return torch.einsum(f"...be,{rows}->...bk", unit, directions.to(unit))


@torch.no_grad()
def direct_ablation(
    tower: HookedVisionTransformer, images: Images, directions: DirectionsOf, ablation: Ablation
) -> Float[Tensor, "image layer head direction"]:
    """Change of the cosines if a head were ablated in its direct path alone.

    The head's part of the output is taken as of the `z` that the ablation puts in place, and the
    sum is normalised anew; the scale of the final LayerNorm stays, and no later layer sees the
    change. So this is the direct part of an ablation, and no ablation. One forward pass; every
    head is projected, as in `decompose`. Replacing parts of the output by their means over images
    (Gandelsman et al.) differs by the images' own scales only.

    Args:
        directions: As for `direct_effects`.
        ablation: Of kind `zero` or `mean`. Replacing the class token's output alone changes
            nothing where patches are pooled.

    Raises:
        UserError: The kind is `resample`, or the means or directions do not fit.
    """
    check_ablation(tower.cfg, ablation, every(tower.cfg, "head"))
    if ablation.kind == "resample":
        raise UserError("direct ablation is zero or mean: resampling has no direct form here")
    rows = partial(_pooled_rows, tower)
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(tower.cfg.n_layers)]
    identity = partial(_identity, tower)
    kept, reading = _record(tower, images, dict.fromkeys(z, rows), identity, cosine=False)
    features = reading.features
    wanted = _directions(directions, features)
    pooled = ablation.tokens == "all" or tower.visual.pool_type == "tok"
    changes = []
    for layer, site in enumerate(z):
        means = 0 if ablation.mean_z is None else rows(ablation.mean_z[layer, None].to(kept[site]))
        part = reading.heads(layer, pooled * (means - kept[site])).transpose(0, 1)
        changes.append(cosines(features + part, wanted) - cosines(features, wanted))
    return torch.stack(changes).permute(2, 0, 1, 3)


@dataclass(frozen=True)
class Repair:
    """Direct against total effect of removing a head, image by image.

    Attributes:
        direct: Change of the score by the head's direct part alone (`direct_ablation`).
        total: Change of the score under exact ablation, same kind and directions.
    """

    direct: PerHead
    total: PerHead

    @property
    def indirect(self) -> PerHead:
        """What everything downstream of the head adds, the final norm's scale included."""
        return self.total - self.direct

    @property
    def repaired(self) -> PerHead:
        """The indirect effect against the direct one: above 0 repaired, below 0 amplified.

        Its sum over images over that of `abs(direct)` is the share that is repaired: 0 if nothing
        happens downstream, 1 if the loss is made good, negative if it grows. An image's own
        quotient means little where the direct effect is near 0.
        """
        return -np.sign(self.direct) * self.indirect


def repair(direct: Float[np.ndarray, "..."], total: Float[np.ndarray, "..."]) -> Repair:
    """Pair direct with total effects of the same heads on the same images.

    Raises:
        UserError: The shapes differ.
    """
    if direct.shape != total.shape:
        raise UserError(f"direct effects are {direct.shape}, total effects {total.shape}")
    return Repair(direct, total)


class _Reading:
    """The output in some directions as a linear function of a summand u of the residual stream.

    u reaches the output as `sum over r of weights_r u_r`, r over the tokens that are pooled, and
    meets a direction t as `vectors = w * (proj t)`, which is centred in place of u. With `cosine`,
    weights and features are divided by the norm of the output.
    """

    def __init__(
        self,
        tower: HookedVisionTransformer,
        features: Float[Tensor, "image embed"],
        stream: Float[Tensor, "image row d_model"],
        given: DirectionsOf,
        cosine: bool,
    ) -> None:
        self.tower, visual = tower, tower.visual
        self.norm = cast(nn.LayerNorm, visual.ln_post)
        features = features.to(stream)
        norm = features.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # as F.normalize
        self.share = 1 / norm if cosine else torch.ones_like(norm)
        pooled = stream.mean(dim=1, keepdim=True) if visual.final_ln_after_pool else stream
        scale = (pooled.var(dim=-1, unbiased=False) + self.norm.eps).sqrt()
        self.weights = (self.share / (scale * stream.shape[1])).expand(-1, stream.shape[1])
        self.features = features * self.share
        self.directions = _directions(given, features)
        proj = visual.proj
        self.projected = self.directions if proj is None else self.directions @ proj.to(features).T
        vectors = self.projected * self.norm.weight
        self.vectors = vectors - vectors.mean(dim=-1, keepdim=True)

    def pool(self, x: Float[Tensor, "image row *part"]) -> Float[Tensor, "image *part"]:
        return torch.einsum("br,br...->b...", self.weights, x)

    def summand(self, x: Float[Tensor, "image row d_model"]) -> Float[Tensor, "image direction"]:
        return _along(self.pool(x), self.vectors)

    def attn_bias(self, layer: int) -> Float[Tensor, "image direction"]:
        """The same at every token, so its weight is that of all pooled tokens."""
        attn = self.tower.block(layer).attn
        bias = layer_scaled(attn.source.ls_1, attn.b_O).to(self.vectors)
        return self.weights.sum(dim=-1, keepdim=True) * (self.vectors @ bias)

    def output_bias(self) -> Float[Tensor, "image direction"]:
        return self.share * (self.projected @ self.norm.bias.to(self.projected))

    def head_vectors(self, layer: int) -> Float[Tensor, "images direction head d_head"]:
        """The vectors as the heads of a layer meet them: `W_O (ls_1 * vectors)`."""
        source = self.tower.block(layer).attn.source
        met = layer_scaled(source.ls_1, self.vectors) @ source.attn.out_proj.weight.to(self.vectors)
        return met.unflatten(-1, (self.tower.cfg.n_heads, -1))

    def heads(
        self, layer: int, z: Float[Tensor, "image row head d_head"]
    ) -> Float[Tensor, "image head direction"]:
        return _along(self.pool(z), self.head_vectors(layer))


@torch.no_grad()
def _parts(
    tower: HookedVisionTransformer, images: Images, given: DirectionsOf, cosine: bool
) -> Parts:
    layers = range(tower.cfg.n_layers)
    z, mlp = ([f"blocks.{i}.{site}" for i in layers] for site in ("attn.hook_z", "hook_mlp_out"))
    rows = partial(_pooled_rows, tower)
    keep = dict.fromkeys([*z, *mlp], rows) | dict.fromkeys(EMBEDDINGS, _whole)
    kept, reading = _record(tower, images, keep, given, cosine)
    split = TowerCache({name: kept[name] for name in EMBEDDINGS}, tower)
    stack, names = split.decompose_resid(0, return_labels=True)
    embedding = {name: reading.summand(rows(part)) for name, part in zip(names, stack)}
    parts = Parts(
        heads=torch.stack([reading.heads(i, kept[z[i]]) for i in layers], dim=1),
        attn_bias=torch.stack([reading.attn_bias(i) for i in layers], dim=1),
        mlps=torch.stack([reading.summand(kept[site]) for site in mlp], dim=1),
        embed=embedding["embed"],
        pos_embed=embedding["pos_embed"],
        ln_pre_bias=embedding.get("ln_pre_bias", torch.zeros_like(embedding["embed"])),
        output_bias=reading.output_bias(),
        total=_along(reading.features, reading.directions),
    )
    _check_sum(torch.stack(list(parts.named().values())), parts.total, tower, "the output")
    return parts


@torch.no_grad()
def _patch_parts(
    tower: HookedVisionTransformer,
    images: Images,
    given: DirectionsOf,
    heads: Sequence[Head],
    cosine: bool,
) -> PatchParts:
    cfg = tower.cfg
    indices = _indices(tower, heads)
    keep: dict[str, Keep] = {}
    for layer, chosen in indices.items():
        for site in "qz":  # queries, like summands, count where they are pooled
            keep[f"blocks.{layer}.attn.hook_{site}"] = partial(_pooled_rows, tower, heads=chosen)
        for site in "kv":
            keep[f"blocks.{layer}.attn.hook_{site}"] = partial(_whole, heads=chosen)
    kept, reading = _record(tower, images, keep, given, cosine)
    found: dict[Head, Float[Tensor, "image direction token"]] = {}
    for layer, chosen in indices.items():
        q, k, v, z = (kept[f"blocks.{layer}.attn.hook_{site}"] for site in "qkvz")
        vectors = reading.head_vectors(layer)[:, :, chosen]
        values = torch.einsum("bthd,bkhd->hbkt", v, vectors)
        tokens = values * _weighted_pattern(q, k, reading.weights).transpose(0, 1)[:, :, None]
        whole = _along(reading.pool(z), vectors).transpose(0, 1)
        _check_sum(tokens.movedim(-1, 0), whole, tower, f"the heads of layer {layer}")
        found |= {Head(layer, index): part for index, part in zip(chosen, tokens)}
    tokens = torch.stack([found[head] for head in heads], dim=1)
    patches = tokens[..., cfg.prefix_tokens :].unflatten(-1, cfg.grid)
    return PatchParts(patches, tokens[..., : cfg.prefix_tokens].sum(dim=-1))


def _record(
    tower: HookedVisionTransformer,
    images: Images,
    keep: Mapping[str, Keep],
    given: DirectionsOf,
    cosine: bool,
) -> tuple[dict[str, Tensor], _Reading]:
    """One forward pass: what `keep` takes of each site, and how to read the output from it."""
    kept: dict[str, Tensor] = {}

    def record(x: Tensor, hook: Any) -> None:
        kept[hook.name] = keep[hook.name](x)

    last = f"blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
    keep = {**keep, last: partial(_pooled_rows, tower)}
    with (
        torch.autocast(images.device.type, enabled=False),
        tower.hooks(fwd_hooks=[(site, record) for site in keep]),
    ):
        features = tower(images)
    return kept, _Reading(tower, features, kept[last], given, cosine)


def _pooled_rows(
    tower: HookedVisionTransformer,
    x: Float[Tensor, "image token ..."],
    heads: list[int] | None = None,
) -> Float[Tensor, "image row ..."]:
    """The tokens that the output pools, of some heads: the class token, or all patches."""
    return _whole(x[:, :1] if tower.visual.pool_type == "tok" else x[:, 1:], heads)


def _whole(
    x: Float[Tensor, "image token ..."], heads: list[int] | None = None
) -> Float[Tensor, "image token ..."]:
    """A copy, in at least float32: a view of a token would hold the tensor it is cut from."""
    x = x if heads is None else x[:, :, heads]
    return x.to(wide(x.dtype)).contiguous()


def _weighted_pattern(
    q: Float[Tensor, "image row head d_head"],
    k: Float[Tensor, "image token head d_head"],
    weights: Float[Tensor, "image row"],
) -> Float[Tensor, "image head token"]:
    """Attention paid to each token by the queries that are pooled, by their weights."""
    scores = torch.einsum("brhd,bthd->bhrt", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("br,bhrt->bht", weights, scores.softmax(dim=-1))


def _along(
    pooled: Float[Tensor, "image *part d"], vectors: Float[Tensor, "images direction *part d"]
) -> Float[Tensor, "image *part direction"]:
    """Products of each image's summands with its own vectors, or with those of all images."""
    return torch.einsum("b...d,bk...d->b...k", pooled, vectors)


def _identity(
    tower: HookedVisionTransformer, features: Float[Tensor, "image embed"]
) -> Float[Tensor, "embed embed"]:
    return torch.eye(tower.cfg.embed_dim, dtype=features.dtype, device=features.device)


def _directions(
    given: DirectionsOf, features: Float[Tensor, "image embed"]
) -> Float[Tensor, "images direction embed"]:
    """Directions with an axis of images, of length 1 if all images share them."""
    directions = given if isinstance(given, Tensor) else given(features)
    n, embed = features.shape
    shape = tuple(directions.shape)
    if len(shape) < 2 or shape[-1] != embed or shape[:-2] not in ((), (n,)):
        raise UserError(
            f"directions are {list(shape)}; give [direction, {embed}] for all images or "
            f"[{n}, direction, {embed}] for each its own"
        )
    directions = directions.to(features)
    return directions if directions.ndim == 3 else directions[None]


def _indices(tower: HookedVisionTransformer, heads: Sequence[Head]) -> dict[int, list[int]]:
    """The heads asked for, each once, by layer."""
    if not heads:
        raise UserError("no head to map; name at least one, like L11H5")
    check_units(tower.cfg, [group(heads)])
    layers = sorted({head.layer for head in heads})
    return {i: sorted({head.index for head in heads if head.layer == i}) for i in layers}


def _check_sum(
    parts: Float[Tensor, "part *rest"],
    total: Float[Tensor, "*rest"],
    tower: HookedVisionTransformer,
    what: str,
) -> None:
    """Raise unless the parts sum to the total, up to rounding of the sum of their sizes."""
    coarse = total.is_cuda and torch.get_float32_matmul_precision() != "highest"
    limit = 0.1 if coarse else ROUNDING.get(tower.cfg.dtype, 0.1)
    error = (parts.sum(dim=0) - total).abs().max() / parts.abs().sum(dim=0).max()
    if not error <= limit:
        raise UserError(
            f"the parts miss {what} by {error:.1e} of their size: an enclosing block intervenes on "
            "attention, the residual stream, the final norm or the output"
        )
