"""The sweep and the ablations against plain forwards and loops."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benches.core import Bench, Findings, Row, interleave, settle_on
from benches.trainers import PHOTO, photograph

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import numpy as np
    import torch


NAIVE_METRICS = Path(__file__).parents[2] / "tests" / "reference" / "metrics.py"
WAYS = "vectorised", "by loops"


@dataclass(frozen=True)
class SweepBench(Bench):
    """A sweep's cost per picture (decoding and untrained towers aside) against the plain tower, in
    fp32; and its metrics against Python loops over heads and cells."""

    threads: int | None = None
    """CPU threads. Default: torch's own choice, or OMP_NUM_THREADS."""
    model: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    """Names of models, taken with random weights."""
    batch_size: int = 16
    """Pictures of a forward pass."""
    stratum: int = 64
    """Pictures that are scored together: the own prior compares each with all of its stratum."""
    looped: int = 4
    """Pictures of the comparison with Python loops, on both of its sides."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        notes = [
            f"random weights, synthetic {PHOTO[0]}x{PHOTO[1]} pictures with COCO-like boxes, fp32, "
            f"batch {self.batch_size}, scored in strata of {self.stratum}",
            "sweep = the last five of its rows; plain forward = open_clip's visual(images) on "
            "normalised images under no_grad",
            f"loops: tests/reference/metrics.py on lists, {self.looped} pictures, all heads, the "
            "same pictures on both sides; its AUROC is quadratic in the cells",
        ]
        return Findings([row for name in self.model for row in self._rows(name)], notes)

    def _rows(self, name: str) -> list[Row]:
        import numpy as np

        from superclip.ops.world import choose_device

        device = choose_device(self.device)
        sides, scored = sweep_parts(name, self.batch_size, self.stratum, device)
        costs = interleave(sides, self.rounds, settle_on(device))
        counts = dict.fromkeys(sides, self.batch_size) | {"metrics": self.stratum}
        costs = {part: 1e3 * cost / counts[part] for part, cost in costs.items()}
        plain, *parts = costs.values()
        sweep = np.sum(parts, 0)
        metrics = scorers(*(array[: self.looped] for array in scored))
        sides = {f"{m} {k}": side for m, pair in metrics.items() for k, side in zip(WAYS, pair)}
        scoring = interleave(sides, self.rounds)

        def faster(*chosen: str) -> np.ndarray:
            fast, slow = (sum(scoring[f"{m} {k}"] for m in chosen) for k in WAYS)
            return np.divide(slow, fast)

        linear = [metric for metric in metrics if metric != "patch_auroc"]
        return [
            Row(f"{name}: sweep / plain forward", "ratio", sweep / plain, ("<=", 1.5)),
            Row("  sweep", "ms/picture", sweep),
            *(Row(f"  {part}", "ms/picture", cost) for part, cost in costs.items()),
            Row(f"{name}: scoring, loops / ours", "ratio", faster(*metrics), (">=", 20)),
            Row("  without patch_auroc", "ratio", faster(*linear), (">=", 20)),
            *(Row(f"  {metric}", "ratio", faster(metric)) for metric in metrics),
        ]


def sweep_parts(
    name: str, batch_size: int, together: int, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], tuple[np.ndarray, ...]]:
    """The plain forward of one batch and the sweep's own parts, by name; and what is scored.

    Returns:
        Sides, all of them over `batch_size` pictures but "metrics", over `together`; maps,
        coverage, valid and pointing hits of those, one batch repeated.
    """
    import numpy as np
    import torch

    from interp import collect
    from interp.hooked import HookedVisionTransformer
    from superclip.data.geometry import render
    from superclip.model.factory import build_clip, model_config, preprocess_for
    from superclip.model.superclip import SuperCLIP

    architecture = model_config(name)
    preprocess, clip = preprocess_for(architecture, "crop"), build_clip(architecture)
    model = SuperCLIP(clip, preprocess.mean, preprocess.std).to(device).eval()
    tower = HookedVisionTransformer(clip.visual)
    grid = tower.cfg.grid
    records = list(map(photograph, range(batch_size)))
    pixels = np.stack([render(r.picture, preprocess.geometry(r)) for r in records])

    def normalised() -> torch.Tensor:
        return model.normalise(torch.from_numpy(pixels).to(device))

    images = normalised()

    @torch.no_grad()
    def plain() -> None:
        clip.visual(images)

    def checks() -> None:
        for picture, record in zip(pixels, records):
            collect._has_target(record, preprocess)
            collect._picture_hash(picture)

    def boxes() -> list[tuple[np.ndarray, ...]]:
        for record in records:
            collect._categories_on_grid(record, preprocess, grid)
        return [collect.boxes_on_grid(record, preprocess, grid) for record in records]

    repeated = np.arange(together) % batch_size
    coverage, valid, _, hits = (np.stack(part).astype(np.float32) for part in zip(*boxes()))
    maps = collect.attention_maps(tower, images, "class")[0]
    maps, coverage, valid, hits = (a[repeated] for a in (maps, coverage, valid, hits))
    stratum = np.zeros(len(maps), int)
    sides = {
        "plain forward": plain,
        "forward with attention rows": lambda: collect.attention_maps(tower, normalised(), "class"),
        "low-level saliency maps": lambda: [
            [saliency(p, grid) for saliency in collect.SALIENCY.values()] for p in pixels
        ],
        "checks for targets and copies": checks,
        "boxes on the patch grid": boxes,
        "metrics": lambda: collect._scores(maps, coverage, valid, hits, stratum),
    }
    return sides, (maps, coverage, valid, hits)


def scorers(
    maps: np.ndarray, coverage: np.ndarray, valid: np.ndarray, hits: np.ndarray
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Every metric of the same pictures, by `interp.grounding.metrics` and by naive loops."""
    import numpy as np

    from interp.grounding import metrics
    from interp.grounding.metrics import PairScores

    naive, stratum = runpy.run_path(str(NAIVE_METRICS)), [0] * len(maps)
    pictures = maps.reshape(len(maps), -1, maps.shape[-1]).tolist()
    m, w, hit = coverage.tolist(), valid.tolist(), hits.tolist()
    masks = maps, coverage, valid

    def looped(score: str, inside: list[list[float]] = m) -> Callable[[], object]:
        return lambda: [
            naive[score](a, *picture) for heads, *picture in zip(pictures, inside, w) for a in heads
        ]

    return {
        "in_box_mass": (lambda: metrics.in_box_mass(*masks), looped("score")),
        "excess": (
            lambda: metrics.excess(PairScores(*masks), np.array(stratum)),
            lambda: [naive["excess"](head, m, w, stratum) for head in zip(*pictures)],
        ),
        "patch_auroc": (lambda: metrics.patch_auroc(*masks), looped("auroc")),
        "normalised_mass": (lambda: metrics.normalised_mass(*masks), looped("normalised_mass")),
        "pointing": (lambda: metrics.pointing(maps, hits > 0, valid), looped("pointing", hit)),
    }


@dataclass(frozen=True)
class AblateBench(Bench):
    """The exact sweep over heads (`interp.causal.sweep`) against a loop that hooks one head at a
    time and runs the whole tower; direct effects and attribution of all heads against one plain
    forward; zero ablation, fp32, the same batch."""

    model: str = "ViT-B-32"
    """Name of a model, taken with random weights."""
    batch_size: int = 2
    """Images of a pass."""
    every: int = 1
    """Ablate each n-th head of a layer only; the intact pass then weighs n times as much."""
    max_memory: int = 1024
    """MiB of the sweep's activations."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        import torch

        from interp.causal.ablation import ablate
        from interp.causal.attribution import attribution
        from interp.causal.cost import flop_share
        from interp.causal.direct import cosines, direct_effects
        from interp.causal.sweep import ablate_batch
        from interp.causal.units import Ablation, every
        from interp.hooked import HookedVisionTransformer
        from superclip.model.factory import build_clip, model_config
        from superclip.ops.world import choose_device

        device = choose_device(self.device)
        clip = build_clip(model_config(self.model)).to(device).eval()
        tower = HookedVisionTransformer(clip.visual)
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, *tower.cfg.image_size, generator=rng).to(device)
        units = [u for u in every(tower.cfg, "head") if u.heads[0].index % self.every == 0]
        features: dict[str, torch.Tensor] = {}

        @torch.no_grad()
        def loop(tokens: str) -> None:
            found = []
            for unit in units:
                with ablate(tower, unit.heads, "zero", tokens=tokens):
                    found.append(tower(images).cpu())
            features[f"loop {tokens}"] = torch.stack(found)

        def sweep(tokens: str) -> None:
            memory = self.max_memory * 2**20
            found = ablate_batch(tower, images, Ablation("zero", tokens), units, max_memory=memory)
            features[f"sweep {tokens}"] = found.features[0]

        texts = torch.randn(1, tower.cfg.embed_dim, generator=rng).to(device)

        def metric(features: torch.Tensor) -> torch.Tensor:
            return cosines(features, texts)[:, 0]

        @torch.no_grad()
        def forward() -> None:
            clip.visual(images)

        sides = {
            "one head at a time": lambda: loop("all"),
            "sweep, all tokens": lambda: sweep("all"),
            "sweep, class token": lambda: sweep("class"),
            "plain forward": forward,
            "direct effects": lambda: direct_effects(tower, images, texts),
            "attribution": lambda: attribution(tower, images, metric, Ablation("zero")),
        }
        costs = interleave(sides, self.rounds, settle_on(device))
        loop("class")  # as costly as the other, and therefore not timed
        plain, everywhere, class_only, once, direct, attributed = costs.values()
        notes = [
            f"{self.model} with random weights, fp32, batch {self.batch_size}, {len(units)} heads, "
            f"{self.max_memory} MiB; timed: features of the batch without each head; the sweep's "
            "intact pass is counted"
        ]
        for tokens in ("all", "class"):
            ours, theirs = features[f"sweep {tokens}"], features[f"loop {tokens}"]
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            assert error <= 5e-5, f"the sides differ by {error:.1e} of the largest feature"
            notes.append(
                f"tokens {tokens}: operations {flop_share(tower.cfg, tokens):.3f} of the loop's, "
                f"the intact pass {1 / len(units):.3f} more; features differ by {error:.1e} of "
                "the largest"
            )
        return Findings(
            [
                Row("all tokens: sweep / loop", "ratio", everywhere / plain, ("<=", 0.45)),
                Row("class token: sweep / loop", "ratio", class_only / plain, ("<=", 0.25)),
                Row("direct effects / forward", "ratio", direct / once, ("<=", 1.3)),
                Row("attribution / forward", "ratio", attributed / once, ("<=", 4.0)),
                *(Row(f"  {k}", "images/s", self.batch_size / c) for k, c in costs.items()),
            ],
            notes,
        )
