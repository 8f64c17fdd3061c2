"""The exact sweep: every head, MLP, layer or group removed in turn, at under half the naive cost.

A plain loop runs the whole tower once for each unit that it removes. Here one intact pass records
`z` and `resid_mid` of the layers concerned; without the heads H of layer l, with z~ in their place,

    resid_mid' = resid_mid - ls_1 * sum over h in H of (z_h - z~_h) W_O^h

so everything up to there, the attention of layer l included, is that of the intact pass. The units
of a layer then run on together, stacked as a batch, through the user's own modules. Two more
savings are exact: the last block computes queries, output and MLP of the pooled tokens only, and
where the class token's output alone is replaced, layer l computes the class token alone, and layer
l + 1 takes queries, keys and values of the patches from the intact pass. The result equals a full
forward under `interp.causal.ablation.ablate` to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.causal.units import (
    Ablation,
    Images,
    Unit,
    ablated_tokens,
    check_ablation,
    check_units,
    overlap,
    read_tokens,
    within,
)
from interp.hooked import HookedVisionTransformer
from interp.hooked.blocks import layer_scaled, wide
from interp.hooked.rows import class_rows
from superclip.errors import UserError

MAX_MEMORY = 2**30
"""Bytes of activations beside the weights."""

Stream = Float[Tensor, "unit image token d_model"]
Kept = Float[Tensor, "unit image kept d_model"]
"""The stream at the tokens that matter from there on."""


class AblatedBatch(NamedTuple):
    """Features as the tower gives them, not normalised, on the CPU.

    Attributes:
        intact: without any ablation.
        features: of every unit; `draw` is 1 but for resampling. With `patches`, behind the `embed`
            of both stands the mean of the final patch tokens (normalised), which SuperCLIP's token
            head reads.
        removed: norm of what the removal takes from the stream of the class token, in all layers
            together; mean over draws. Where patches are pooled and all tokens are ablated, the root
            mean square over patches.
    """

    intact: Float[Tensor, "image value"]
    features: Float[Tensor, "draw unit image value"]
    removed: Float[Tensor, "unit image"]


class Rows(NamedTuple):
    """What the class token looks at while units are removed.

    Attributes:
        rows: its attention to every token, summing to 1.
        layer: of that attention; later than the units' first one, where nothing changes.
        units: numbers of the units.
        images: of the batch.
    """

    rows: Float[Tensor, "unit image head token"]
    layer: int
    draw: int
    units: list[int]
    images: slice


Watch = Callable[[Rows], None]
Show = Callable[[Float[Tensor, "unit image head token"], int], None]
"""A watcher that knows all but the rows and their layer."""


def ablated_embeddings(
    tower: HookedVisionTransformer,
    batches: Iterable[Images],
    ablation: Ablation,
    units: Sequence[Unit],
    donors: Sequence[Iterable[Images]] = (),
    max_memory: int = MAX_MEMORY,
    watch: Watch | None = None,
    patches: bool = False,
) -> AblatedBatch:
    """`ablate_batch` for one batch after another, joined; 4 bytes x draws x units x images x embed
    on the CPU (`AblationBank` keeps as much on disk, in half of that).

    Args:
        donors: For `resample`, for each draw batches like `batches` of the images to take from.

    Raises:
        UserError: As `ablate_batch`, or there are no images.
    """
    found = [
        ablate_batch(tower, images, ablation, units, others, max_memory, watch, patches)
        for images, *others in zip(batches, *donors, strict=True)
    ]
    if not found:
        raise UserError("there are no images to embed")
    return _joined(found)


@torch.no_grad()
def ablate_batch(
    tower: HookedVisionTransformer,
    images: Images,
    ablation: Ablation,
    units: Sequence[Unit],
    donors: Sequence[Images] = (),
    max_memory: int = MAX_MEMORY,
    watch: Watch | None = None,
    patches: bool = False,
) -> AblatedBatch:
    """Features of a batch of normalised images without each of the units.

    A donor's outputs are computed again for every draw, by one intact pass, which costs little
    beside the sweep; so any images can be donors, in whatever batches they come.

    Args:
        donors: For `resample` and each draw, for each image the one to take from.
        max_memory: Bytes of activations beside weights and result; images and units go in as large
            pieces as it allows.
        watch: Is shown the class token's attention in the layers after each unit's first.
        patches: Compute the mean of the final patch tokens as well, for which the last block can
            leave out none of them.

    Raises:
        UserError: A head, MLP or option does not exist, means or donors are missing, unused or of
            another shape, hooks are on the tower, or the memory is too small for one image.
    """
    plan = _Plan(tower, ablation, units, patches)
    plan.check(images, donors)
    size = plan.images_at_once(max_memory)
    parts = []
    for start in range(0, len(images), size):
        chunk = slice(start, start + size)
        parts.append(_ablate(plan, images, donors, chunk, max_memory, watch))
    return _joined(parts)


def _joined(parts: Sequence[AblatedBatch]) -> AblatedBatch:
    intact, features, removed = zip(*parts, strict=True)
    return AblatedBatch(torch.cat(intact), torch.cat(features, 2), torch.cat(removed, 1))


class _Plan:
    """What a sweep needs of every image, and how much memory that takes."""

    def __init__(
        self,
        tower: HookedVisionTransformer,
        ablation: Ablation,
        units: Sequence[Unit],
        patches: bool,
    ) -> None:
        self.tower, self.ablation, self.units, self.cfg = tower, ablation, units, tower.cfg
        self.at, self.pooled = ablated_tokens(self.cfg, ablation.tokens), read_tokens(self.cfg)
        self.everywhere, self.patches = range(self.cfg.n_ctx), patches
        self.read = self.everywhere if patches else self.pooled

    @property
    def starts(self) -> dict[int, list[int]]:
        """Numbers of the units by their first layer."""
        firsts = [unit.layers[0] for unit in self.units]
        return {
            layer: [n for n, first in enumerate(firsts) if first == layer]
            for layer in sorted(set(firsts))
        }

    @property
    def outputs(self) -> list[str]:
        """Sites whose value a unit replaces."""
        heads = {head.layer for unit in self.units for head in unit.heads}
        mlps = {layer for unit in self.units for layer in unit.mlps}
        return [_z(layer) for layer in sorted(heads)] + [_mlp(layer) for layer in sorted(mlps)]

    @property
    def sites(self) -> list[str]:
        """What the intact pass records."""
        names = [f"blocks.{layer}.hook_resid_mid" for layer in self.starts]
        if self.patches:
            names.append(f"blocks.{self.cfg.n_layers - 1}.hook_resid_post")
        if len(self.at) < self.cfg.n_ctx:
            names += [f"blocks.{layer}.hook_resid_post" for layer in self.starts]
        return names + self.outputs

    @property
    def image_bytes(self) -> int:
        """What is held for one image: the recorded sites, donors', and the patches' projections."""
        donors = len(self.outputs) * (self.ablation.kind == "resample")
        return (len(self.sites) + donors + 4) * self._site_bytes

    @property
    def row_bytes(self) -> int:
        """Peak of one image in one block: QuickGELU holds three hidden layers at once."""
        return 4 * self._site_bytes + 3 * self._site_bytes * self.cfg.d_mlp // self.cfg.d_model

    @property
    def _site_bytes(self) -> int:
        return self.cfg.n_ctx * self.cfg.d_model * self.cfg.dtype.itemsize

    def images_at_once(self, max_memory: int) -> int:
        """As many as leave room for one unit."""
        size = max_memory // (self.image_bytes + self.row_bytes)
        if size < 1:
            raise UserError(
                f"a memory of {max_memory / 2**20:.4g} MiB is too small: one image takes "
                f"{(self.image_bytes + self.row_bytes) / 2**20:.4g} MiB"
            )
        return size

    def units_at_once(self, images: int, max_memory: int) -> int:
        return (max_memory // images - self.image_bytes) // self.row_bytes

    def check(self, images: Images, donors: Sequence[Images]) -> None:
        check_units(self.cfg, self.units)
        check_ablation(self.cfg, self.ablation, self.units)
        kind = self.ablation.kind
        if (kind == "resample") != bool(donors):
            takes = "needs" if kind == "resample" else "takes no"
            raise UserError(f"{kind} ablation {takes} donors")
        for others in donors:
            if others.shape != images.shape:
                raise UserError(
                    f"donors are {list(others.shape)} for images {list(images.shape)}; every image "
                    "needs one"
                )
        if any(point.fwd_hooks or point.bwd_hooks for point in self.tower.hook_dict.values()):
            raise UserError("hooks are on the tower; leave their block, or reset_hooks(), first")


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _mlp(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


def _ablate(
    plan: _Plan,
    images: Images,
    donors: Sequence[Images],
    chunk: slice,
    max_memory: int,
    watch: Watch | None,
) -> AblatedBatch:
    """The images of a chunk that fits the memory."""
    intact, cache = plan.tower.run_with_cache(images[chunk], names_filter=plan.sites)
    if plan.patches:
        stream = cache[f"blocks.{plan.cfg.n_layers - 1}.hook_resid_post"]
        intact = torch.cat([intact, _patch_means(plan, stream)], -1)
    draws, size = max(1, len(donors)), plan.units_at_once(len(intact), max_memory)
    # On the CPU: a GPU may not hold it beside the activations.
    features = torch.empty(draws, len(plan.units), *intact.shape, dtype=intact.dtype)
    removed = torch.zeros(len(plan.units), len(intact), dtype=wide(intact.dtype))
    for draw in range(draws):
        tell = None if watch is None else partial(_tell, watch, draw, chunk)
        others = donors[draw][chunk] if donors else None
        removed += _fill(plan, cache, intact, others, size, tell, features[draw]) / draws
    return AblatedBatch(intact.cpu(), features, removed)


def _fill(
    plan: _Plan,
    cache: Any,
    intact: Float[Tensor, "image embed"],
    donors: Images | None,
    size: int,
    tell: Callable[..., None] | None,
    out: Float[Tensor, "unit image embed"],
) -> Float[Tensor, "unit image"]:
    """One draw of every unit into `out`, `size` units at a time; what was removed. A function of
    its own, so that a draw's activations are gone before the next."""
    sweep = _Sweep(plan, cache, intact, _stand_ins(plan, donors))
    for layer, numbers in plan.starts.items():
        patches = sweep.patches(layer)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            units = [plan.units[number] for number in part]
            show = tell and partial(tell, part)
            out[part] = sweep.features(layer, units, patches, show).cpu()
    return torch.stack([sweep.removed(unit).cpu() for unit in plan.units])


def _stand_ins(plan: _Plan, donors: Images | None) -> Mapping[str, Tensor]:
    """What replaces each output: `[image or 1, token, ...]` by site."""
    if donors is not None:
        return plan.tower.run_with_cache(donors, names_filter=plan.outputs)[1].cache_dict
    cfg, ablation = plan.cfg, plan.ablation
    like = {"dtype": cfg.dtype, "device": cfg.device}
    if ablation.kind == "zero":
        shape = cfg.n_ctx, cfg.n_heads, cfg.d_head
        nothing = torch.zeros((), **like)
        z, mlp = nothing.expand(1, *shape), nothing.expand(1, cfg.n_ctx, cfg.d_model)
        return {site: z if site.endswith("hook_z") else mlp for site in plan.outputs}
    means: dict[str, Tensor] = {}
    for name, of in ((_z, ablation.mean_z), (_mlp, ablation.mean_mlp)):
        if of is not None:
            means |= {name(layer): value[None].to(**like) for layer, value in enumerate(of)}
    return means


def _tell(
    watch: Watch,
    draw: int,
    images: slice,
    units: list[int],
    rows: Float[Tensor, "unit image head token"],
    layer: int,
) -> None:
    watch(Rows(rows, layer, draw, units, images))


class _QKV(NamedTuple):
    q: Float[Tensor, "*rows query head d_head"]
    k: Float[Tensor, "*rows token head d_head"]
    v: Float[Tensor, "*rows token head d_head"]


class _Patches(NamedTuple):
    """What the class token's ablation leaves of a layer's output, the patches; and the next layer's
    queries, keys and values of them. No axis of units."""

    stream: Float[Tensor, "image patch d_model"]
    qkv: _QKV


class _Sweep:
    """Runs units over one chunk of images, for one draw; `cache` is of the intact pass."""

    def __init__(
        self,
        plan: _Plan,
        cache: Any,
        intact: Float[Tensor, "image embed"],
        stand_ins: Mapping[str, Tensor],
    ) -> None:
        self.plan, self.cache, self.intact, self.stand_ins = plan, cache, intact, stand_ins
        self.at, self.read, self.everywhere = plan.at, plan.read, plan.everywhere
        self.last = plan.cfg.n_layers - 1

    def features(
        self, first: int, units: Sequence[Unit], patches: _Patches | None, show: Show | None
    ) -> Float[Tensor, "unit image embed"]:
        """Features without each of the units, whose first layer is `first`."""
        tokens = overlap(self.at, self.read) if first == self.last else self.at
        if not tokens:  # what is replaced is never read
            return self.intact.expand(len(units), *self.intact.shape)
        x = self.cache[f"blocks.{first}.hook_resid_mid"][:, within(tokens, self.everywhere)]
        x = x.repeat(len(units), 1, 1, 1)
        for i, unit in enumerate(units):
            if unit.heads_of(first):
                x[i] -= self._attention_loss(unit, first, tokens)
        x = self._add_mlp(x, units, first, tokens)
        for layer in range(first + 1, self.last + 1):
            x = self._block(x, units, layer, patches if layer == first + 1 else None, show)
        if first == self.last and self.plan.patches and len(tokens) < len(self.everywhere):
            final = self.cache[f"blocks.{first}.hook_resid_post"]
            x = _beside(x, final[:, tokens.stop :])  # the last layer's patches see no class token
        return self._project(x)

    def removed(self, unit: Unit) -> Float[Tensor, " image"]:
        tokens = overlap(self.at, self.plan.pooled) or self.at
        lost = torch.zeros((), dtype=wide(self.intact.dtype), device=self.intact.device)
        for layer in unit.layers:
            if unit.heads_of(layer):
                lost = lost + self._attention_loss(unit, layer, tokens)
            if layer in unit.mlps:
                site, at = _mlp(layer), within(tokens, self.everywhere)
                lost = lost + self.cache[site][:, at] - self.stand_ins[site][:, at]
        return lost.square().sum(-1).mean(-1).sqrt()

    def _attention_loss(
        self, unit: Unit, layer: int, tokens: range
    ) -> Float[Tensor, "image token d_model"]:
        """What the unit's heads of a layer add to the stream beyond what stands in for them."""
        at, heads, attn = within(tokens, self.everywhere), unit.heads_of(layer), self._attn(layer)
        z, other = (of[_z(layer)][:, at, heads] for of in (self.cache, self.stand_ins))
        weight = attn.W_O[heads].flatten(0, 1).to(z.dtype)  # [heads * d_head, d_model]
        return layer_scaled(attn.source.ls_1, (z - other).flatten(-2) @ weight)

    def _attn(self, layer: int) -> Any:
        return self.plan.tower.block(layer).attn

    def patches(self, first: int) -> _Patches | None:
        """The intact patches between layer `first` and the next; None where they change."""
        if len(self.at) == len(self.everywhere) or first == self.last:
            return None
        stream = self.cache[f"blocks.{first}.hook_resid_post"][:, self.at.stop :]
        return _Patches(stream, self._qkv(stream, first + 1, self.everywhere[self.at.stop :]))

    def _qkv(self, x: Float[Tensor, "*rows token d_model"], layer: int, queries: range) -> _QKV:
        """Queries of some of the tower's tokens; keys and values of the tokens that `x` holds."""
        source = self._attn(layer).source
        attn, x = source.attn, source.ln_1(x)
        heads, width = attn.num_heads, x.shape[-1]
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        if len(queries) == x.shape[-2]:
            q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)
            return _QKV(q, k, v)
        asked = x[..., within(queries, self.everywhere), :]
        q = F.linear(asked, weight[:width], bias[:width]).unflatten(-1, (heads, -1))
        k, v = F.linear(x, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1)).unbind(-3)
        return _QKV(q, k, v)

    def _block(
        self,
        x: Stream,
        units: Sequence[Unit],
        layer: int,
        patches: _Patches | None,
        show: Show | None,
    ) -> Kept:
        """A whole block; `x` lacks the patches that are given apart. Of the last, `read` only."""
        tokens = self.read if layer == self.last else self.everywhere
        if patches is None:
            qkv = self._qkv(x, layer, tokens)
        else:
            own = self._qkv(x, layer, self.at)
            q, k, v = (_beside(mine, all_) for mine, all_ in zip(own, patches.qkv, strict=True))
            qkv = _QKV(q[:, :, within(tokens, self.everywhere)], k, v)
            x = _beside(x, patches.stream)
            del own, q, k, v
        if show is not None:
            self._show(x, qkv.k, layer, show)
        out = self._attend(qkv, units, layer, tokens)
        del qkv  # before the MLP takes its memory
        x = out.add_(x[:, :, within(tokens, self.everywhere)])
        return self._add_mlp(x, units, layer, tokens)

    def _attend(self, qkv: _QKV, units: Sequence[Unit], layer: int, tokens: range) -> Kept:
        """What attention adds to the stream at `tokens`, the heads of the layer replaced."""
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in qkv)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        z = z.unflatten(0, qkv.q.shape[:2])
        both = overlap(self.at, tokens)
        for i, unit in enumerate(units):
            if heads := unit.heads_of(layer):
                stand_in = self.stand_ins[_z(layer)][:, within(both, self.everywhere), heads]
                z[i][:, within(both, tokens), heads] = stand_in
        source = self._attn(layer).source
        return layer_scaled(source.ls_1, source.attn.out_proj(z.flatten(-2)))

    def _add_mlp(self, x: Kept, units: Sequence[Unit], layer: int, tokens: range) -> Kept:
        """`x`, which is of `tokens` and is written to, plus the MLP's output or its stand-in."""
        source = self._attn(layer).source
        out = layer_scaled(source.ls_2, source.mlp(source.ln_2(x)))
        both = overlap(self.at, tokens)
        for i, unit in enumerate(units):
            if layer in unit.mlps:
                stand_in = self.stand_ins[_mlp(layer)][:, within(both, self.everywhere)]
                out[i][:, within(both, tokens)] = stand_in
        return x.add_(out)

    def _show(
        self, x: Stream, k: Float[Tensor, "unit image token head d_head"], layer: int, show: Show
    ) -> None:
        q = self._qkv(x[:, :, :1], layer, range(1)).q
        # class_rows reads the first query; as many queries as keys, because its shapes say so.
        rows = class_rows(q.expand_as(k).flatten(0, 1), k.flatten(0, 1))
        show(rows.unflatten(0, x.shape[:2]), layer)

    def _project(self, x: Kept) -> Float[Tensor, "unit image value"]:
        """As the tower, from the tokens that it pools: of one token the mean is itself."""
        visual, plan = self.plan.tower.visual, self.plan
        pooled = x[:, :, within(plan.pooled, plan.read)]
        if not visual.final_ln_after_pool:
            pooled = visual.ln_post(pooled)
        pooled = pooled.mean(dim=-2)
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(pooled)
        features = pooled if visual.proj is None else pooled @ visual.proj
        return torch.cat([features, _patch_means(plan, x)], -1) if plan.patches else features


def _patch_means(
    plan: _Plan, x: Float[Tensor, "*images token d_model"]
) -> Float[Tensor, "*images d_model"]:
    """Mean of the normalised patch tokens of a whole final stream."""
    return plan.tower.visual.ln_post(x[..., plan.cfg.prefix_tokens :, :]).mean(dim=-2)


def _beside(
    own: Float[Tensor, "unit image prefix *rest"], shared: Float[Tensor, "image patch *rest"]
) -> Float[Tensor, "unit image token *rest"]:
    """Every unit's class token before the patches that all share."""
    return torch.cat([own, shared.expand(len(own), *shared.shape)], dim=2)
