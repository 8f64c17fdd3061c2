"""Optimizer and precision of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from superclip.config import OptimConfig, Precision


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


def concrete_precision(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on this hardware: bf16 where it is native, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "amp_bf16" if native else "fp32"


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """Mixed precision for a forward pass.

    On the CPU attention takes the plain kernel: the backward pass of the fused one is several times
    slower in bf16 (46 % of a step of a small tower).
    """
    if precision == "fp32":
        yield
        return
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    kernel = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, dtype), kernel:
        yield
