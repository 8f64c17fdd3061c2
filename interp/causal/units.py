"""What an ablation removes, what it puts there, and at which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.causal.ablation import TOKENS, Means
from interp.heads import Head
from interp.hooked import HookedVisionTransformer, TowerConfig
from superclip.errors import UserError

KINDS = ("zero", "mean", "resample")

Images = Float[Tensor, "_ 3 height width"]


@dataclass(frozen=True)
class Unit:
    """What is removed at once.

    Attributes:
        name: what tables print and banks are read by; no two units of a sweep share it.
        heads: these heads' `z` is replaced.
        mlps: these layers' `hook_mlp_out` is replaced, bias included.
    """

    name: str
    heads: tuple[Head, ...] = ()
    mlps: tuple[int, ...] = ()

    @property
    def layers(self) -> list[int]:
        return sorted({head.layer for head in self.heads} | set(self.mlps))

    def heads_of(self, layer: int) -> list[int]:
        return sorted({head.index for head in self.heads if head.layer == layer})


def every(cfg: TowerConfig, what: Literal["head", "attention", "mlp", "layer"]) -> list[Unit]:
    """All heads (`L3H5`), all heads of a layer at once (`L3.attn`), all MLPs (`L3.mlp`), or all
    layers, heads and MLP at once (`L3`), in the order of the tower."""
    layers = range(cfg.n_layers)
    heads = [tuple(Head(layer, index) for index in range(cfg.n_heads)) for layer in layers]
    if what == "head":
        return [Unit(str(head), (head,)) for row in heads for head in row]
    if what == "attention":
        return [Unit(f"L{layer}.attn", heads[layer]) for layer in layers]
    if what == "mlp":
        return [Unit(f"L{layer}.mlp", (), (layer,)) for layer in layers]
    return [Unit(f"L{layer}", heads[layer], (layer,)) for layer in layers]


def group(heads: Iterable[Head], name: str | None = None) -> Unit:
    """These heads at once, of whatever layers; named `L0H3+L2H1` by default."""
    ordered = tuple(sorted(set(heads)))
    return Unit(name or "+".join(map(str, ordered)), ordered)


@dataclass(frozen=True, eq=False)
class Ablation:
    """What stands in for a removed output.

    Attributes:
        kind: `zero`; `mean`, the mean over other images at the same token; `resample`, the output
            of another image in its intact pass.
        tokens: at `all` tokens, or at the `class` token's own output only.
        mean_z, mean_mlp: for `mean`, as `mean_activations` returns them; `mean_mlp` may be missing
            where no unit has an MLP.
    """

    kind: str = "zero"
    tokens: str = "all"
    mean_z: Means | None = None
    mean_mlp: Float[Tensor, "layer token d_model"] | None = None


@torch.no_grad()
def mean_activations(
    tower: HookedVisionTransformer, batches: Iterable[Images]
) -> tuple[Means, Float[Tensor, "layer token d_model"]]:
    """Means of every head's `z` and of every MLP's output, token by token, in float64.

    Raises:
        UserError: There are no images.
    """
    cfg = tower.cfg
    shapes = {
        "hook_z": (cfg.n_layers, cfg.n_ctx, cfg.n_heads, cfg.d_head),
        "hook_mlp_out": (cfg.n_layers, cfg.n_ctx, cfg.d_model),
    }
    totals = {
        site: torch.zeros(shape, dtype=torch.float64, device=cfg.device)
        for site, shape in shapes.items()
    }
    count = 0

    def add(value: Tensor, hook: Any) -> None:
        totals[hook.name.rpartition(".")[2]][hook.layer()] += value.sum(0, dtype=torch.float64)

    for images in batches:
        tower.run_with_hooks(images, fwd_hooks=[(lambda name: name.endswith(tuple(totals)), add)])
        count += len(images)
    if count == 0:
        raise UserError("mean ablation needs images to average over; there are none")
    return totals["hook_z"] / count, totals["hook_mlp_out"] / count


def derangements(images: int, draws: int, seed: int) -> Int[np.ndarray, "draw image"]:
    """For every draw the row of another image for each image; no image gets one of them twice.

    The images form one random circle, and draw k takes the k-th next.

    Raises:
        UserError: There are not more images than draws.
    """
    if not 1 <= draws < images:
        raise UserError(f"{draws} draws of another image need at least {draws + 1} images")
    circle = np.random.Generator(np.random.Philox(key=[seed, 0xDE7A])).permutation(images)
    donors = np.empty((draws, images), np.int64)
    for draw in range(draws):
        donors[draw, circle] = np.roll(circle, -1 - draw)
    return donors


def check_units(cfg: TowerConfig, units: Sequence[Unit]) -> None:
    """Raises UserError where there is no unit, an empty one, two of a name, or a part that the
    tower does not have."""
    if not units:
        raise UserError("nothing to ablate; name at least one head, like L11H5")
    names = [unit.name for unit in units]
    for unit in units:
        if not unit.layers:
            raise UserError(f"{unit.name!r} names no head and no MLP")
        if names.count(unit.name) > 1:
            raise UserError(f"two units are named {unit.name!r}")
        for layer in unit.mlps:
            if not 0 <= layer < cfg.n_layers:
                raise UserError(
                    f"the tower has no MLP in layer {layer}; layers are 0 to {cfg.n_layers - 1}"
                )
        for head in unit.heads:
            if not (0 <= head.layer < cfg.n_layers and 0 <= head.index < cfg.n_heads):
                raise UserError(
                    f"the tower has no head {head}: layers are 0 to {cfg.n_layers - 1}, heads 0 to "
                    f"{cfg.n_heads - 1}"
                )


def check_ablation(cfg: TowerConfig, ablation: Ablation, units: Sequence[Unit]) -> None:
    """Raises UserError for an unknown option, or means that are missing, unused or of another
    tower."""
    kind = ablation.kind
    for option, value, known in (
        ("ablation kind", kind, KINDS),
        ("tokens", ablation.tokens, TOKENS),
    ):
        if value not in known:
            raise UserError(f"{option} {value!r} is unknown; choose from {', '.join(known)}")
    for name, means, needed, shape in (
        ("mean_z", ablation.mean_z, "heads", (cfg.n_heads, cfg.d_head)),
        ("mean_mlp", ablation.mean_mlp, "mlps", (cfg.d_model,)),
    ):
        if kind == "mean" and means is None and any(getattr(unit, needed) for unit in units):
            raise UserError(f"mean ablation of {needed} needs {name}; mean_activations gives it")
        if kind != "mean" and means is not None:
            raise UserError(f"{kind} ablation takes no {name}")
        expected = [cfg.n_layers, cfg.n_ctx, *shape]
        if means is not None and list(means.shape) != expected:
            raise UserError(f"{name} is {list(means.shape)}; this tower's is {expected}")


def ablated_tokens(cfg: TowerConfig, tokens: str) -> range:
    return range(cfg.n_ctx if tokens == "all" else cfg.prefix_tokens)


def read_tokens(cfg: TowerConfig) -> range:
    """The tokens that are pooled: the class token, or the patches."""
    pools_class = cfg.pool_type == "tok"
    return range(cfg.prefix_tokens) if pools_class else range(cfg.prefix_tokens, cfg.n_ctx)


def overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def within(tokens: range, held: range) -> slice:
    """Where `tokens` stand in a tensor that holds `held`."""
    return slice(tokens.start - held.start, max(tokens.start, tokens.stop) - held.start)
