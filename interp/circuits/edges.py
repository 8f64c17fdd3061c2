"""What flows from each part of the tower into each later one, estimated from gradients.

The residual stream is a sum, so what a reader sees is a sum over the writers before it: one edge
for each. Were writer u's part of reader v's input alone that of a corrupted pass, u~ in place of u,
the metric m would change, to first order, by

    sum over tokens of (u~ - u) . dm/d(input of v)

(EAP: Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery", 2023). The input
of v is its own copy of the stream, before its LayerNorm. EAP-IG (Hanna et al., "Have Faith in
Faithfulness", 2024) averages the gradient on the straight path of the embedded picture from clean
to corrupted. Below 0, the metric would fall: the edge supports it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.causal.attribution import Metric
from interp.causal.units import Images
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.hooked.blocks import wide
from superclip.errors import UserError

STREAMS = ("hook_resid_pre", "hook_resid_mid")
READ = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre")
WRITTEN = ("attn.hook_z", "hook_mlp_out")

Stream = Float[Tensor, "image token d_model"]
Gradients = Float[Tensor, "image token reader d_model"]


@dataclass(frozen=True)
class Graph:
    """Writers and readers of a tower, in its order, all tokens of a picture taken together.

    Writers: `embed` (the stream after `ln_pre`), each head `L0H1`, each MLP `L0.mlp`; the output
    bias of an attention is constant, so no writer. Readers: each head's `L0H1.q`, `.k` and `.v`,
    each MLP, and `output`.
    """

    layers: int
    heads: int

    @property
    def writers(self) -> list[str]:
        blocks = [[*self._heads(layer), f"L{layer}.mlp"] for layer in range(self.layers)]
        return ["embed", *(name for block in blocks for name in block)]

    @property
    def readers(self) -> list[str]:
        names = []
        for layer in range(self.layers):
            names += [f"{head}.{part}" for part in "qkv" for head in self._heads(layer)]
            names.append(f"L{layer}.mlp")
        return [*names, "output"]

    def _heads(self, layer: int) -> list[str]:
        return [str(Head(layer, index)) for index in range(self.heads)]

    @property
    def edges(self) -> Bool[np.ndarray, "writer reader"]:
        """Whether the reader comes after the writer; ViT-B has 32 491 such edges."""
        before = []
        for layer in range(self.layers + 1):
            seen = 1 + layer * (self.heads + 1)
            before += [seen] * (3 * self.heads) + [seen + self.heads]
        before = before[: -3 * self.heads]  # of the layer after the last, one: the output
        return np.arange(before[-1])[:, None] < np.array(before)

    def by_node(
        self, sums: Float[np.ndarray, "*image writer"]
    ) -> tuple[Float[np.ndarray, "*image layer head"], Float[np.ndarray, "*image layer"]]:
        """Sums over each writer's edges, as those of heads and those of MLPs."""
        blocks = sums[..., 1:].reshape(*sums.shape[:-1], self.layers, self.heads + 1)
        return blocks[..., :-1], blocks[..., -1]


def edge_scores(
    tower: HookedVisionTransformer, images: Images, donors: Images, metric: Metric, steps: int = 0
) -> Float[Tensor, "image writer reader"]:
    """Every edge's estimated effect on each image's metric, in the order of `Graph`.

    A writer's edges sum to its `interp.causal.attribution.attribution` with these donors if `steps`
    is 0; otherwise those of `embed` sum to `m(donor) - m(image)`, up to the quadrature. In full
    width the writers and readers of one layer are held at once. Parameters get no gradients.

    Args:
        donors: For each image the one that is its corrupted form.
        steps: 0 for EAP; else Gauss-Legendre points of EAP-IG. For ViT-B, each takes the time of
            about five forward passes.

    Returns:
        At least float32; 0 where the graph has no edge.

    Raises:
        UserError: Shapes differ, `steps` is below 0, or the metric is no differentiable score an
            image.
    """
    if images.shape != donors.shape or steps < 0:
        raise UserError(
            f"can't corrupt images {list(images.shape)} by donors {list(donors.shape)} in {steps} "
            "steps; every image needs a donor, and steps start at 0 (EAP)"
        )
    graph, kind = Graph(tower.cfg.n_layers, tower.cfg.n_heads), wide(images.dtype)
    points, weights = np.polynomial.legendre.leggauss(steps) if steps else ([-1.0], [2.0])
    width = graph.heads + 1  # writers of a layer
    # In full precision and with gradients, whatever the caller's context.
    off = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        with torch.no_grad():
            clean, corrupt = (tower(x, stop_at_layer=0) for x in (images, donors))
            changes = _changes(tower, clean, corrupt)
        embed = (corrupt.to(kind) - clean.to(kind))[:, :, None]
        scores = embed.new_zeros(len(images), *graph.edges.shape)
        for point, weight in zip(points, weights, strict=True):
            stream = (clean + float(1 + point) / 2 * (corrupt - clean)).requires_grad_()
            for layer, slope in enumerate(_gradients(tower, stream, metric, float(weight) / 2)):
                slope = slope.transpose(1, 2).flatten(2)
                into = scores[:, :, layer * (3 * graph.heads + 1) :][:, :, : slope.shape[1]]
                into[:, :1] += _flow(embed, slope)
                for below in range(layer):
                    written = _written(tower, changes, below)
                    into[:, 1 + below * width :][:, :width] += _flow(written, slope)
                if layer < graph.layers:  # the MLP also reads the heads of its own layer
                    own = _flow(_written(tower, changes, layer)[:, :, :-1], slope[:, -1:])
                    into[:, 1 + layer * width :, -1:][:, : graph.heads] += own
    return scores


def _changes(tower: HookedVisionTransformer, clean: Stream, corrupt: Stream) -> dict[str, Tensor]:
    """Corrupted less clean, at the sites of every layer that are written from."""
    sites = [f"blocks.{layer}.{site}" for layer in range(tower.cfg.n_layers) for site in WRITTEN]
    for_both = partial(tower.run_with_cache, start_at_layer=0, names_filter=sites)
    (_, before), (_, after) = for_both(clean), for_both(corrupt)
    kind = wide(clean.dtype)
    return {site: after[site].to(kind) - before[site].to(kind) for site in sites}


@torch.no_grad()
def _written(
    tower: HookedVisionTransformer, changes: dict[str, Tensor], layer: int
) -> Float[Tensor, "image token writer d_model"]:
    """The change of what each head of a layer, then its MLP, adds to the stream."""
    z, mlp = (changes[f"blocks.{layer}.{site}"] for site in WRITTEN)
    return torch.cat([tower.block(layer).attn.head_results(z), mlp[:, :, None]], dim=2)


def _flow(
    written: Float[Tensor, "image token writer d_model"],
    slope: Float[Tensor, "image reader token_times_d_model"],
) -> Float[Tensor, "image writer reader"]:
    return written.transpose(1, 2).flatten(2) @ slope.mT


def _gradients(
    tower: HookedVisionTransformer, stream: Stream, metric: Metric, weight: float
) -> Iterator[Gradients]:
    """The weighted metric's gradient in each reader's input: q, k, v of a layer's heads and its
    MLP, layer by layer; at last the output's."""
    layers, values = range(tower.cfg.n_layers), {}
    read = [f"blocks.{layer}.{site}" for layer in layers for site in READ]
    read.append(f"blocks.{layers[-1]}.hook_resid_post")
    streams = [f"blocks.{layer}.{site}" for layer in layers for site in STREAMS]

    def record(value: Tensor, hook: Any) -> None:
        values[hook.name] = value

    with tower.hooks(fwd_hooks=[(site, record) for site in read + streams]):
        scores = metric(tower(stream, start_at_layer=0))
    if tuple(scores.shape) != (len(stream),) or not scores.requires_grad:
        raise UserError(f"the metric must give one differentiable score an image, [{len(stream)}]")
    inputs = [values[site] for site in read]
    found = torch.autograd.grad(weight * scores.sum(), inputs, materialize_grads=True)
    slopes = {site: x.to(wide(x.dtype)) for site, x in zip(read, found, strict=True)}
    for layer in layers:
        attn, mlp = tower.block(layer).attn, tower.block(layer).mlp.source
        q, k, v, pre = (slopes[f"blocks.{layer}.{site}"] for site in READ)
        x, mid = (values[f"blocks.{layer}.{site}"].detach().to(pre) for site in STREAMS)
        in_proj = torch.stack([attn.W_Q, attn.W_K, attn.W_V]).detach().to(pre)
        slope = torch.einsum("btphe,phme->btphm", torch.stack([q, k, v], dim=2), in_proj)
        into_mlp = (pre @ mlp.mlp.c_fc.weight.detach().to(pre))[:, :, None]
        of_heads = _through_norm(attn.source.ln_1, x, slope.flatten(2, 3))
        yield torch.cat([of_heads, _through_norm(mlp.ln_2, mid, into_mlp)], dim=2)
    yield slopes[read[-1]][:, :, None]


@torch.no_grad()
def _through_norm(norm: nn.LayerNorm, x: Stream, slope: Gradients) -> Gradients:
    """The gradient in the input of a LayerNorm, from that in its output."""
    centred = (x - x.mean(dim=-1, keepdim=True))[:, :, None]
    scale = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    slope, normalised = slope * (norm.weight / scale), centred / scale
    slope -= normalised * (slope * normalised).mean(dim=-1, keepdim=True)
    return slope.sub_(slope.mean(dim=-1, keepdim=True))
