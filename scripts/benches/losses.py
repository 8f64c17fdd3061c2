"""What each loss costs, in time, memory and bytes between processes."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benches.core import Bench, Findings, Row, allocated, interleave, settle_on
from benches.trainers import Setup, our_batches, our_run

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import torch


WHOLE = "clip", "fastclip-v3", "neuclip"
"""Losses whose whole step has a target."""


@dataclass(frozen=True)
class LossesBench(Bench):
    """Forward and backward of every loss alone against CLIP's, in fp32 on one process; with
    --step-batch-size, whole training steps too."""

    batch_size: tuple[int, ...] = (256, 1024)
    """Pairs of a step."""
    width: int = 512
    """Dimensions of the features."""
    step_batch_size: int | None = None
    """Pairs of a whole step of --model, for CLIP, FastCLIP-v3 and NeuCLIP."""
    model: str = "ViT-B-32"
    """Model of the whole steps, with random weights."""
    precision: Literal["auto", "fp32", "amp", "amp_bf16"] = "fp32"
    """Of the whole steps."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        rows, notes = list[Row](), list[str]()
        for size in self.batch_size:
            sides = self._alone(size)
            costs = interleave(sides, self.rounds, settle_on(self._device))
            clip = costs.pop("clip")
            rows.append(Row(f"clip alone, batch {size}", "ms", 1e3 * clip))
            for name, cost in costs.items():
                target = ("<=", 1.5) if name.startswith("fastclip") else None
                rows.append(Row(f"  {name} / clip", "ratio", cost / clip, target))
            peaks = {name: allocated(side, self._device) for name, side in sides.items()}
            shown = (f"{n} {p / 1e6:.1f} ({p / peaks['clip']:.2f})" for n, p in peaks.items())
            about = f"peak memory at batch {size}, MB beyond what lives always (/ clip): "
            notes.append(about + ", ".join(shown))
        if self.step_batch_size is not None:
            rows += self._whole(self.step_batch_size)
        return Findings(rows, notes)

    @property
    def _device(self) -> torch.device:
        from superclip.ops.world import choose_device

        return choose_device(self.device)

    def _alone(self, size: int) -> dict[str, Callable[[], object]]:
        import torch

        from superclip.data.batch import Batch
        from superclip.loss_options import LOSS_OPTIONS
        from superclip.losses import LOSSES, LossContext, build_loss
        from superclip.ops.world import World

        torch.manual_seed(0)
        world, ids = World(device=self._device), torch.arange(size, device=self._device)
        batch = Batch(ids[:, None], ids[:, None], ids, ids)
        context = LossContext(1, (), None, size, size, 100, 10, self.width)
        sides = {}
        for name, options in LOSS_OPTIONS.items():
            if "token_logits" in LOSSES[name].needs:
                continue
            leaves = [torch.randn(size, self.width, device=self._device) for _ in range(2)]
            leaves = [torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in leaves]
            leaves.append(torch.tensor(1 / 0.07, device=self._device, requires_grad=True))
            loss = build_loss(name, options(), context).to(self._device)

            def step(loss: Any = loss, leaves: Any = leaves) -> None:
                loss.observe(batch, world)
                total = torch.stack([*loss.pair_terms(*leaves, batch, world).values()]).sum()
                own = [*leaves, *loss.parameters()]
                torch.autograd.grad(total, own, materialize_grads=True)

            sides[name] = step
        return sides

    def _whole(self, size: int) -> list[Row]:
        from superclip.training.step import train_step

        with tempfile.TemporaryDirectory() as folder:
            sides = {}
            for name in WHOLE:
                how = self.precision, str(self._device)
                setup = Setup(Path(folder), self.model, size, 1, None, 0, *how)
                run, state = our_run(setup, name)
                batch = next(our_batches(run, 0, 1))[0]
                sides[name] = functools.partial(train_step, state, batch, run)
            costs = interleave(sides, self.rounds, settle_on(self._device))
        clip, label = costs.pop("clip"), f"{self.model}, {size} pairs"
        ratios = [Row(f"  {n} / clip", "ratio", c / clip, ("<=", 1.1)) for n, c in costs.items()]
        return [Row(f"{label}: a step of clip", "s", clip), *ratios]


@dataclass(frozen=True)
class CommBench(Bench):
    """Bytes that a rank sends a step for the loss alone, counted on gloo processes and by formula;
    no time is taken."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes to count on."""
    batch_size: int = 32
    """Pairs of a rank."""
    width: int = 512
    """Dimensions of the features."""

    def run(self) -> Findings:
        from torch.multiprocessing.spawn import spawn

        notes = ["a rank sends (K - 1) / K of what it gathers, and twice that of what it reduces"]
        for size in self.ranks:
            with tempfile.TemporaryDirectory() as folder:
                port = 20_000 + os.getpid() % 20_000 + size
                spawn(count_bytes, (size, port, self.batch_size, self.width, folder), size)
                counted = json.loads((Path(folder) / "counted.json").read_text())
            for name, found in counted.items():
                wanted = sent_bytes(name, size, self.batch_size, self.width)
                same = "equal to" if found == wanted else f"NOT the {wanted:,.0f} of"
                notes.append(f"{size} ranks, {name}: {found:,.0f} bytes a step, {same} the formula")
        for size in (8, 16, 32, 64):
            told = ", ".join(
                f"{name} {sent_bytes(name, size, self.batch_size, self.width) / 1e6:.2f}"
                for name in COMMUNICATION
            )
            notes.append(f"{size} ranks by the formula, MB a step: {told}")
        return Findings([], notes)


COMMUNICATION = {
    "clip": (2, 2, 0),
    "fastclip-v3 reduction": (2, 0, 6 * 4 + 2 * 4 + 2 * 8),
    "fastclip-v3 gather": (2, 2, 2 * 4 + 2 * 8),
    "fastclip-v2 reduction": (2, 0, 6 * 4 + 10 * 4 + 2 * 8),
    "neuclip reduction": (2, 0, 6 * 4 + 2 * 4),
}
"""Of each pair: features gathered, gradients of features reduced, and bytes gathered beside: what
anchors need of others (lambda, tau and factor of both modalities), new rows of the tables and their
two ids, or NeuCLIP's fresh log-normalisers."""


def sent_bytes(name: str, ranks: int, batch: int, width: int) -> float:
    """Bytes that a rank sends for the loss in a step, by ring algorithms."""
    gathered, reduced, beside = COMMUNICATION[name]
    whole = ranks * batch * (gathered * 4 * width + 2 * reduced * 4 * width + beside)
    return whole * (ranks - 1) / ranks


def count_bytes(rank: int, size: int, port: int, batch: int, width: int, folder: str) -> None:
    """One process: a step of each loss, its collectives noted."""
    import torch
    import torch.distributed as dist

    from superclip.data.batch import Batch
    from superclip.loss_options import LOSS_OPTIONS
    from superclip.losses import LossContext, build_loss
    from superclip.ops.world import World

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    sent: dict[str, float] = {}

    class Counting(World):
        def _call(self, collective: Any, *args: Any, **options: Any) -> Any:
            weight = 2 if collective is dist.all_reduce else 1
            sent[name] = sent.get(name, 0) + weight * args[0].nbytes * (size - 1) / size
            return super()._call(collective, *args, **options)

    joined = World.from_env("cpu")
    world = Counting(**vars(joined))
    ids = torch.arange(batch)
    data = Batch(ids[:, None], ids[:, None], ids, ids)
    context = LossContext(1, (), None, batch, batch, 100, 10, width)
    for name in COMMUNICATION:
        loss, _, way = name.partition(" ")
        options = LOSS_OPTIONS[loss](**({"communication": way} if way else {}))
        x, z = (torch.randn(batch, width).requires_grad_() for _ in range(2))
        term = build_loss(loss, options, context)
        term.observe(data, world)
        terms = term.pair_terms(x, z, torch.tensor(14.0), data, world)
        torch.autograd.grad(torch.stack([*terms.values()]).sum(), (x, z))
    if rank == 0:
        (Path(folder) / "counted.json").write_text(json.dumps(sent))
    joined.close()
