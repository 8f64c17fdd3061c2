"""Number formats of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from superclip.config import Precision


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
    """Mixed precision for a forward pass."""
    if precision == "fp32":
        yield
        return
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    with torch.autocast(device.type, dtype), attention_kernel(precision, device):
        yield


def attention_kernel(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Forward and backward pass alike, as blocks that are computed again in the latter must find
    the kernel of the former.

    On the CPU attention takes the plain kernel: the backward pass of the fused one is several times
    slower in bf16 (46 % of a step of a small tower).
    """
    if precision == "fp32" or device.type != "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
