"""Memory over many steps, and the token term's share of it."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benches.core import Bench, Findings, Row, interleave, resident
from benches.trainers import Setup, our_batches, our_run, tiny_model, write_shards

if TYPE_CHECKING:  # threads are set before numpy and torch load
    pass


@dataclass(frozen=True)
class MemoryBench(Bench):
    """Resident memory over many steps of the real loop and reader; and the token term's share of a
    step's memory, counted."""

    rounds: int = 20
    """Times that memory is read, after one round of warm-up."""
    steps: int = 10_000
    """Optimizer steps, all rounds together; a tiny SuperCLIP with 2 pairs a step."""
    workers: int = 0
    """Reader processes, counted too; 0 reads in the training process."""
    model: str = "ViT-B-16"
    """Model of the count."""
    batch_size: int = 512
    """Pairs of the count."""

    def run(self) -> Findings:
        from superclip.training.loop import fit

        count, held = max(1, self.steps // self.rounds), list[float]()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards, told = write_shards(folder, None, 64, max(1, self.workers))
            setup = Setup(folder, tiny_model(folder, 32), 2, 1, shards, self.workers)
            run, state = our_run(setup, "superclip")
            batches = our_batches(run, 0, count * (self.rounds + 1))

            def some_steps() -> None:
                fit(run, state, itertools.islice(batches, count))
                held.append(resident())

            cost = interleave({f"{count} steps": some_steps}, self.rounds)[f"{count} steps"]
        rows = [Row("a tiny SuperCLIP's step", "ms", 1e3 * cost / count)]
        slope = statistics.linear_regression(range(len(held)), held).slope * 1e3 / count
        notes = [
            f"resident after {count} steps of warm-up {held[0]:.1f} MB, after "
            f"{count * self.rounds} more {held[-1]:.1f} MB, at most {max(held):.1f} MB; "
            f"least-squares slope {slope:+.3f} MB per 1000 steps; {told}",
            f"resident, MB, every {count} steps: {' '.join(f'{mb:.1f}' for mb in held)}",
        ]
        return Findings(rows, notes + token_term(self.model, self.batch_size))


def token_term(name: str, count: int) -> list[str]:
    """Memory of a CLIP step in bf16, on paper, and what the token term adds to it beyond its head.

    A step holds weights, gradients and two moments (fp32, 16 bytes a weight), and a layer keeps 34
    bytes a token and channel for the backward pass: inputs of both norms and both norms' outputs,
    queries, keys, values and mixed values in 2 bytes each, 2 x 4 channels in the MLP, statistics
    (autograd's saved tensors for ViT-B/16 come to 33.5). With checkpointing a layer keeps its input
    alone, and one layer at a time is recomputed. The term adds, at its peak, the head's weights and
    their gradient in bf16, a chunk of logits and of their gradient in bf16 and fp32 (12 bytes
    each), its buffers (20 bytes a column) and what the head reads (8 bytes a channel).
    """
    from superclip.model.factory import build_clip, model_config
    from superclip.ops.tokens import ROW_CHUNK_ELEMENTS

    config, notes = model_config(name), []
    vision, text = config["vision_cfg"], config["text_cfg"]
    seen, read = (vision["image_size"] // vision["patch_size"]) ** 2 + 1, text["context_length"]
    layers = [tower["layers"] for tower in (vision, text)]
    widths = [count * seen * vision["width"], count * read * text["width"]]
    always = 16 * sum(p.numel() for p in build_clip(config).parameters())
    columns = text["vocab_size"]
    head = columns * (vision["width"] + 1)
    logits = 12 * min(ROW_CHUNK_ELEMENTS, count * columns)
    term = 4 * head + logits + 20 * columns + 8 * count * vision["width"]
    whole = sum(34 * n * w for n, w in zip(layers, widths))
    spared = sum(2 * n * w for n, w in zip(layers, widths)) + 34 * max(widths)
    for kind, kept in (("without", whole), ("with", spared)):
        notes.append(
            f"{name}, batch {count}, bf16, {kind} checkpointing: CLIP step "
            f"{(always + kept) / 1e9:.2f} GB, head's weights, gradient and moments "
            f"{16 * head / 1e9:.2f} GB; token term beyond them {term / 1e9:.3f} GB = "
            f"{term / (always + kept):.2%} (target: at most 5 %)"
        )
    return notes
