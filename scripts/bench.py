"""Speed and memory of sweep, training, loader and scenes, as ratios measured in one run.

All sides of a comparison run interleaved, round by round in alternating order, after one untimed
pass each, so that a busy machine slows all. Printed are medians over the rounds with their range,
of wall and of CPU time (all threads of this process; reader processes aside). A target is compared
with the medians and never fails the command.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import logging
import operator
import os
import platform
import re
import runpy
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from superclip.errors import UserError, run_command
from superclip.flags import parse

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import numpy as np
    import torch

    from superclip.data.batch import Batch, Record
    from superclip.training.state import Run, TrainState

NAIVE_METRICS = Path(__file__).parents[1] / "tests" / "reference" / "metrics.py"
PHOTO = 640, 480
"""Pixels of a full-size photograph, COCO's commonest size."""
WAYS = "vectorised", "by loops"
CLOCKS = "wall", "cpu"
"""Columns of a series: `[rounds, 2]` seconds, or anything derived from them."""


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """Series in seconds of every side; the order of the sides turns around each round.

    Args:
        settle: waits for what a side has only queued, on a GPU.
    """
    import numpy as np

    print("one untimed pass of each side", file=sys.stderr, flush=True)
    for side in sides.values():  # allocations, caches, optimizer state
        side()
    settle()
    costs = {name: np.zeros((rounds, 2)) for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter(), time.process_time()
            sides[name]()
            settle()
            costs[name][number] = time.perf_counter() - began[0], time.process_time() - began[1]
        told = ", ".join(f"{name} {cost[number, 0]:.3g} s" for name, cost in costs.items())
        print(f"round {number + 1}/{rounds}: {told}", file=sys.stderr, flush=True)
    return costs


@dataclass(frozen=True)
class Row:
    """One line of a table: a series with its unit, and the target its median should meet."""

    label: str
    unit: str
    series: np.ndarray
    target: tuple[str, float] | None = None

    def spread(self, clock: str) -> tuple[float, float, float]:
        """Median, least and largest of `wall` or `cpu` over the rounds."""
        values = self.series[:, CLOCKS.index(clock)].tolist()
        return statistics.median(values), min(values), max(values)

    @property
    def verdict(self) -> str:
        """Target and what the medians say; empty without a target."""
        if self.target is None:
            return ""
        sign, limit = self.target
        meets = {"<=": operator.le, ">=": operator.ge}[sign]
        wall, cpu = ("met" if meets(self.spread(c)[0], limit) else "missed" for c in CLOCKS)
        return f"{sign} {limit:g} {wall if wall == cpu else f'{wall} by wall, {cpu} by CPU'}"

    def __str__(self) -> str:
        wall, cpu = ("{:>9.4g} [{:.4g}, {:.4g}]".format(*self.spread(c)) for c in CLOCKS)
        return f"{self.label:<44}{self.unit:<12}{wall:<31}{cpu:<31}{self.verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        told = {c: dict(zip(("median", "min", "max"), self.spread(c))) for c in CLOCKS}
        rounds = [dict(zip(CLOCKS, costs)) for costs in self.series.tolist()]
        return {
            "label": self.label,
            "unit": self.unit,
            "verdict": self.verdict,
            "rounds": rounds,
        } | told


class Findings(NamedTuple):
    """What a bench found: rows of the table, and lines that are no times."""

    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Bench(ABC):
    rounds: int = 5
    """Timed rounds of every side."""
    threads: int | None = 1
    """CPU threads; one makes a rate a rate per core. None: torch's choice, or OMP_NUM_THREADS."""
    out: Path | None = None
    """JSON file for everything printed and every round."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "workers" else 1
            if type(value) is int and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if self.out is not None and not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}")

    @abstractmethod
    def run(self) -> Findings: ...


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
        return [collect._boxes_on_grid(record, preprocess, grid) for record in records]

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


def tiny_model(folder: Path, size: int) -> str:
    """File with a model that costs next to nothing beside reading its pictures."""
    path, tower = folder / f"tiny-vit-{size}.json", {"width": 8, "layers": 1}
    vision = tower | {"image_size": size, "patch_size": size // 4, "head_width": 8}
    text = tower | {"context_length": 77, "vocab_size": 49408, "heads": 1}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def write_shards(folder: Path, pattern: str | None, num: int, shards: int = 1) -> tuple[str, str]:
    """The first pictures of shards (default: synthetic photographs) as KEY.jpg and KEY.txt in new
    shards, a form that both trainers read: their pattern, and what they are."""
    from webdataset.writer import TarWriter

    from superclip.data.shards import Shards

    read, held = photograph, num
    if pattern is not None:
        source = Shards(pattern)
        read, held = source.read, source.num_images
    if held < num:
        raise UserError(f"--num {num}: {pattern} holds only {held} pictures")
    paths = [folder / f"bench-{k:03d}.tar" for k in range(shards)]
    for k, path in enumerate(paths):
        with TarWriter(str(path), encoder=False) as tar:
            for row in range(k, num, shards):
                record = read(row)
                text = record.captions[0].encode()
                tar.write({"__key__": f"{row:06d}", "jpg": record.picture, "txt": text})
    size = sum(path.stat().st_size for path in paths) / num / 1e3
    what = pattern or f"synthetic {PHOTO[0]}x{PHOTO[1]} photographs"
    return (
        f"{folder}/bench-{{000..{shards - 1:03d}}}.tar",
        f"{num} pictures ({what}, {size:.0f} kB each)",
    )


@dataclass(frozen=True)
class Setup:
    """What two trainers are given alike; `steps` are those of a pass, without `shards` only the
    model matters."""

    folder: Path
    model: str
    batch_size: int
    steps: int = 1
    shards: str | None = None
    workers: int = 0
    precision: str = "fp32"
    device: str = "cpu"


class Feed:
    """Batches for one pass after another.

    Attributes:
        num_batches, num_samples: of a pass; open_clip_train reads them.
        waits: seconds for which batches were waited for, one a pass.
    """

    def __init__(self, batches: Callable[[], Iterable[Any]], setup: Setup):
        self.batches, self.num_batches = batches, setup.steps
        self.num_samples = setup.steps * setup.batch_size
        self.waits: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        source, waited, count = iter(self.batches()), 0.0, -1
        batch: Any = self
        while batch is not None:
            began, count = time.perf_counter(), count + 1
            batch = next(source, None)
            waited += time.perf_counter() - began
            if batch is not None:
                yield batch
        assert count == self.num_batches, f"{count} of {self.num_batches} batches came"
        self.waits.append(waited)


class Peer:
    """open_clip_train as its `main` puts it together: arguments, model, readers, loss, AdamW,
    schedule and loop are its own.

    One thing is changed. Under webdataset 1.0 its training reader takes the mark at a shard's end
    for a file (KeyError 'fname'), so the mark is switched off.
    """

    def __init__(self, setup: Setup):
        import open_clip
        import torch
        from open_clip_train import data, params, scheduler
        from webdataset.tariterators import tar_file_expander

        from superclip.model.factory import model_config

        data.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
        name, device, precision = Path(setup.model).stem, setup.device, setup.precision
        if name not in open_clip.list_models():
            path = setup.folder / f"{name}.json"
            path.write_text(json.dumps(model_config(setup.model)))
            open_clip.add_model_config(path)
        flags = f"--model {name} --batch-size {setup.batch_size} --workers {setup.workers} "
        flags += f"--precision {precision} --train-num-samples {setup.steps * setup.batch_size} "
        flags += f"--grad-clip-norm 1 --train-data {setup.shards or 'none.tar'}"
        args = self.args = params.parse_args(flags.split())
        alone = {"rank": 0, "world_size": 1, "distributed": False, "distill": False}
        vars(args).update(alone, device=device, wandb=False)
        if device.startswith("cuda"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
        self.model, transform, _ = open_clip.create_model_and_transforms(
            name, precision=precision, device=device, output_dict=True
        )
        sets = data.get_data(args, (transform, None), tokenizer=open_clip.get_tokenizer(name))
        self.data, self.loss, self.epoch = sets["train"], open_clip.create_loss(args), 0
        groups: tuple[list[Any], list[Any]] = [], []
        for key, p in self.model.named_parameters():
            plain = p.ndim < 2 or any(part in key for part in ("bn", "ln", "bias", "logit_scale"))
            groups[not plain].append(p)
        decays = [{"params": groups[k], "weight_decay": args.wd * k} for k in (0, 1)]
        betas = args.beta1, args.beta2
        self.optimizer = torch.optim.AdamW(decays, lr=args.lr, betas=betas, eps=args.eps)
        self.schedule = scheduler.cosine_lr(self.optimizer, args.lr, args.warmup, 1 << 40)
        self.scaler = torch.amp.GradScaler(device) if precision == "amp" else None

    def train(self, feed: Feed) -> None:
        """Its loop over one pass of `feed`."""
        from open_clip_train.train import train_one_epoch

        data = {"train": SimpleNamespace(dataloader=feed, set_epoch=self.data.set_epoch)}
        parts = self.loss, self.epoch, self.optimizer, self.scaler, self.schedule
        train_one_epoch(self.model, data, *parts, None, self.args)
        self.epoch += 1


def our_run(setup: Setup, loss: str) -> tuple[Run, TrainState]:
    """A run of the trainer that never comes to an epoch's end, where it would evaluate and save."""
    from superclip.config import train_config
    from superclip.ops.world import World, choose_device
    from superclip.training.build import build_run, open_tracker

    values = {name: getattr(setup, name) for name in ("batch_size", "workers", "precision")}
    values |= {"train_data": setup.shards or "scenes", "val_data": "scenes"}
    values |= {"out": str(setup.folder / f"{loss}-{Path(setup.model).stem}"), "log_every": 1000}
    config = train_config(values | {"loss": loss, "model": {"model": setup.model}})
    run, state = build_run(config, World(device=choose_device(setup.device)), [])
    state.model.train()
    plan = dataclasses.replace(run.plan, steps_per_epoch=1 << 40)
    return open_tracker(dataclasses.replace(run, plan=plan), state), state


def our_batches(run: Run, start: int, steps: int) -> Iterator[tuple[Batch, Counter[str]]]:
    """What the trainer reads for these steps, on its device; captions are tokenised anew."""
    from superclip.data.loader import StepSampler, train_batches
    from superclip.training.loop import on_device

    run.rows.tokenize.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    device, data = run.world.device, run.config.data
    sampler = StepSampler(run.order, start, start + steps, run.plan.global_batch, 0, 1)
    pin, patience = device.type == "cuda", data.reader_timeout
    return on_device(train_batches(run.rows, sampler, data.workers, pin, patience), device)


@dataclass(frozen=True)
class PhotoBench(Bench):
    shards: str | None = None
    """Tar shards of photographs. Default: synthetic photographs."""
    num: int = 512
    """Photographs of a pass, the first ones of the shards."""
    batch_size: int = 64
    """Photographs of a batch; must divide --num."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = self.batch_size * max(1, getattr(self, "workers", 1))
        if self.num % unit:
            each = "" if unit == self.batch_size else " for each reader"
            raise UserError(
                f"--num {self.num} is no multiple of --batch-size {self.batch_size}{each}"
            )

    @property
    def steps(self) -> int:
        return self.num // self.batch_size


@dataclass(frozen=True)
class LoaderBench(PhotoBench):
    """Training pictures per second and core, from a tar shard, against open_clip_train's loader."""

    def run(self) -> Findings:
        from PIL import Image

        from superclip.data.shards import Shards

        def decode() -> None:
            for row in range(self.num):
                image = Image.open(io.BytesIO(source.read(row).picture))  # pyright: ignore
                image.draft("RGB", (224, 224))
                image.load()

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards, told = write_shards(folder, self.shards, self.num)
            source = Shards(shards)
            setup = Setup(folder, tiny_model(folder, 224), self.batch_size, self.steps, shards)
            peer, (run, _) = Peer(setup), our_run(setup, "clip")
            ours = Feed(lambda: our_batches(run, 0, self.steps), setup)
            theirs = Feed(lambda: peer.data.dataloader, setup)
            sides = {
                "ours": lambda: sum(1 for _ in ours),
                "open_clip_train": lambda: sum(1 for _ in theirs),
                "reading and decoding alone": decode,
            }
            costs = interleave(sides, self.rounds)
        rates = {side: self.num / cost for side, cost in costs.items()}
        faster = rates["ours"] / rates["open_clip_train"]
        notes = [
            f"{told} a round, batch {self.batch_size}, one process",
            "both: read, decode, random resized crop (0.9, 1.0) to 224 px bicubic, tokenise",
            "ours ends in uint8 and lets the JPEG decoder reduce; open_clip_train decodes in full "
            "and ends in normalised float; decoding alone is at the scale that suffices for 224 px",
        ]
        rows = [Row(f"  {side}", "pictures/s", rate) for side, rate in rates.items()]
        return Findings([Row("ours / open_clip_train", "ratio", faster, (">=", 2)), *rows], notes)


@dataclass(frozen=True)
class TrainBench(PhotoBench):
    """The real loops of both trainers: steps on a batch that is already there, and a tiny tower on
    full-size photographs, where reading is the limit."""

    model: str = "ViT-B-32"
    """Model of the steps on one batch."""
    step_batch_size: int = 16
    """Pairs of such a step."""
    reads: bool = True
    """Train from photographs, too."""
    reader_model: str | None = None
    """Model that is trained from photographs. Default: a tiny one."""
    workers: int = 0
    """Reader processes; 0 reads in the training process."""
    precision: Literal["fp32", "amp", "amp_bf16"] = "fp32"
    """Of all sides."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        from superclip.ops.world import choose_device

        device = str(choose_device(self.device))
        common: Any = {"precision": self.precision, "device": device}
        notes = [
            "all: forward, loss, backward, gradient norm clipped at 1, AdamW, in their own loops; "
            f"{self.precision}, {self.workers} reader processes, whose CPU time is left out"
        ]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            setups = [Setup(folder, self.model, self.step_batch_size, **common)]
            if self.reads:
                shards, told = write_shards(folder, self.shards, self.num, max(1, self.workers))
                model = self.reader_model or tiny_model(folder, 224)
                setups.append(
                    Setup(
                        folder, model, self.batch_size, self.steps, shards, self.workers, **common
                    )
                )
                notes.append(f"{told} a round")
            found = [self._compare(setup) for setup in setups]
        rows, more = ([*itertools.chain(*parts)] for parts in zip(*found))
        return Findings(rows, notes + more)

    def _compare(self, setup: Setup) -> tuple[list[Row], list[str]]:
        """open_clip_train against ours with either loss, from a shard or on one batch."""
        from superclip.training.loop import fit

        peer, runs = Peer(setup), {loss: our_run(setup, loss) for loss in ("clip", "superclip")}
        run, state = runs["clip"]
        theirs: Any = peer.data.dataloader
        fixed = [] if setup.shards else [next(our_batches(run, 0, 1))]
        if fixed:
            theirs = [(state.model.normalise(b.images), b.tokens) for b, _ in fixed]
        feeds = {"open_clip_train": Feed(lambda: theirs, setup)}
        sides: dict[str, Callable[[], object]] = {
            "open_clip_train": lambda: peer.train(feeds["open_clip_train"])
        }
        for loss, (ours, at) in runs.items():

            def batches(ours: Run = ours, at: TrainState = at) -> Iterable[Any]:
                return our_batches(ours, at.step, setup.steps) if setup.shards else fixed

            feeds[f"ours, {loss}"] = feed = Feed(batches, setup)
            sides[f"ours, {loss}"] = functools.partial(fit, ours, at, feed)
        peaks: dict[str, list[float]] = {name: [] for name in sides}
        if setup.device.startswith("cuda"):
            sides = {n: functools.partial(peak_of, side, peaks[n]) for n, side in sides.items()}
        costs = interleave(sides, self.rounds, settle_on(run.world.device))
        rates = {name: setup.steps * setup.batch_size / cost for name, cost in costs.items()}
        other, clip, superclip = rates.values()
        name = f"{Path(setup.model).stem}, {'photographs' if setup.shards else 'steps'}"
        least, most = 2 if setup.shards else 1, None if self.reads else ("<=", 1.1)
        pixels, notes = run.preprocess.size, []
        for side, cost in costs.items():
            waiting = statistics.median(feeds[side].waits[1:] / cost[:, 0])
            note = f"{name} ({setup.steps} x {setup.batch_size} pairs, {pixels} px), {side}: "
            notes.append(note + f"{waiting:.1%} of the wall time waiting for data")
            if (flops := run.tracker.flops) is not None:
                use = statistics.median(rates[side][:, 0]) * flops[1] / flops[0]
                peak = statistics.median(peaks[side]) / 1e9
                notes[-1] += (
                    f"; {use:.1%} of the GPU's peak; {peak:.2f} GB beyond what lives always"
                )
        return [
            Row(f"{name}: ours / open_clip_train", "ratio", clip / other, (">=", least)),
            Row("  SuperCLIP's time / CLIP's", "ratio", clip / superclip, most),
            *(Row(f"  {side}", "pairs/s", rate) for side, rate in rates.items()),
        ], notes


TOKEN_LOSS = TrainBench(reads=False, step_batch_size=64)
"""SuperCLIP's step against CLIP's."""


def peak_of(side: Callable[[], object], peaks: list[float]) -> None:
    """Run a side; note its peak of GPU memory beyond what lived before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    peaks.append(torch.cuda.max_memory_allocated() - before)


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

        from superclip.config import LOSS_OPTIONS
        from superclip.data.batch import Batch
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


def allocated(side: Callable[[], object], device: torch.device) -> float:
    """Bytes that live at a side's peak beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        peaks: list[float] = []
        peak_of(side, peaks)
        return peaks[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        side()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found: list[Any] = record.profiler.kineto_results.events()
    events = [event for event in found if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return float(max(itertools.accumulate(event.nbytes() for event in events)))


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

    from superclip.config import LOSS_OPTIONS
    from superclip.data.batch import Batch
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


def resident() -> float:
    """MB of memory of this process and its readers (Linux); what they share counts in each."""
    from multiprocessing import active_children

    pids = [os.getpid(), *(child.pid for child in active_children())]
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


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
class FeaturesBench(PhotoBench):
    """Encoding held-out photographs against the plain forward pass fed by the same loader."""

    model: str = "ViT-S-32"
    """An open_clip model name, or a JSON file."""

    def run(self) -> Findings:
        import numpy as np
        import torch
        from torch.utils.data import DataLoader

        from superclip.data.loader import EvalRows, tokenizer_for
        from superclip.data.shards import Shards
        from superclip.evaluation.encode import Encoder
        from superclip.model.factory import build_clip, model_config, preprocess_for, tokenizer
        from superclip.model.superclip import SuperCLIP

        config = model_config(self.model)
        preprocess = preprocess_for(config, "crop")
        model = SuperCLIP(build_clip(config), preprocess.mean, preprocess.std).eval()
        tokenize = tokenizer_for(tokenizer(config))
        encoder = Encoder(preprocess, tokenize, torch.device("cpu"), batch_size=self.batch_size)
        with tempfile.TemporaryDirectory() as name:
            shards, told = write_shards(Path(name), self.shards, self.num)
            source = Shards(shards)

            def plain() -> None:
                loader = DataLoader(
                    EvalRows(source, preprocess, range(self.num)),
                    self.batch_size,
                    collate_fn=lambda items: np.stack([pixels for pixels, _ in items]),
                )
                with torch.no_grad():
                    torch.cat([model.encode_image(torch.from_numpy(b)) for b in loader])

            sides = {
                "loader and forward": plain,
                "encoder": lambda: encoder.pictures(model, source, range(self.num)),
            }
            costs = interleave(sides, self.rounds)
        loss = costs["encoder"] / costs["loader and forward"]
        rows = [Row(f"  {side}", "pictures/s", self.num / cost) for side, cost in costs.items()]
        notes = [f"{told} a round, {self.model} in fp32, batch {self.batch_size}, one process"]
        return Findings(
            [Row("time of encoder / loader and forward", "ratio", loss, ("<=", 1.05)), *rows], notes
        )


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


def photograph(row: int) -> Record:
    """A JPEG of noise in four octaves, about as many bytes as a photograph, with COCO-like boxes
    and a short caption; a pure function of `row`."""
    import numpy as np
    from PIL import Image

    from superclip.data.batch import Boxes, Record
    from superclip.data.scenes import Scenes

    rng, buffer = np.random.Generator(np.random.Philox(key=row)), io.BytesIO()
    picture = Image.new("RGB", PHOTO)
    for cells, share in ((4, 1.0), (16, 0.4), (64, 0.25), (320, 0.15)):
        noise = rng.integers(0, 256, (cells * 3 // 4, cells, 3), np.uint8)
        octave = Image.fromarray(noise).resize(PHOTO, Image.Resampling.BICUBIC)
        picture = Image.blend(picture, octave, share)
    picture.save(buffer, "JPEG", quality=90)
    count = 1 + int(rng.poisson(6))
    sides = np.exp(rng.uniform(np.log(0.04), np.log(0.9), (count, 2)))
    corner = rng.random((count, 2)) * (1 - sides)
    xywh = (np.concatenate([corner, sides], axis=1) * (*PHOTO, *PHOTO)).astype(np.float32)
    categories = tuple(map(str, rng.integers(80, size=count)))
    boxes = Boxes(xywh, categories, np.zeros(count, bool))
    caption = Scenes("bench", row + 1).scene(row).caption
    return Record(row, str(row), *PHOTO, buffer.getvalue(), (caption,), (row,), boxes)


def settle_on(device: torch.device) -> Callable[[], object]:
    """Waits for the device's queue; nothing to wait for on the CPU."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def machine() -> dict[str, Any]:
    """The hardware and versions behind a number."""
    import torch

    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.is_file() else "")
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("torch", "open_clip_torch", "numpy", "pillow")},
    }


def main(argv: list[str]) -> None:
    """Parse, measure, print; write the JSON that was asked for."""
    benches = (
        Annotated[SweepBench, tyro.conf.subcommand("sweep")]
        | Annotated[AblateBench, tyro.conf.subcommand("ablate")]
        | Annotated[TrainBench, tyro.conf.subcommand("train")]
        | Annotated[TrainBench, tyro.conf.subcommand("token-loss", default=TOKEN_LOSS)]
        | Annotated[LossesBench, tyro.conf.subcommand("losses")]
        | Annotated[CommBench, tyro.conf.subcommand("comm")]
        | Annotated[MemoryBench, tyro.conf.subcommand("memory")]
        | Annotated[LoaderBench, tyro.conf.subcommand("loader")]
        | Annotated[FeaturesBench, tyro.conf.subcommand("features")]
        | Annotated[ScenesBench, tyro.conf.subcommand("scenes")]
        | Annotated[RetrievalBench, tyro.conf.subcommand("retrieval")]
    )
    bench: Bench = parse(benches, argv, "python scripts/bench.py", __doc__ or "")
    if bench.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(bench.threads)  # numpy's, read when it loads
        import torch

        torch.set_num_threads(bench.threads)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip reports every construction there
    before, found = os.getloadavg(), bench.run()
    facts, after = machine(), os.getloadavg()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores, GPU {facts['gpu']}; {versions}")
    print(
        f"{facts['threads']} threads; {bench.rounds} rounds, interleaved; load average "
        f"{before[0]:.1f} before, {after[0]:.1f} after"
    )
    print(*found.notes, sep="\n")
    if found.rows:
        print(f"\n{'':<44}{'':<12}{'wall: median [min, max]':>23}{'CPU: median [min, max]':>31}")
        print(*found.rows, sep="\n")
    if bench.out is not None:
        config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(bench).items()}
        report = {
            "bench": config,
            "machine": facts,
            "load_average": [before, after],
            "notes": found.notes,
            "rows": [row.to_dict() for row in found.rows],
        }
        bench.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
