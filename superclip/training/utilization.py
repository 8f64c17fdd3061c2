"""What a GPU could do, and what a pair costs it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from superclip.model.superclip import SuperCLIP
from superclip.training.state import Run

DENSE_16_BIT_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A10G": 125,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "4090": 165,
    "3090": 71,
}
"""Of the makers' data sheets: tensor cores, no sparsity, fp32 accumulation where that differs."""


def flops(run: Run, model: SuperCLIP) -> tuple[float, float] | None:
    """Operations a second that the run's GPUs do at best, and operations that one pair costs,
    forward and backward (twice the forward); recomputation is not counted.

    None on a CPU, in fp32, and on a GPU that is not in the table.
    """
    device = run.world.device
    if device.type != "cuda" or run.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((t for part, t in DENSE_16_BIT_TFLOPS.items() if part in name), None)
    if peak is None:
        return None
    size, length = run.preprocess.size, run.model_config["text_cfg"].get("context_length", 77)
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.encode_image(images)
        model.encode_text(tokens)
        head = 0 if model.token_head is None else 2 * model.token_head.linear.weight.numel()
    return peak * 1e12 * run.world.size, 3.0 * (counter.get_total_flops() + head)
