"""Optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from superclip.config import OptimConfig


def adamw(model: nn.Module, options: OptimConfig, lr: float) -> torch.optim.AdamW:
    """AdamW with open_clip's two groups: norms, biases, other 1-D parameters and the logit scale do
    not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def decays(name: str, p: nn.Parameter) -> bool:
        return p.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    groups = [
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": options.wd},
    ]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=options.eps, fused=True)
