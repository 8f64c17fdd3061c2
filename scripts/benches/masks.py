"""What a training step costs when the tower sees a part of the patches, against the count of
operations."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benches.core import Bench, Findings, Row, interleave, settle_on
from benches.trainers import Setup, our_batches, our_run


@dataclass(frozen=True)
class MasksBench(Bench):
    """Whole CLIP steps with random masks against the step on all patches, and the saving that the
    operations of both towers foretell."""

    model: str = "ViT-B-16"
    """Model, with random weights."""
    batch_size: int = 32
    """Pairs of a step."""
    keep: tuple[float, ...] = (0.5, 0.25)
    """Shares of the patches."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        from superclip.config import ModelConfig
        from superclip.cost import counted
        from superclip.ops.world import choose_device
        from superclip.training.step import train_step

        device = choose_device(self.device)
        sides: dict[str, Callable[[], object]] = {}
        foretold: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            for keep in (1.0, *self.keep):
                name = f"keep {keep:g}"
                mask = None if keep == 1 else f"random:{keep:g}"
                setup = Setup(Path(folder) / name, self.model, self.batch_size, device=str(device))
                run, state = our_run(setup, "clip", image_reduction=mask)
                batch = next(our_batches(run, 0, 1))[0]
                sides[name] = functools.partial(train_step, state, batch, run)
                stage = counted(name, ModelConfig(self.model, image_reduction=mask), 1)
                foretold[name] = stage.training / stage.full_training
            costs = interleave(sides, self.rounds, settle_on(device))
        whole = costs.pop("keep 1")
        rows = [Row(f"{self.model}, {self.batch_size} pairs, all patches", "s", whole)]
        for name, cost in costs.items():
            saved = (1 - cost / whole) / (1 - foretold[name])
            rows.append(Row(f"{name}: share of the saving", "ratio", saved, (">=", 0.8)))
            rows.append(Row("  step / step on all patches", "ratio", cost / whole))
        told = ", ".join(f"{n} {share:.3f}" for n, share in foretold.items() if n != "keep 1")
        return Findings(rows, [f"operations of a pair over those on all patches: {told}"])
