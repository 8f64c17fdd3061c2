"""One transformer block of a vision tower, spelled out around TransformerLens hook points.

Every part keeps the open_clip module it mirrors in `__dict__`, where `nn.Module` does not register
it: the parameters stay the user's, are read by name at every call, and appear in no second
`state_dict`. In the shapes, `d_head` is `d_model / head`, and `token` counts the class token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint


def is_hooked(*points: HookPoint) -> bool:
    return any(point.fwd_hooks or point.bwd_hooks for point in points)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of half-precision values are taken: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class Mirror(nn.Module):
    """A module that computes with the parameters of `source` without owning them."""

    source: Any  # nn.MultiheadAttention and open_clip's Attention share names, not a base class

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.__dict__["source"] = source


class HookedLayerNorm(Mirror):
    """LayerNorm: the source's own unless a hook sits on its scale or on the normalised value."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__(source)
        self.hook_scale = HookPoint()  # [..., 1], sqrt(variance + eps)
        self.hook_normalized = HookPoint()  # [..., d_model], before weight and bias

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        norm = self.source
        if not is_hooked(self.hook_scale, self.hook_normalized):
            return norm(x)
        values = x.to(wide(x.dtype))
        centred = values - values.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        scale = self.hook_scale((variance + norm.eps).sqrt())
        normalized = self.hook_normalized(centred / scale)
        return (normalized * norm.weight + norm.bias).to(x.dtype)


class HookedAttention(Mirror):
    """Self-attention and its LayerScale: fused, or spelled out where a hook asks for the inside.

    A hook on `hook_attn_scores` or `hook_pattern` replaces the fused kernel by an explicit softmax;
    one on `hook_result` replaces the output projection by a sum over heads. Both agree with the
    fused path to rounding. `hook_result` holds what each head adds to the residual stream,
    LayerScale included, so heads and bias sum to `hook_attn_out`.

    The weights are views in TransformerLens's layout, without LayerScale: `W_Q`, `W_K`, `W_V`
    `[head, d_model, d_head]`, `W_O` `[head, d_head, d_model]`, `b_Q`, `b_K`, `b_V`
    `[head, d_head]`, `b_O` `[d_model]`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.hook_q = HookPoint()  # [batch, token, head, d_head], as hook_k, hook_v and hook_z
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key], as hook_pattern
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()  # [batch, token, head, d_model]

    def forward(
        self, x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token d_model"]:
        attn = self.source.attn
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(dim=-3)
        z = self.hook_z(self._attend(self.hook_q(q), self.hook_k(k), self.hook_v(v)))
        if is_hooked(self.hook_result):
            result = self.hook_result(self.head_results(z))
            return result.sum(dim=-2) + layer_scaled(self.source.ls_1, self.b_O)
        return layer_scaled(self.source.ls_1, attn.out_proj(z.flatten(-2)))

    @property
    def is_explicit(self) -> bool:
        return is_hooked(self.hook_attn_scores, self.hook_pattern)

    def _attend(
        self,
        q: Float[Tensor, "batch token head d_head"],
        k: Float[Tensor, "batch token head d_head"],
        v: Float[Tensor, "batch token head d_head"],
    ) -> Float[Tensor, "batch token head d_head"]:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if not self.is_explicit:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        scores = self.hook_attn_scores((q * q.shape[-1] ** -0.5) @ k.mT)
        return (self.hook_pattern(scores.softmax(dim=-1)) @ v).transpose(1, 2)

    def head_results(
        self, z: Float[Tensor, "*rows head d_head"]
    ) -> Float[Tensor, "*rows head d_model"]:
        """What each head adds to the residual stream: `ls_1 * (z W_O)`, without `b_O`."""
        result = torch.einsum("...hd,hdm->...hm", z, self.W_O.to(z.dtype))
        return layer_scaled(self.source.ls_1, result)

    def _input_weight(self, part: int) -> Float[Tensor, "head d_model d_head"]:
        attn = self.source.attn
        return attn.in_proj_weight.unflatten(0, (3, attn.num_heads, -1))[part].mT

    def _input_bias(self, part: int) -> Float[Tensor, "head d_head"]:
        attn = self.source.attn
        return attn.in_proj_bias.unflatten(0, (3, attn.num_heads, -1))[part]

    W_Q = property(lambda self: self._input_weight(0))
    W_K = property(lambda self: self._input_weight(1))
    W_V = property(lambda self: self._input_weight(2))
    b_Q = property(lambda self: self._input_bias(0))
    b_K = property(lambda self: self._input_bias(1))
    b_V = property(lambda self: self._input_bias(2))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        attn = self.source.attn
        return attn.out_proj.weight.unflatten(1, (attn.num_heads, -1)).permute(1, 2, 0)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self.source.attn.out_proj.bias


class HookedMLP(Mirror):
    """The two linear layers, the activation between them and the LayerScale after them."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.hook_pre = HookPoint()  # [batch, token, d_mlp], as hook_post
        self.hook_post = HookPoint()

    def forward(
        self, x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token d_model"]:
        mlp = self.source.mlp
        post = self.hook_post(mlp.gelu(self.hook_pre(mlp.c_fc(x))))
        return layer_scaled(self.source.ls_2, mlp.c_proj(post))


class HookedBlock(nn.Module):
    """One pre-norm residual block; the stream is `[batch, token, d_model]` throughout."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()
        self.ln1 = HookedLayerNorm(source.ln_1)
        self.attn = HookedAttention(source)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln2 = HookedLayerNorm(source.ln_2)
        self.mlp = HookedMLP(source)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, x: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token d_model"]:
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x))))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))


def layer_scaled(
    scale: nn.Module, x: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """`x` times the gain of an open_clip `LayerScale`; `x` itself where the tower has none."""
    gamma = getattr(scale, "gamma", None)
    return x if gamma is None else x * gamma
