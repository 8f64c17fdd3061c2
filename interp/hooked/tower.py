"""`HookedVisionTransformer`: an open_clip vision tower, opened in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import transformer as open_clip
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from interp.hooked.blocks import HookedBlock, HookedLayerNorm
from interp.hooked.cache import TowerCache
from interp.hooked.rows import AttentionRows, Projection, RowRecorder, Rows, class_rows, patch_rows
from superclip.errors import UserError, nearest

Site = str | Callable[[str], bool]
Hook = tuple[Site, Callable]

# Every parameter that the forward pass below reads. A tower with another one does something else.
READ = re.compile(
    r"class_embedding|positional_embedding|proj|conv1\.weight|ln_(pre|post)\.(weight|bias)"
    r"|transformer\.resblocks\.\d+\.(ln_[12]\.(weight|bias)|ls_[12]\.gamma"
    r"|attn\.(in_proj_(weight|bias)|out_proj\.(weight|bias))|mlp\.c_(fc|proj)\.(weight|bias))"
)
BLOCKS = (open_clip.ResidualAttentionBlock, open_clip.CustomResidualAttentionBlock)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}  # relative to the largest feature
MIN_COSINE = 0.999  # where the arithmetic is coarser: bfloat16, float16, TF32


@dataclass(frozen=True)
class TowerConfig:
    """Facts of a tower under the names that TransformerLens and its cache look for."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    embed_dim: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    activation: str
    pool_type: str
    device: torch.device
    dtype: torch.dtype
    prefix_tokens: int = 1
    normalization_type: Literal["LN"] = "LN"
    attn_only: bool = False
    n_key_value_heads: None = None

    @property
    def n_ctx(self) -> int:
        """Tokens: class token and patches."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]


class HookedVisionTransformer(HookedRootModule):
    """TransformerLens hook points over an open_clip `VisionTransformer`, sharing its parameters.

    The tower is wrapped in place: nothing of it is copied or patched, training it further shows at
    once, and `visual` stays usable beside the wrapper. `run_with_cache`, `run_with_hooks` and
    `hooks` are TransformerLens's, except that a hook or a names filter that matches nothing, or
    never fires before its `with` block ends, is an error. Sites, in the order of the computation:

    `hook_embed`, `hook_pos_embed`, `hook_full_embed`, `hook_ln_pre`; `blocks.L.` with
    `hook_resid_pre`, `ln1.hook_scale`, `ln1.hook_normalized`, `attn.hook_q`, `k`, `v`,
    `attn_scores`, `pattern`, `z`, `result`, `hook_attn_out`, `hook_resid_mid`, `ln2.*`,
    `mlp.hook_pre`, `mlp.hook_post`, `hook_mlp_out`, `hook_resid_post`; `ln_final.*`, `hook_pooled`
    (what is projected) and `hook_proj` (the output).

    Recording changes no bit of the output, except at `attn_scores`, `pattern`, `result`, `scale`
    and `normalized`: a hook there spells the fused operation out, equal to rounding.

    Args:
        visual: The tower, `model.visual` of an open_clip CLIP model.
        check: Compare with the tower's own forward on a random batch of two, fused and spelled out.

    Raises:
        UserError: The tower has a part that is not modelled (named), or the check fails.
    """

    visual: open_clip.VisionTransformer

    def __init__(self, visual: nn.Module, *, check: bool = True) -> None:
        super().__init__()
        visual = modelled(visual)
        self.__dict__["visual"] = visual  # unregistered: see interp.hooked.blocks
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.hook_full_embed = HookPoint()
        self.hook_ln_pre = HookPoint()
        self.blocks = nn.ModuleList(map(HookedBlock, visual.transformer.resblocks))
        self.ln_final = HookedLayerNorm(cast(nn.LayerNorm, visual.ln_post))
        self.hook_pooled = HookPoint()
        self.hook_proj = HookPoint()
        self.setup()
        self.train(visual.training)  # of the wrapper's own modules: the tower is not among them
        if check:
            self._check_equal()

    @property
    def cfg(self) -> TowerConfig:
        """Read off the tower as it is now, device and type included."""
        visual = self.visual
        block = cast(Any, visual.transformer.resblocks[0])
        d_model = visual.conv1.out_channels
        return TowerConfig(
            n_layers=len(self.blocks),
            n_heads=block.attn.num_heads,
            d_model=d_model,
            d_head=d_model // block.attn.num_heads,
            d_mlp=block.mlp.c_fc.out_features,
            embed_dim=d_model if visual.proj is None else visual.proj.shape[1],
            image_size=cast(tuple[int, int], visual.image_size),
            patch_size=cast(tuple[int, int], visual.patch_size),
            grid=visual.grid_size,
            activation=type(block.mlp.gelu).__name__,
            pool_type=visual.pool_type,
            device=visual.conv1.weight.device,
            dtype=visual.conv1.weight.dtype,
        )

    def block(self, layer: int) -> HookedBlock:
        """Block `layer`, typed; `tower.blocks[layer]` is the same object."""
        return cast(HookedBlock, self.blocks[layer])

    def forward(
        self,
        images: Float[Tensor, "batch ..."],
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """The tower's features `[batch, embed]`, projected and not normalised.

        Args:
            images: Normalised pixels `[batch, 3, height, width]`; with `start_at_layer` the
                residual stream `[batch, token, d_model]` that enters that layer.
            start_at_layer: Resume at this layer, 0 to `n_layers`.
            stop_at_layer: Return the stream `[batch, token, d_model]` that would enter this layer.

        Raises:
            UserError: The input has another shape, a layer does not exist, or patch dropout is on.
        """
        n_layers = len(self.blocks)
        first = 0 if start_at_layer is None else start_at_layer
        last = n_layers if stop_at_layer is None else stop_at_layer
        if not 0 <= first <= last <= n_layers:
            raise UserError(f"layers {first} to {last} do not lie in order within 0 to {n_layers}")
        x = self._embed(images) if start_at_layer is None else self._stream(images)
        for layer in range(first, last):
            x = self.block(layer)(x)
        return x if stop_at_layer is not None else self._project(x)

    def _embed(self, images: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch token d_model"]:
        visual = self.visual
        refuse_patch_dropout(visual)
        height, width = self.cfg.image_size
        if tuple(images.shape[1:]) != (3, height, width):
            raise UserError(
                f"images are {list(images.shape)}; this tower takes [batch, 3, {height}, {width}]"
            )
        x = F.conv2d(images, visual.conv1.weight, stride=visual.conv1.stride).flatten(2).mT
        class_token = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = self.hook_embed(torch.cat([class_token, x], dim=1))
        # A copy, because a hook may write into it and the parameter is the user's.
        position = visual.positional_embedding.to(x.dtype).repeat(len(x), 1, 1)
        x = self.hook_full_embed(x + self.hook_pos_embed(position))
        return self.hook_ln_pre(visual.ln_pre(x))

    def _stream(self, x: Tensor) -> Float[Tensor, "batch token d_model"]:
        expected = tuple(self.visual.positional_embedding.shape)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"start_at_layer takes a residual stream [batch, {expected[0]}, {expected[1]}], "
                f"not {list(x.shape)}"
            )
        return x

    def _project(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch embed"]:
        visual = self.visual
        if not visual.final_ln_after_pool:
            x = self.ln_final(x)
        x = x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(dim=1)
        if visual.final_ln_after_pool:
            x = self.ln_final(x)
        x = self.hook_pooled(x)
        return self.hook_proj(x if visual.proj is None else x @ visual.proj)

    def class_attention(self, images: Float[Tensor, "batch ..."]) -> AttentionRows:
        """Features and the class token's attention in every layer and head, in one forward pass.

        The output keeps the fused kernel; the rows come from queries and keys, so hooks on them in
        an enclosing `hooks` block count. Gradients are the caller's choice (`torch.no_grad`).

        Raises:
            UserError: An enclosing block hooks `attn_scores` or `pattern`, which this does not see.
        """
        return self._attention(images, class_rows)

    def patch_attention(self, images: Float[Tensor, "batch ..."]) -> AttentionRows:
        """As `class_attention`, with the mean row over the patch queries for the class row."""
        return self._attention(images, partial(patch_rows, prefix_tokens=self.cfg.prefix_tokens))

    def _attention(
        self, images: Tensor, rows_of: Callable[[Projection, Projection], Rows]
    ) -> AttentionRows:
        if any(self.block(layer).attn.is_explicit for layer in range(len(self.blocks))):
            raise UserError(
                "class_attention and patch_attention read q and k, not a hooked attn_scores or "
                "pattern; cache 'pattern' with run_with_cache instead"
            )
        recorder = RowRecorder(rows_of)
        hooks: list[Hook] = [
            (lambda name: name.endswith("attn.hook_q"), recorder.on_q),
            (lambda name: name.endswith("attn.hook_k"), recorder.on_k),
            (lambda name: name.endswith("hook_resid_post"), recorder.on_resid_post),
        ]
        features = self.run_with_hooks(images, fwd_hooks=hooks)
        return recorder.result(features, self.cfg.prefix_tokens)

    def sites(self, wanted: Site | Sequence[str]) -> list[str]:
        """The hook names that a name, several names or a predicate on names stands for.

        Raises:
            UserError: A name is unknown (the nearest is given), or the predicate matches none.
        """
        if callable(wanted):
            names = [name for name in self.hook_dict if wanted(name)]
            if not names:
                raise UserError("the predicate matches no hook point; tower.hook_dict lists them")
            return names
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if name not in self.hook_dict:
                raise UserError(f"{name!r} is no hook point; {nearest(name, self.hook_dict)}")
        return names

    def add_hook(self, name: Site, *args: Any, **kwargs: Any) -> None:
        """As TransformerLens: a hook that stays until `reset_hooks`; `name` must match a site."""
        self.sites(name)
        super().add_hook(name, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedVisionTransformer]:
        """As TransformerLens: the hooks hold within the `with` block and leave nothing behind.

        Raises:
            UserError: A site does not exist, or a hook did not fire before the block ended (left
                by an error, the block raises that error alone).
        """
        waiting: dict[int, str] = {}
        forward = self._watch(fwd_hooks, waiting)
        # Hooks that outlive the block may fire later, as backward hooks do.
        backward = self._watch(bwd_hooks, waiting if reset_hooks_end else {})
        with super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self
        if waiting:
            raise UserError(
                f"the hook on {', '.join(waiting.values())} never fired: no forward pass within "
                "the block reached it"
            )

    def _watch(self, hooks: Sequence[Hook], waiting: dict[int, str]) -> list[Hook]:
        watched: list[Hook] = []
        for site, hook in hooks:
            key = len(waiting)
            waiting[key] = self.sites(site)[0]
            watched.append((site, partial(fire, hook_function=hook, waiting=waiting, key=key)))
        return watched

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Site | Sequence[str] | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """The features and a `TowerCache` of the sites that `names_filter` names or matches.

        As TransformerLens; the default, None, records every site that the pass reaches save
        `hook_result`, which `stack_head_results` derives from `hook_z`.

        Raises:
            UserError: A name is unknown, the filter matches no site, or a named one is not reached.
        """
        if names_filter is None:
            names_filter = omits_result
        names = self.sites(names_filter)
        if callable(names_filter):
            span = kwargs.get("start_at_layer"), kwargs.get("stop_at_layer")
            names = [name for name in names if reached(name, *span)]
        features, cache = super().run_with_cache(
            *args, names_filter=names, remove_batch_dim=remove_batch_dim, **kwargs
        )
        return features, TowerCache(cache, self, has_batch_dim=not remove_batch_dim)

    def _apply(self, *args: Any, **kwargs: Any) -> HookedVisionTransformer:
        raise UserError("the hooked tower owns no parameters: move or cast tower.visual instead")

    @torch.no_grad()
    def _check_equal(self) -> None:
        cfg = self.cfg
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, *cfg.image_size, generator=generator).to(cfg.device, cfg.dtype)
        expected = self.visual(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        explicit, _ = self.run_with_cache(images, names_filter=list(self.hook_dict))
        for path, features in (("fused", self(images)), ("spelled-out", explicit)):
            if not agree(features, expected):
                error = (features - expected).abs().max() / expected.abs().max()
                raise UserError(
                    f"the {path} forward misses {type(self.visual).__name__}'s own by {error:.1e} "
                    "of its largest feature: this tower computes something that is not modelled"
                )


def fire(
    value: Tensor,
    *,
    hook: HookPoint,
    hook_function: Callable,
    waiting: dict[int, str],
    key: int,
) -> Tensor | None:
    """Call a user's hook function and note that it fired."""
    waiting.pop(key, None)
    return hook_function(value, hook=hook)


def omits_result(name: str) -> bool:
    return not name.endswith("hook_result")


def reached(name: str, start_at_layer: int | None, stop_at_layer: int | None) -> bool:
    """Whether a forward pass between these layers comes by the site."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        stop = float("inf") if stop_at_layer is None else stop_at_layer
        return (start_at_layer or 0) <= int(match[1]) < stop
    if name.startswith(("ln_final", "hook_pooled", "hook_proj")):
        return stop_at_layer is None
    return start_at_layer is None


def agree(features: Float[Tensor, "b e"], expected: Float[Tensor, "b e"]) -> bool:
    """Whether two computations of the same features differ by no more than rounding."""
    coarse = expected.dtype not in TOLERANCE or (
        expected.is_cuda and torch.get_float32_matmul_precision() != "highest"
    )
    if coarse:
        cosine = F.cosine_similarity(features.float(), expected.float(), dim=-1)
        return bool((cosine > MIN_COSINE).all())
    limit = TOLERANCE[expected.dtype] * expected.abs().max()
    return bool((features - expected).abs().max() <= limit)


def refuse_patch_dropout(visual: open_clip.VisionTransformer) -> None:
    dropout = visual.patch_dropout
    if isinstance(dropout, open_clip.PatchDropout) and dropout.training and dropout.prob > 0:
        raise UserError("patch dropout is active in training mode; call visual.eval() first")


def modelled(visual: nn.Module) -> open_clip.VisionTransformer:
    """The tower itself; raises for a part that `HookedVisionTransformer` does not compute."""
    if not isinstance(visual, open_clip.VisionTransformer):
        raise UserError(
            f"{type(visual).__name__} is not modelled; only open_clip's own VisionTransformer is "
            "(no timm, ResNet or Hugging Face towers)"
        )
    if unread := [name for name, _ in visual.named_parameters() if not READ.fullmatch(name)]:
        raise UserError(f"the tower's parameter {unread[0]!r} is not modelled ({len(unread)} such)")
    if visual.pool_type not in ("tok", "avg"):
        raise UserError(f"pool_type {visual.pool_type!r} is not modelled; 'tok' and 'avg' are")
    for index, block in enumerate(cast(Any, visual.transformer.resblocks)):
        if type(block) not in BLOCKS:
            raise UserError(f"block {index} is a {type(block).__name__}, which is not modelled")
        if block.attn.in_proj_bias is None:
            raise UserError(f"block {index} has no attn.in_proj_bias, which is not modelled")
    for name, module in visual.named_modules():
        if re.search(r"(^|\.)ln_", name) and not isinstance(module, nn.LayerNorm | nn.Identity):
            raise UserError(f"{name} is a {type(module).__name__}; only LayerNorm is modelled")
    refuse_patch_dropout(visual)
    return visual
