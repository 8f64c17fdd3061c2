"""What a GPU could do, and what a pair costs it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from superclip.model.superclip import SuperCLIP
from superclip.ops.statistics import fixed_statistics
from superclip.training.state import Run

DENSE_16_BIT_TFLOPS = {
    "B200": 2250,
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
    """Operations a second that the run's GPUs do at best, and operations that one pair costs
    (recomputation is not counted).

    None on a CPU, in fp32, and on a GPU that is not in the table.
    """
    device = run.world.device
    if device.type != "cuda" or run.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((t for part, t in DENSE_16_BIT_TFLOPS.items() if part in name), None)
    if peak is None:
        return None
    length = run.model_config["text_cfg"].get("context_length", 77)
    return peak * 1e12 * run.world.size, pair_flops(model, run.preprocess.size, length)


def pair_flops(model: SuperCLIP, size: int, length: int) -> float:
    """Operations that one picture of `size` pixels with a text of `length` tokens costs, forward
    and backward (twice the forward); a multiplication and an addition count as two."""
    device = model.mean.device  # a pair of pairs: batch norm refuses a single value
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
    tokens = torch.zeros(2, length, dtype=torch.long, device=device)
    training = model.training
    model.train()  # in evaluation torch's fused attention hides its operations from the counter
    try:
        model.choose_patches(tokens[:, 0], 0)
        with fixed_statistics(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.encode_image(images)
            model.encode_text(tokens)
    finally:
        model.train(training)
    head = 0 if model.token_head is None else 2 * model.token_head.linear.weight.numel()
    return 3.0 * (counter.get_total_flops() / 2 + head)
