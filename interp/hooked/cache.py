"""TransformerLens's `ActivationCache` where it is right for a CLIP tower, else a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from interp.hooked.blocks import wide
from superclip.errors import UserError

if TYPE_CHECKING:
    from interp.hooked.tower import HookedVisionTransformer

Stack = Float[Tensor, "component *rows d_model"]

# Rounding of a sum of residual parts, relative to the largest value of the stream.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}


class TowerCache(ActivationCache):
    """Activations of one forward pass; `cache["pattern", 5]` and negative layers work.

    `accumulated_resid`, `stack_head_results` and `apply_ln_to_stack` are TransformerLens's.
    `decompose_resid` differs: CLIP normalises the embeddings (`ln_pre`) before the first block, so
    the embeddings as such are no summands of the residual stream.
    """

    tower: HookedVisionTransformer

    def __init__(
        self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim)
        self.tower = model

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, list[str]]:
        """Summands of the residual stream that enters `layer` (None or -1: that leaves the tower).

        With `mode="all"` and embeddings they sum to the stream; this is checked where the cache
        holds the stream. A tower with `ln_pre` gives its affine split at the scale s of this
        image, `embed = w (e - mean e) / s`, `pos_embed = w (p - mean p) / s` and `ln_pre_bias`;
        then the outputs of attention and MLP, layer by layer.

        Raises:
            UserError: A site is not in the cache, or the parts do not sum to the stream because
                something other than `hook_embed`, `hook_pos_embed`, `hook_attn_out` and
                `hook_mlp_out` was intervened on.
        """
        n_layers = self.tower.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        positions = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        parts = self._embedding_parts() if incl_embeds else {}
        for index in range(layer + mlp_input):
            if mode != "mlp":
                parts[f"{index}_attn_out"] = self._cached(f"blocks.{index}.hook_attn_out")
            if mode != "attn" and index < layer:
                parts[f"{index}_mlp_out"] = self._cached(f"blocks.{index}.hook_mlp_out")
        if not parts:
            raise UserError(f"no {mode} outputs come before layer {layer}; use incl_embeds=True")
        if mode == "all" and incl_embeds:
            self._check_sum(parts, layer, mlp_input)
        stack = torch.stack([positions.apply(part, dim=-2) for part in parts.values()])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, positions, has_batch_dim=self.has_batch_dim
            )
        return (stack, list(parts)) if return_labels else stack

    def _embedding_parts(self) -> dict[str, Tensor]:
        embed, position = self._cached("hook_embed"), self._cached("hook_pos_embed")
        norm = self.tower.visual.ln_pre
        if not isinstance(norm, torch.nn.LayerNorm):
            return {"embed": embed, "pos_embed": position}
        dtype = wide(embed.dtype)
        variance = (embed + position).to(dtype).var(dim=-1, unbiased=False, keepdim=True)
        gain = norm.weight / (variance + norm.eps).sqrt()
        split = {
            name: ((part.to(dtype) - part.to(dtype).mean(-1, keepdim=True)) * gain).to(embed.dtype)
            for name, part in (("embed", embed), ("pos_embed", position))
        }
        return split | {"ln_pre_bias": norm.bias.detach().to(embed).expand_as(embed)}

    def _check_sum(self, parts: dict[str, Tensor], layer: int, mlp_input: bool) -> None:
        last = layer == self.tower.cfg.n_layers
        site = "resid_mid" if mlp_input else "resid_post" if last else "resid_pre"
        stream = self.cache_dict.get(f"blocks.{layer - last}.hook_{site}")
        if stream is None:
            return
        error = (sum(parts.values()) - stream).abs().max() / stream.abs().max()
        if not error <= ROUNDING.get(stream.dtype, 0.1):
            raise UserError(
                f"the parts miss the residual stream at layer {layer} by {error:.1e} of its size: "
                "the stream itself was intervened on, or parameters changed since the run"
            )

    def _cached(self, name: str) -> Tensor:
        if name not in self.cache_dict:
            raise UserError(f"{name!r} is not in this cache; add it to names_filter")
        return self.cache_dict[name]

    def compute_head_results(self) -> None:
        """Add `hook_result` of every layer that lacks it, from `hook_z`, LayerScale included."""
        for layer in range(self.tower.cfg.n_layers):
            name = f"blocks.{layer}.attn.hook_result"
            if name not in self.cache_dict:
                z = self._cached(f"blocks.{layer}.attn.hook_z")
                self.cache_dict[name] = self.tower.block(layer).attn.head_results(z).detach()

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens: each head's part of the residual stream, labelled `L0H0`."""
        self.compute_head_results()
        return super().stack_head_results(*args, **kwargs)

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """As TransformerLens: centre and divide by the cached scale, without weight and bias.

        Raises:
            UserError: The tower pools before its final LayerNorm, whose scale then belongs to the
                pooled vector and to no token.
        """
        final = layer in (None, -1, self.tower.cfg.n_layers)
        if final and self.tower.visual.final_ln_after_pool and not recompute_ln:
            raise UserError(
                "this tower pools before its final LayerNorm: pool the parts, centre them and "
                "divide by cache['ln_final.hook_scale']"
            )
        return super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> TowerCache:
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        return TowerCache(sliced.cache_dict, self.tower, sliced.has_batch_dim)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "logits, neurons and full decompositions of TransformerLens's cache assume a language "
            "model without ln_pre and LayerScale; use decompose_resid and stack_head_results"
        )

    logit_attrs = logit_lens = _refuse
    get_neuron_results = stack_neuron_results = get_full_resid_decomposition = _refuse
