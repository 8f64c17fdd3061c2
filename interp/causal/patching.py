"""Activation patching between two pictures: which part of the tower carries what tells them apart.

One picture runs with the other's activation put in at one node: `denoise` runs the corrupted one
(does the clean node suffice?), `noise` the clean one (is the node needed?). A node's share of the
gap, (m_patched - m_run) / (m_other - m_run), is 0 where it carries nothing, 1 where it carries all
(normalised recovery: Zhang and Nanda, "Towards Best Practices of Activation Patching", 2024).

Nodes are the stream at some tokens where it enters a layer (`hook_resid_pre`), and per head

    z = pattern v  ->  pattern~ v~ ("z"),  pattern~ v ("pattern"),  pattern v~ ("value")

with ~ for the other picture: where a head looks, against what it finds there. The nodes of a layer
go on together from that layer, stacked as a batch; a head changes resid_mid by (z~ - z) W_O alone,
so its layer's attention is not computed again. The result equals a full forward with hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from interp.causal.sweep import MAX_MEMORY
from interp.causal.units import Images
from interp.hooked import HookedVisionTransformer
from interp.hooked.blocks import layer_scaled, wide
from interp.stats.draws import DRAWS
from interp.stats.intervals import Band, simultaneous_band
from interp.stats.multiplicity import SignFlipTest, sign_flip_test
from superclip.errors import UserError

DIRECTIONS = ("denoise", "noise")
GROUPS = ("class", "object", "other")
PARTS = ("z", "pattern", "value")

ENDS = [1, 0], [0, 1]  # by direction, the picture that runs and the other one; 0 is the clean one
SITES = ("attn.hook_pattern", "attn.hook_v", "hook_resid_mid")
ROUNDING = 32  # units of the last place: an effect below is none

Streams = Float[Tensor, "row token d_model"]
"""Of some nodes and all pairs, pairs the faster."""


class Patched(NamedTuple):
    """How far each patch moves the metric towards the other picture's; over the pair's gap, `clean
    - corrupted`, it is the share. `entry`: where the stream is patched, before every layer and
    behind the last. `clean` and `corrupted` are the metric unpatched, `patches` those patched one
    by one, none unless asked for."""

    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    groups: Float[Tensor, "pair direction entry group"]
    heads: Float[Tensor, "pair direction part layer head"]
    patches: Float[Tensor, "pair direction entry patch"]


def shares(
    effects: Float[np.ndarray, "pair ..."],
    gap: Float[np.ndarray, " pair"],
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Band, SignFlipTest]:
    """Mean effect over mean gap, which no pair with a small gap blows up: the simultaneous band of
    all nodes (linearised), and sign flips of the effects (two-sided, max-T)."""
    ratio = effects.mean(axis=0) / gap.mean()
    residual = effects - ratio * gap.reshape(-1, *[1] * ratio.ndim)
    values, one_stratum = ratio + residual / gap.mean(), np.zeros(len(gap), np.int64)
    band = simultaneous_band(values, one_stratum, 1, draws, seed)
    return band, sign_flip_test(effects, True, draws, seed)


def margin_directions(
    features: Float[Tensor, "pair embed"],
    texts: Float[Tensor, "text embed"],
    clean: Bool[Tensor, "pair text"],
    corrupted: Bool[Tensor, "pair text"],
) -> Float[Tensor, "pair embed"]:
    """Mean of the texts that are true of the clean picture, less that of the corrupted one's.

    Where the corrupted picture has none, the text that is most like the clean picture among those
    not true of it stands in: chosen once, by `features` of the clean pictures, for all patches.

    Raises:
        UserError: A pair has no text, or none to set against it.
    """
    texts = F.normalize(texts, dim=-1)
    if not bool((clean.any(1) & (corrupted.any(1) | ~clean.all(1))).all()):
        raise UserError("every pair needs a text of its own, and one that is wrong of it")
    wrong = (features.to(texts) @ texts.T).masked_fill(clean, -torch.inf).argmax(dim=1)
    hardest = F.one_hot(wrong, len(texts)).bool()
    other = torch.where(corrupted.any(1, keepdim=True), corrupted, hardest)
    own, against = (mask.to(texts) @ texts / mask.sum(1, keepdim=True) for mask in (clean, other))
    return own - against


@torch.no_grad()
def patch_batch(
    tower: HookedVisionTransformer,
    clean: Images,
    corrupted: Images,
    objects: Bool[Tensor, "pair patch"],
    directions: Float[Tensor, "pair embed"],
    every_patch: bool = False,
    max_memory: int = MAX_MEMORY,
) -> Patched:
    """Every node of a batch of pairs, in both directions.

    Args:
        objects: Patches that the group `object` stands for.
        directions: Whose cosine is the metric; unit vectors or differences of such.
        every_patch: Patch every patch by itself too: as many nodes more a layer.
        max_memory: Bytes of activations; pairs and nodes go in as large pieces as it allows.

    Raises:
        UserError: Shapes do not fit, hooks are on the tower, or the memory is too small for a pair.
    """
    cfg, n = tower.cfg, len(clean)
    expected = [n, cfg.n_ctx - cfg.prefix_tokens]
    if clean.shape != corrupted.shape or list(objects.shape) != expected or len(directions) != n:
        raise UserError(
            f"{list(clean.shape)} clean and {list(corrupted.shape)} corrupted pictures need objects"
            f" {expected} and as many directions, not {list(objects.shape)} and {len(directions)}"
        )
    if any(point.fwd_hooks or point.bwd_hooks for point in tower.hook_dict.values()):
        raise UserError("hooks are on the tower; leave their block, or reset_hooks(), first")
    site = cfg.n_ctx * cfg.d_model * cfg.dtype.itemsize
    row = 4 * site + 3 * site * cfg.d_mlp // cfg.d_model  # a node's peak, within a block
    held = 20 * site + 6 * cfg.n_heads * cfg.n_ctx**2 * cfg.dtype.itemsize + row  # a pair's
    size = max_memory // (held + row)
    if size < 1:
        raise UserError(
            f"a memory of {max_memory / 2**20:.4g} MiB is too small: a pair takes "
            f"{(held + row) / 2**20:.4g} MiB"
        )
    nodes, parts = (max_memory // min(size, n) - held) // row, []
    for start in range(0, n, size):
        given = [x[start : start + size] for x in (clean, corrupted, objects, directions)]
        parts.append(_patch(tower, given, every_patch, nodes))
    return Patched(*(torch.cat(of) for of in zip(*parts, strict=True)))


def _patch(
    tower: HookedVisionTransformer, given: Sequence[Tensor], every_patch: bool, size: int
) -> Patched:
    """Pairs that fit the memory, `size` nodes at a time, in one walk up the tower."""
    clean, corrupted, objects, directions = given
    masks, layers = _tokens(objects, tower.cfg.prefix_tokens, every_patch), tower.cfg.n_layers
    stream = tower(torch.cat([clean, corrupted]), stop_at_layer=0)

    def metric(x: Streams, layer: int) -> Float[Tensor, "node pair"]:
        features = tower(x, start_at_layer=layer).unflatten(0, (-1, len(clean)))
        unit = F.normalize(features.to(wide(features.dtype)), dim=-1)
        return (unit * directions.to(unit)).sum(dim=-1)

    found: dict[str, list[Tensor]] = {"streams": [], "heads": []}
    for layer in range(layers + 1):
        ends = stream.unflatten(0, (2, -1))
        for run, other in ENDS:
            nodes = (torch.where(m[..., None], ends[other], ends[run]) for m in masks.split(size))
            found["streams"].append(torch.cat([metric(x.flatten(0, 1), layer) for x in nodes]))
        if layer == layers:
            break
        sites = [f"blocks.{layer}.{name}" for name in SITES]
        stream, cache = tower.run_with_cache(
            stream, names_filter=sites, start_at_layer=layer, stop_at_layer=layer + 1
        )
        pattern, v, mid = (cache[site].unflatten(0, (2, -1)) for site in sites)
        for two in ENDS:
            nodes = _head_nodes(tower, layer, pattern[two], v[two], mid[two], size)
            found["heads"].append(torch.cat([metric(x, layer + 1) for x in nodes]))
    plain = metric(stream, layers)  # [clean or corrupted, pair]
    towards = plain.new_tensor([1, -1])[:, None, None]

    def effects(scores: list[Tensor]) -> Float[Tensor, "pair direction at node"]:
        patched = torch.stack(scores).unflatten(0, (-1, 2)).permute(3, 1, 0, 2)
        moved = towards * (patched - plain.flip(0).T[:, :, None, None])
        return moved.where(moved.abs() > ROUNDING * torch.finfo(moved.dtype).eps, 0)

    heads = effects(found["heads"]).unflatten(-1, (len(PARTS), -1)).transpose(2, 3)
    streams = effects(found["streams"])
    groups, patches = streams[..., : len(GROUPS)], streams[..., len(GROUPS) :]
    return Patched(plain[0], plain[1], groups, heads, patches)


def _tokens(
    objects: Bool[Tensor, "pair patch"], prefix: int, every_patch: bool
) -> Bool[Tensor, "node pair token"]:
    """Which tokens a node of the stream patches: those of `GROUPS`, then single patches."""
    pairs, patches = objects.shape
    single = torch.eye(every_patch * patches, patches, dtype=torch.bool, device=objects.device)
    groups = torch.stack([torch.zeros_like(objects), objects, ~objects])
    masks = F.pad(torch.cat([groups, single[:, None].expand(-1, pairs, -1)]), (prefix, 0))
    masks[0, :, :prefix] = True
    return masks


def _head_nodes(
    tower: HookedVisionTransformer,
    layer: int,
    pattern: Float[Tensor, "2 pair head query token"],
    v: Float[Tensor, "2 pair token head d_head"],
    mid: Float[Tensor, "2 pair token d_model"],
    size: int,
) -> Iterator[Streams]:
    """The stream behind a layer with each part of each head patched; [run, other] come first."""
    v, block = v.transpose(2, 3), tower.block(layer)
    z = pattern[0] @ v[0]
    changes = torch.stack([pattern[1] @ v[1], pattern[1] @ v[0], pattern[0] @ v[1]]) - z
    changes = changes.transpose(1, 2).flatten(0, 1)  # [part x head, pair, token, d_head]
    weights = block.attn.W_O.repeat(len(PARTS), 1, 1).to(changes.dtype)
    for some, weight in zip(changes.split(size), weights.split(size), strict=True):
        x = (mid[0] + layer_scaled(block.attn.source.ls_1, some @ weight[:, None])).flatten(0, 1)
        yield x + block.mlp(block.ln2(x))
