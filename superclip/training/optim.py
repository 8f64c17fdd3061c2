"""Optimizer of a run, and the learning rate of each of its groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from superclip.config import OptimConfig
from superclip.training.schedule import cosine

TAU_THRESHOLD = 0.03
"""Temperature below which `step_thresh` divides its learning rate by 3 (FastCLIP)."""


def build_optimizer(
    model: nn.Module, loss: nn.Module, options: OptimConfig, lr: float
) -> torch.optim.Optimizer:
    """AdamW, Adam and SGD are torch's, LAMB and LION timm's.

    Groups: open_clip's two (norms, biases and other 1-D parameters do not decay), the logit scale,
    and the loss's own parameters. Decay is decoupled in AdamW and LION; in Adam and SGD it is added
    to the gradient, in LAMB to the direction before its trust ratio, which is 1 in groups without
    decay, as in FastCLIP's LAMB.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def role(name: str, p: nn.Parameter) -> str:
        if name.endswith("logit_scale"):
            return "scale"
        plain = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
        return "plain" if plain else "decay"

    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if role(name, p) == kind], "name": kind}
        | {"weight_decay": options.decay if kind == "decay" else 0.0}
        for kind in ("plain", "decay", "scale")
    ]
    groups.append({"params": list(loss.parameters()), "name": "loss", "weight_decay": 0.0})
    betas, eps = (options.beta1, options.beta2), options.eps
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "sgd":
            momentum, nesterov = options.momentum, options.nesterov
            return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
        case "lamb":
            from timm.optim.lamb import Lamb

            return Lamb(groups, lr=lr, betas=betas, eps=eps, max_grad_norm=None)
        case "lion":
            from timm.optim.lion import Lion

            return Lion(groups, lr=lr, betas=betas)


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    options: OptimConfig,
    lr: float,
    step: int,
    total: int,
    logit_scale: torch.Tensor,
) -> None:
    """The learning rates of this step (counted from 0): one for the towers, one for the
    temperature."""
    tower = cosine(step, lr, options.warmup, total, options.lr_min)
    tau = lr if options.lr_tau is None else options.lr_tau
    if options.lr_tau_schedule == "cosine":
        tau = cosine(step, tau, options.warmup, total, min(options.lr_min, tau))
    elif options.lr_tau_schedule == "step_thresh" and torch.exp(-logit_scale) <= TAU_THRESHOLD:
        tau /= 3
    for group in optimizer.param_groups:
        group["lr"] = tau if group["name"] == "scale" else tower
