"""How much each term of the loss moves the vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from superclip.ops.world import World


class TermGradients:
    """The vision tower's gradient of one step, term by term."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = [p for p in parameters if p.requires_grad]
        self._parts: dict[str, Float[Tensor, " n"]] = {}

    def add(self, term: str, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Carry `grads` at `outputs` back to the tower, on behalf of `term`."""
        found = torch.autograd.grad(
            outputs, self._parameters, grads, retain_graph=True, allow_unused=True
        )
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten().float()
                for p, g in zip(self._parameters, found)
            ]
        )
        self._parts[term] = self._parts[term] + flat if term in self._parts else flat

    def shares(self, world: World) -> dict[str, Float[Tensor, ""]]:
        """`grad_share_TERM` = <g_term, g> / <g, g>, with g the sum of all; they sum to 1, and a
        negative one works against the others."""
        for part in self._parts.values():
            world.sum(part)
        parts = {name: part.double() for name, part in self._parts.items()}
        whole = torch.stack(list(parts.values())).sum(0)
        return {f"grad_share_{n}": part @ whole / (whole @ whole) for n, part in parts.items()}
