"""Attention read off queries and keys while the output keeps its fused kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.hooked.blocks import wide

SCORE_BUDGET = 2**22  # attention scores held at once by `patch_rows`: 16 MiB in float32

Rows = Float[Tensor, "batch head token"]
Projection = Float[Tensor, "batch token head d_head"]


@dataclass(frozen=True)
class AttentionRows:
    """One row of attention a layer and head, with the features of the same forward pass.

    Attributes:
        features: The tower's output, not normalised.
        rows: Attention to every token, the class token's own column included; rows sum to 1.
        sink: Share of the row's attention to patches that falls on sink patches (`sink_patches`).
    """

    features: Float[Tensor, "batch embed"]
    rows: Float[Tensor, "batch layer head token"]
    sink: Float[Tensor, "batch layer head"]


@dataclass
class RowRecorder:
    """Hook functions for one forward pass that keep rows and token norms, in layer order."""

    rows_of: Callable[[Projection, Projection], Rows]
    rows: list[Rows] = field(default_factory=list)
    norms: list[Float[Tensor, "batch token"]] = field(default_factory=list)

    def on_q(self, q: Projection, hook: object) -> None:
        self._q = q

    def on_k(self, k: Projection, hook: object) -> None:
        self.rows.append(self.rows_of(self._q, k))
        del self._q

    def on_resid_post(self, x: Float[Tensor, "batch token d_model"], hook: object) -> None:
        self.norms.append(torch.linalg.vector_norm(x, dim=-1, dtype=wide(x.dtype)))

    def result(self, features: Float[Tensor, "batch embed"], prefix_tokens: int) -> AttentionRows:
        rows, norms = torch.stack(self.rows, dim=1), torch.stack(self.norms, dim=1)
        patches = rows[..., prefix_tokens:]
        sinks = sink_patches(patches, norms[..., prefix_tokens:])
        return AttentionRows(features, rows, sink_share(patches, sinks))


def class_rows(q: Projection, k: Projection) -> Rows:
    """Softmax row of the class token, `softmax(q_cls k^T / sqrt(d_head))`, in at least float32."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = q[:, 0].to(wide(q.dtype)), k.to(wide(k.dtype))
        return torch.einsum("bhd,bthd->bht", q * q.shape[-1] ** -0.5, k).softmax(dim=-1)


def patch_rows(q: Projection, k: Projection, prefix_tokens: int) -> Rows:
    """Mean softmax row of the patch queries, in at least float32; queries go chunk by chunk."""
    with torch.autocast(q.device.type, enabled=False):
        q = q[:, prefix_tokens:].transpose(1, 2).to(wide(q.dtype)) * q.shape[-1] ** -0.5
        keys = k.permute(0, 2, 3, 1).to(wide(k.dtype)).contiguous()  # [batch, head, d_head, token]
        size = max(1, SCORE_BUDGET // (keys.shape[0] * keys.shape[1] * keys.shape[3]))
        chunks = [(part @ keys).softmax(dim=-1).sum(dim=-2) for part in q.split(size, dim=-2)]
        return torch.stack(chunks).sum(dim=0) / q.shape[-2]


def sink_patches(
    rows: Float[Tensor, "batch layer head patch"], norms: Float[Tensor, "batch layer patch"]
) -> Bool[Tensor, "batch layer patch"]:
    """Patches that act as sinks: outliers in norm, or in attention received.

    A patch is a sink of a layer if the norm of its residual stream after that layer exceeds the
    image's median by more than 6 median absolute deviations, or if its attention, mean over heads,
    exceeds 5 times the uniform share. High-norm tokens: Darcet et al., "Vision Transformers Need
    Registers" (2024), section 2.

    Args:
        rows: Attention to the patches, summing to at most 1.
        norms: Norms of `hook_resid_post` at the patches.
    """
    median = norms.quantile(0.5, dim=-1, keepdim=True)
    deviation = (norms - median).abs().quantile(0.5, dim=-1, keepdim=True)
    return (norms > median + 6 * deviation) | (rows.mean(dim=2) > 5 / rows.shape[-1])


def sink_share(
    rows: Float[Tensor, "batch layer head patch"], sinks: Bool[Tensor, "batch layer patch"]
) -> Float[Tensor, "batch layer head"]:
    """Share of each row's attention to patches that the sinks take; 0 for a row without any."""
    smallest = torch.finfo(rows.dtype).tiny
    return (rows * sinks.unsqueeze(2)).sum(dim=-1) / rows.sum(dim=-1).clamp_min(smallest)
