"""Attribution patching: the effect of removing each head, estimated from a gradient.

An exact ablation puts z~ in the place of one head's z and runs the rest of the tower. To first
order the metric m of the output then changes by

    sum over tokens and d_head of (z~ - z) * dm/dz

which one forward and one backward pass give for all heads at once (Nanda, "Attribution Patching",
2023; Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery", 2023). Early
heads are far from linear, so `integrated_attribution` averages the gradient on the way to z~.
Either is an estimate: show it beside its `agreement` with exact ablations, never alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.causal.units import Ablation, Images, Unit, check_ablation, every
from interp.hooked import HookedVisionTransformer
from interp.hooked.blocks import wide
from superclip.errors import UserError

Metric = Callable[[Tensor], Tensor]
"""From features `[image, embed]`, not normalised, to one score an image that depends on that image
alone: with a score that mixes images, effects would too."""

FEWEST = 3
TOP = 5
STEPS = 1  # the midpoint: more make a layer's sum exact, but rank single heads little better
CONSTANT = 1e-9  # spread of values, relative to the largest, that is rounding


@dataclass(frozen=True)
class Attribution:
    """Estimated change of the metric if a head (an MLP) were ablated, image by image.

    Attributes:
        heads: Below 0 where the metric would fall.
        mlps: Likewise; None if not asked for.
        metric: Of the intact tower.
    """

    heads: Float[Tensor, "image layer head"]
    mlps: Float[Tensor, "image layer"] | None
    metric: Float[Tensor, " image"]


def attribution(
    tower: HookedVisionTransformer,
    images: Images,
    metric: Metric,
    ablation: Ablation,
    donors: Sequence[Images] = (),
    mlps: bool = False,
) -> Attribution:
    """First-order effect of removing every head, in one forward and one backward pass.

    Parameters may require gradients or not and get none; no graph outlives the call. Being linear
    in z~, the mean over draws of donors is exact for this estimate; each draw costs a forward pass.

    Args:
        donors: For `resample`, as for `interp.causal.sweep.ablate_batch`.
        mlps: Estimate the effect of removing each MLP's output as well.

    Raises:
        UserError: An option does not exist, means or donors are missing, unused or of another
            shape, or the metric is no differentiable score an image.
    """
    units = [*every(tower.cfg, "head"), *(every(tower.cfg, "mlp") if mlps else ())]
    _check(tower, images, ablation, donors, units)
    z, mlp = _sites(tower, "attn.hook_z"), _sites(tower, "hook_mlp_out") if mlps else []
    draws = [_stand_ins(tower, ablation, pictures, z + mlp) for pictures in donors or [None]]
    values: dict[str, Tensor] = {}

    def record(value: Tensor, hook: Any) -> Tensor:
        # The graph begins here, whether or not the user's parameters require gradients.
        values[hook.name] = value if value.requires_grad else value.detach().requires_grad_()
        return values[hook.name]

    with _recording(images):
        with torch.no_grad():
            stream = tower(images, stop_at_layer=0)
        with tower.hooks(fwd_hooks=[(site, record) for site in z + mlp]):
            scores = _scores(metric, tower(stream, start_at_layer=0))
        # Zero where an enclosing block cuts a site off from the output.
        gradients = torch.autograd.grad(
            scores.sum(), [values[site] for site in z + mlp], materialize_grads=True
        )
    effects = {}
    for site, gradient in zip(z + mlp, gradients, strict=True):
        stand_in = torch.stack([draw[site] for draw in draws]).mean(dim=0)
        difference = _difference(tower, ablation, values[site], stand_in)
        effects[site] = _summed(difference * gradient)
    return Attribution(
        torch.stack([effects[site] for site in z], dim=1),
        torch.stack([effects[site] for site in mlp], dim=1) if mlps else None,
        scores.detach(),
    )


def integrated_attribution(
    tower: HookedVisionTransformer,
    images: Images,
    metric: Metric,
    ablation: Ablation,
    donors: Sequence[Images] = (),
    steps: int = STEPS,
) -> Attribution:
    """The gradient averaged on the way to the ablation, one layer after another.

    On the path `z + a (z~ - z)` all heads of one layer move together, and earlier layers stay as
    they are. A layer's effects therefore sum to the exact effect of removing all its heads, up to
    the error of the quadrature (Sundararajan et al., "Axiomatic Attribution for Deep Networks",
    2017); a head's own effect holds half of what it shares with each other head of its layer. A
    path of the embedding instead (EAP-IG: Hanna et al., "Have Faith in Faithfulness", 2024) has no
    end point for zero or mean ablation, and does not sum to any head's removal.

    Args:
        donors: As for `attribution`; every draw has a path of its own.
        steps: Gauss-Legendre points of each path. Each costs a forward and a backward pass from
            that layer on, so all cost `steps * (layers + 1) / 2` times the two passes.

    Raises:
        UserError: As `attribution`, or `steps` is below 1.
    """
    if steps < 1:
        raise UserError(f"{steps} integration steps are too few; give at least 1")
    _check(tower, images, ablation, donors, every(tower.cfg, "head"))
    z, resid = _sites(tower, "attn.hook_z"), _sites(tower, "hook_resid_pre")
    points, weights = np.polynomial.legendre.leggauss(steps)
    effects = []
    with _recording(images):
        with torch.no_grad():
            features, intact = tower.run_with_cache(images, names_filter=z + resid)
            scores = _scores(metric, features)
        for draw in [_stand_ins(tower, ablation, pictures, z) for pictures in donors or [None]]:
            for layer, site in enumerate(z):
                difference = _difference(tower, ablation, intact[site], draw[site])
                mean = torch.zeros_like(difference)
                for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
                    moved = (intact[site] + float(point) * difference).to(intact[site].dtype)
                    moved.requires_grad_()
                    with tower.hooks(fwd_hooks=[(site, partial(_put, moved))]):
                        end = tower(intact[resid[layer]], start_at_layer=layer)
                    (gradient,) = torch.autograd.grad(_scores(metric, end).sum(), [moved])
                    mean += float(weight) * gradient
                effects.append(_summed(difference * mean))
    by_draw = torch.stack(effects, dim=1).unflatten(1, (-1, len(z)))
    return Attribution(by_draw.mean(dim=1), None, scores)


@dataclass(frozen=True)
class Fit:
    """How well estimated effects match exact ones, over some heads; means over images.

    Attributes:
        pearson, spearman: None where either side is constant, or of fewer than `FEWEST` heads, of
            which two agree by any line.
        relative_error: Sum of absolute errors over the sum of absolute exact effects; None where
            these are all 0.
        recall: Share of the `top` heads by absolute exact effect that are among the `top` by
            absolute estimate; None likewise.
        chance: The recall of a random choice.
        heads: How many heads are compared.
    """

    pearson: float | None
    spearman: float | None
    relative_error: float | None
    recall: float | None
    chance: float
    heads: int


@dataclass(frozen=True)
class Agreement:
    """Estimate against exact effect, over all heads and layer by layer.

    Attributes:
        top: Heads that `recall` asks for; fewer where a layer has no more.
        images: On whose mean effects the comparison rests.
    """

    overall: Fit
    layers: tuple[Fit, ...]
    top: int
    images: int


def agreement(
    estimate: Float[np.ndarray, "..."], exact: Float[np.ndarray, "..."], top: int = TOP
) -> Agreement:
    """Compare mean effects of the same images: without this, show no attribution.

    Args:
        estimate, exact: `[image, layer, head]`.
        top: How many heads `recall` looks for.

    Raises:
        UserError: The shapes differ, there is nothing to compare, or a value is not finite.
    """
    if estimate.shape != exact.shape or exact.ndim != 3 or exact.size == 0 or top < 1:
        raise UserError(
            f"can't compare estimates {estimate.shape} with exact effects {exact.shape} by their "
            f"top {top}"
        )
    if not (np.isfinite(estimate).all() and np.isfinite(exact).all()):
        raise UserError("an effect is not finite; its image or the weights hold a NaN or infinity")
    means = [x.astype(np.float64).mean(axis=0) for x in (estimate, exact)]
    layers = tuple(_fit(a, b, top) for a, b in zip(*means, strict=True))
    return Agreement(_fit(means[0].ravel(), means[1].ravel(), top), layers, top, len(exact))


def _fit(estimate: Float[np.ndarray, " head"], exact: Float[np.ndarray, " head"], top: int) -> Fit:
    from scipy.stats import rankdata

    heads, size = len(exact), np.abs(exact).sum()
    top = min(top, heads)
    error = float(np.abs(estimate - exact).sum() / size) if size > 0 else None
    constant = any(np.ptp(x) <= CONSTANT * np.abs(x).max() for x in (estimate, exact))
    if constant or heads < FEWEST:
        return Fit(None, None, error, None, top / heads, heads)
    best = [set(np.argsort(-np.abs(x), kind="stable")[:top]) for x in (estimate, exact)]
    return Fit(
        float(np.corrcoef(estimate, exact)[0, 1]),
        float(np.corrcoef(rankdata(estimate), rankdata(exact))[0, 1]),
        error,
        len(best[0] & best[1]) / top,
        top / heads,
        heads,
    )


def _check(
    tower: HookedVisionTransformer,
    images: Images,
    ablation: Ablation,
    donors: Sequence[Images],
    units: Sequence[Unit],
) -> None:
    check_ablation(tower.cfg, ablation, units)
    if (ablation.kind == "resample") != bool(donors):
        takes = "needs" if ablation.kind == "resample" else "takes no"
        raise UserError(f"{ablation.kind} ablation {takes} donors")
    for pictures in donors:
        if pictures.shape != images.shape:
            raise UserError(
                f"donors are {list(pictures.shape)} for images {list(images.shape)}; every image "
                "needs one"
            )


def _sites(tower: HookedVisionTransformer, name: str) -> list[str]:
    return [f"blocks.{layer}.{name}" for layer in range(tower.cfg.n_layers)]


@contextmanager
def _recording(images: Images) -> Iterator[None]:
    """Gradients on, in full precision, whatever the caller's context."""
    off = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        yield


@torch.no_grad()
def _stand_ins(
    tower: HookedVisionTransformer,
    ablation: Ablation,
    donors: Images | None,
    sites: Sequence[str],
) -> dict[str, Tensor]:
    """What takes the place of each site's value, `[image or 1, token, ...]`; a lone 0 for zero."""
    if donors is not None:
        return tower.run_with_cache(donors, names_filter=sites)[1].cache_dict
    if ablation.kind == "zero":
        return dict.fromkeys(sites, torch.zeros((), device=tower.cfg.device))
    found = {}
    for site in sites:
        means = ablation.mean_z if site.endswith("hook_z") else ablation.mean_mlp
        assert means is not None, "check_ablation asks for them"
        found[site] = means[int(site.split(".")[1])][None]
    return found


def _difference(
    tower: HookedVisionTransformer,
    ablation: Ablation,
    value: Float[Tensor, "image token *part"],
    stand_in: Float[Tensor, "..."],
) -> Float[Tensor, "image token *part"]:
    """What the ablation adds to a site's value: 0 at tokens that it leaves."""
    value = value.detach().to(wide(value.dtype))
    difference = stand_in.to(value) - value
    if ablation.tokens == "class":
        difference[:, tower.cfg.prefix_tokens :] = 0
    return difference


def _put(moved: Tensor, value: Tensor, hook: Any) -> Tensor:
    return moved


def _summed(products: Float[Tensor, "image token *part d"]) -> Float[Tensor, "image *part"]:
    """Over tokens and the last axis: one number an image, and a head where there are heads."""
    return products.sum(dim=(1, -1))


def _scores(metric: Metric, features: Float[Tensor, "image embed"]) -> Float[Tensor, " image"]:
    scores = metric(features)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (len(features),):
        raise UserError(f"the metric must give one score an image, [{len(features)}]")
    if features.requires_grad and not scores.requires_grad:
        raise UserError("the metric has no gradient with respect to the features")
    return scores
