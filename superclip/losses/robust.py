"""The robust global objective with a temperature of every sample, which iSogCLR and FastCLIP-v2
descend by different steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from superclip.data.batch import Batch
from superclip.loss_options import RobustOptions
from superclip.losses.sample_table import PairTables
from superclip.ops.normalizers import moving_average, objective, similarity_blocks
from superclip.ops.world import World

Columns = dict[str, Float[Tensor, "2 b"]]
Move = Callable[[Columns, Float[Tensor, "2 b"], Float[Tensor, "2 b"]], Columns]
LARGEST_SLOPE = 5.0
"""Bound on a temperature's derivative, in both released codes."""


def robust_term(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    batch: Batch,
    world: World,
    tables: PairTables,
    options: RobustOptions,
    gamma: float,
    move: Move,
) -> tuple[Float[Tensor, ""], Float[Tensor, " 2"]]:
    """mean_i tau_i (log u_i + rho) over pictures plus the same over captions, at the temperatures
    found; then u and tau of the batch's samples are moved.

    Args:
        tables: columns `log_u` (minus infinity before the first visit), `tau` (0), and what `move`
            keeps.
        gamma: weight of this batch in the moving average of u.
        move: new columns but `log_u`, from the old ones, tau and the derivative by tau.

    Returns:
        The term, and the mean new temperature of the own pictures and captions.
    """
    two_sided = options.communication == "reduction"
    blocks = similarity_blocks(image_features, text_features, world, two_sided)
    known = tables.gather(batch)
    start = (1 / scale.detach()).clamp(*options.tau_range)
    tau = torch.where(known["tau"] > 0, known["tau"], start)
    exponents = blocks.exponents(tau)
    fresh = blocks.log_normalizers(exponents, options.normalizer_eps)
    logs = moving_average(known["log_u"], fresh, gamma)
    surrogate, moments = blocks.surrogate(exponents, logs, tau, tau, world)
    slope = (logs + options.rho - moments).clamp(-LARGEST_SLOPE, LARGEST_SLOPE)
    new = {"log_u": logs} | move(known, tau, slope)
    tables.update(batch, new, world)
    value = (tau * (logs + options.rho)).mean(1).sum()
    return objective(value, surrogate), new["tau"].mean(1)
