"""Ranks of retrieval, and the generated scenes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benches.core import Bench, Findings, Row, interleave, resident

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import torch


@dataclass(frozen=True)
class ScenesBench(Bench):
    """Generated scenes per second on one thread."""

    num: int = 1000
    """Scenes of a pass."""

    def run(self) -> Findings:
        from superclip.data.scenes import Scenes

        source = Scenes("bench", self.num)
        sides = {
            "picture and graph": lambda: [source.scene(k) for k in range(self.num)],
            "with caption and boxes (Record)": lambda: [source.read(k) for k in range(self.num)],
        }
        costs = interleave(sides, self.rounds)
        rows = [
            Row(name, "scenes/s", self.num / cost, (">=", 2000)) for name, cost in costs.items()
        ]
        return Findings(rows, [f"{self.num} scenes a round"])


@dataclass(frozen=True)
class RetrievalBench(Bench):
    """Ranks of both directions against the matrix product of the same blocks, on the CPU in fp32;
    and the memory that they take beyond the features."""

    images: int = 100_000
    """Pictures."""
    captions: int = 5
    """Captions of each."""
    width: int = 512
    """Of the features."""
    share: int = 6
    """Timed are 1/6 of the pictures and of the captions, which has a larger part of its blocks on
    the diagonal, where right answers are looked up first. 1 times all: an hour on one core."""

    def run(self) -> Findings:
        import torch

        from superclip.ops.retrieval import CPU_BLOCK, ranks

        # First of all, before anything that was freed could hide it.
        width = self.width if self.share == 1 else 8
        images, texts, pairs = alike_features(self.images, self.captions, width)
        before = resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        ranks(images, texts, pairs)
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        taken = int(peak[1]) * 1024 / 1e6 - before
        notes = [
            f"peak memory beyond the features {taken:.0f} MB, {len(images)} pictures x "
            f"{len(texts)} captions, {width}-d (target: under 2147; a wider feature adds "
            f"{12 * CPU_BLOCK / 1e6:.3f} MB a channel, for blocks of {CPU_BLOCK})"
        ]
        if self.share > 1:
            images, texts, pairs = alike_features(
                max(1, self.images // self.share), self.captions, self.width
            )
        notes.append(
            f"timed: {len(images)} pictures x {len(texts)} captions, {self.width}-d, fp32; "
            "matrix product: every block of the similarity matrix, into one buffer"
        )
        block = torch.empty(min(CPU_BLOCK, len(images)) * min(CPU_BLOCK, len(texts)))

        def product() -> None:
            for columns in texts.split(CPU_BLOCK):
                for rows in images.split(CPU_BLOCK):
                    out = block[: len(rows) * len(columns)].view(len(rows), len(columns))
                    torch.mm(rows, columns.T, out=out)

        sides = {"matrix product": product, "ranks": lambda: ranks(images, texts, pairs)}
        costs = interleave(sides, self.rounds)
        work = 2e-9 * len(images) * len(texts) * self.width
        plain, ours = costs.values()
        rate = Row("rate of ranks / of the matrix product", "ratio", plain / ours, (">=", 0.7))
        return Findings(
            [rate, *(Row(f"  {k}", "GFLOP/s", work / c) for k, c in costs.items())], notes
        )


def alike_features(
    images: int, captions: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of pictures and captions, and their pairs; made in place. At 512 channels and
    40 000 captions the best right one ranks about 15th: the costly case, in which many are near the
    top ten."""
    import torch

    rng = torch.Generator().manual_seed(0)
    image, text = (
        torch.empty(n, width).normal_(generator=rng) for n in (images, images * captions)
    )
    image /= torch.linalg.vector_norm(image, dim=1, keepdim=True)
    text.view(images, captions, width).add_(image[:, None], alpha=0.12 * width**0.5)
    text /= torch.linalg.vector_norm(text, dim=1, keepdim=True)
    caption = torch.arange(len(text))
    return image, text, torch.stack([caption // captions, caption], 1)
