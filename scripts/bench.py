"""Speed of the sweep, the token loss, the scenes and the loader, as ratios measured in one run.

Both sides of a ratio run interleaved, round by round in alternating order, after one untimed pass
each, so that a busy machine slows both. Printed are medians over the rounds with their range, of
wall and of CPU time (all threads of this process). A target is compared with the medians and never
fails the command.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from superclip.errors import UserError, run_command
from superclip.flags import parse

if TYPE_CHECKING:  # threads are set before numpy and torch load
    import numpy as np
    import torch

    from superclip.config import TrainConfig
    from superclip.data.batch import Batch, Record
    from superclip.training.state import Run, TrainState

NAIVE_METRICS = Path(__file__).parents[1] / "tests" / "reference" / "metrics.py"
PHOTO = 640, 480
"""Pixels of a full-size photograph, COCO's commonest size."""


class Cost(NamedTuple):
    """What one timed pass took in seconds, or anything derived from it for wall and CPU alike."""

    wall: float
    cpu: float


Series = Sequence[Cost]
"""One cost a round."""


def each(function: Callable[..., float], *series: Series) -> list[Cost]:
    """Apply `function` round by round, to wall and to CPU time."""
    return [Cost(*map(function, *costs)) for costs in zip(*series)]


def ratio(a: Series, b: Series) -> list[Cost]:
    """`a / b` round by round."""
    return each(operator.truediv, a, b)


def total(parts: Sequence[Series]) -> list[Cost]:
    """The sum of several sides, round by round."""
    return each(lambda *seconds: sum(seconds), *parts)


def interleave(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, list[Cost]]:
    """Seconds of every side in every round; the order of the sides turns around each round.

    Args:
        settle: waits for what a side has only queued, on a GPU.
    """
    print("one untimed pass of each side", file=sys.stderr, flush=True)
    for side in sides.values():  # allocations, caches, optimizer state
        side()
    settle()
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            settle()
            costs[name].append(Cost(time.perf_counter() - wall, time.process_time() - cpu))
        told = ", ".join(f"{name} {cost[-1].wall:.3g} s" for name, cost in costs.items())
        print(f"round {number + 1}/{rounds}: {told}", file=sys.stderr, flush=True)
    return costs


@dataclass(frozen=True)
class Row:
    """One line of a table: a series with its unit, and the target its median should meet."""

    label: str
    unit: str
    series: Series
    target: tuple[str, float] | None = None

    def spread(self, clock: str) -> tuple[float, float, float]:
        """Median, least and largest of `wall` or `cpu` over the rounds."""
        values = [getattr(cost, clock) for cost in self.series]
        return statistics.median(values), min(values), max(values)

    @property
    def verdict(self) -> str:
        """Target and what the medians say; empty without a target."""
        if self.target is None:
            return ""
        sign, limit = self.target
        meets = {"<=": operator.le, ">=": operator.ge}[sign]
        wall, cpu = ("met" if meets(self.spread(c)[0], limit) else "missed" for c in Cost._fields)
        return f"{sign} {limit:g} {wall if wall == cpu else f'{wall} by wall, {cpu} by CPU'}"

    def __str__(self) -> str:
        clocks = ("{:>9.4g} [{:.4g}, {:.4g}]".format(*self.spread(c)) for c in Cost._fields)
        wall, cpu = clocks
        return f"{self.label:<42}{self.unit:<12}{wall:<31}{cpu:<31}{self.verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        medians = {c: dict(zip(("median", "min", "max"), self.spread(c))) for c in Cost._fields}
        rounds = [cost._asdict() for cost in self.series]
        return {"label": self.label, "unit": self.unit, **medians, "verdict": self.verdict} | {
            "rounds": rounds
        }


@dataclass(frozen=True)
class Findings:
    """What a bench found: rows of the table, and lines that are no times."""

    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Bench(ABC):
    rounds: int = 5
    """Timed rounds of every side."""
    threads: int | None = None
    """CPU threads. Default: torch's own choice, or OMP_NUM_THREADS."""
    out: Path | None = None
    """JSON file for everything printed and every round."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.out is not None and not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}")

    @abstractmethod
    def run(self) -> Findings: ...


@dataclass(frozen=True)
class SweepBench(Bench):
    """A sweep's cost per picture (decoding and untrained towers aside) against the plain tower, in
    fp32; and its metrics against Python loops over heads and cells."""

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
        from superclip.ops.world import choose_device

        device = choose_device(self.device)
        sides, scored = sweep_parts(name, self.batch_size, self.stratum, device)
        costs = interleave(sides, self.rounds, settle_on(device))
        counts = dict.fromkeys(sides, self.batch_size) | {"metrics": self.stratum}
        costs = {k: each(lambda s, n=counts[k]: 1e3 * s / n, c) for k, c in costs.items()}
        plain, *parts = costs.values()
        sweep = total(parts)
        rows = [
            Row(f"{name}: sweep / plain forward", "ratio", ratio(sweep, plain), ("<=", 1.5)),
            Row("  sweep", "ms/picture", sweep),
            *(Row(f"  {part}", "ms/picture", cost) for part, cost in costs.items()),
        ]
        ours, loops = scorers(*(array[: self.looped] for array in scored))
        costs = interleave(ours | {f"{m} by loops": s for m, s in loops.items()}, self.rounds)

        def faster(*chosen: str) -> list[Cost]:
            slow, fast = ([costs[m + end] for m in chosen] for end in (" by loops", ""))
            return ratio(total(slow), total(fast))

        linear = [metric for metric in ours if metric != "patch_auroc"]
        return [
            *rows,
            Row(f"{name}: scoring, loops / ours", "ratio", faster(*ours), (">=", 20)),
            Row("  without patch_auroc", "ratio", faster(*linear), (">=", 20)),
            *(Row(f"  {metric}", "ratio", faster(metric)) for metric in ours),
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
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """Every metric of the same pictures by `interp.grounding.metrics`, and by naive loops."""
    import numpy as np

    from interp.grounding import metrics
    from interp.grounding.metrics import PairScores

    stratum = np.zeros(len(maps), int)
    ours = {
        "in_box_mass": lambda: metrics.in_box_mass(maps, coverage, valid),
        "excess": lambda: metrics.excess(PairScores(maps, coverage, valid), stratum),
        "patch_auroc": lambda: metrics.patch_auroc(maps, coverage, valid),
        "normalised_mass": lambda: metrics.normalised_mass(maps, coverage, valid),
        "pointing": lambda: metrics.pointing(maps, hits > 0, valid),
    }
    naive = runpy.run_path(str(NAIVE_METRICS))
    pictures = maps.reshape(len(maps), -1, maps.shape[-1]).tolist()
    m, w, hit = coverage.tolist(), valid.tolist(), hits.tolist()

    def looped(score: Callable[..., float], inside: list[list[float]]) -> Callable[[], object]:
        return lambda: [
            score(a, *picture) for heads, *picture in zip(pictures, inside, w) for a in heads
        ]

    loops = {
        "in_box_mass": looped(naive["score"], m),
        "excess": lambda: [naive["excess"](head, m, w, stratum) for head in zip(*pictures)],
        "patch_auroc": looped(naive["auroc"], m),
        "normalised_mass": looped(naive["normalised_mass"], m),
        "pointing": looped(naive["pointing"], hit),
    }
    return ours, loops


@dataclass(frozen=True)
class TokenLossBench(Bench):
    """An optimizer step of SuperCLIP against one of CLIP, and the memory of head and term."""

    model: str = "ViT-B-32"
    """Model of both sides."""
    batch_size: int = 64
    """Pairs of a step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> Findings:
        from superclip.ops.world import World, choose_device
        from superclip.training.build import build_run
        from superclip.training.step import train_step

        world = World(device=choose_device(self.device))
        with tempfile.TemporaryDirectory() as folder:
            clip, superclip = (
                build_run(self._config(loss, Path(folder) / loss), world, [])
                for loss in ("clip", "superclip")
            )
        batch = self._batch(clip[0])
        sides = {
            "CLIP step": lambda: train_step(clip[1], batch, clip[0]),
            "SuperCLIP step": lambda: train_step(superclip[1], batch, superclip[0]),
        }
        costs = interleave(sides, self.rounds, settle_on(world.device))
        slower = ratio(costs["SuperCLIP step"], costs["CLIP step"])
        rows = [Row(f"{self.model}: SuperCLIP / CLIP", "ratio", slower, ("<=", 1.1))]
        rows += [Row(f"  {name}", "s/step", cost) for name, cost in costs.items()]
        step = f"batch {self.batch_size}, {clip[0].preprocess.size} px, {clip[0].precision}"
        return Findings(rows, [step, *memory(*superclip, batch)])

    def _config(self, loss: str, out: Path) -> TrainConfig[Any]:
        from superclip.config import LOSS_OPTIONS, ModelConfig, OptimConfig, TrainConfig

        model, optim = ModelConfig(self.model), OptimConfig(batch_size=self.batch_size)
        return TrainConfig(LOSS_OPTIONS[loss](), loss, model=model, optim=optim, out=out)

    def _batch(self, run: Run) -> Batch:
        """Random pictures with captions of 5 to 15 random tokens."""
        import numpy as np
        import torch

        from superclip.data.batch import Batch
        from superclip.model.factory import special_ids, tokenizer

        rng = np.random.Generator(np.random.Philox(key=0))
        bpe, count, side = tokenizer(run.model_config), self.batch_size, run.preprocess.size
        _, start, end = special_ids(bpe)
        tokens = np.zeros((count, bpe.context_length), np.int64)
        for row in tokens:
            words = int(rng.integers(5, 16))
            row[: words + 2] = start, *rng.integers(256, start, words), end
        pixels = rng.integers(0, 256, (count, 3, side, side), np.uint8)
        ids = torch.arange(count)
        held = Batch(torch.from_numpy(pixels), torch.from_numpy(tokens), ids, ids)
        return held.to(run.world.device)


def memory(run: Run, state: TrainState, batch: Batch) -> list[str]:
    """What the token head and its term hold: counted, and on a GPU measured."""
    import torch

    from superclip.ops.tokens import ROW_CHUNK_ELEMENTS

    head = state.model.token_head
    assert head is not None
    columns, weights = head.linear.out_features, list(head.parameters())
    states = [t for p in weights for t in state.optimizer.state[p].values()]
    rows = min(len(batch), max(1, ROW_CHUNK_ELEMENTS // columns))
    held, half, moments, counts, logits, dense = (
        f"{count / 1e6:.1f} MB"
        for count in (
            sum(p.nbytes for p in weights),
            sum(p.nbytes for p in weights) / 2,
            sum(t.nbytes for t in states if isinstance(t, torch.Tensor)),
            sum(b.nbytes for b in state.loss.buffers()),
            4 * rows * columns,
            4 * len(batch) * columns,
        )
    )
    lines = [
        f"token head: parameters {held}, optimizer state {moments}, gradients {held}; loss buffers "
        f"{counts}",
        f"token term: fp32 logits of {rows} rows at once {logits}, and as much for their gradient; "
        f"a dense target, never built, would add {dense}",
    ]
    if run.precision != "fp32":
        lines.append(f"mixed precision: weights and gradients of the head in half too, {half} each")
    if run.world.device.type == "cuda":
        lines.append(f"token term, forward and backward, measured: {term_peak(run, state, batch)}")
    return lines


def term_peak(run: Run, state: TrainState, batch: Batch) -> str:
    """Peak memory of the token term on a GPU above what lives before it, head gradient included."""
    import torch

    from superclip.training.optim import autocast

    with autocast(run.precision, run.world.device):
        with torch.no_grad():
            out = state.model(batch.images, batch.tokens)
        hidden = out.token_hidden.detach().requires_grad_()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        terms = state.loss.row_terms(dataclasses.replace(out, token_hidden=hidden), batch)
    terms["token"].backward()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f} MB"


@dataclass(frozen=True)
class ScenesBench(Bench):
    """Generated scenes per second on one thread."""

    threads: int | None = 1
    """CPU threads (a scene is drawn by one)."""
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
            Row(name, "scenes/s", each(lambda s: self.num / s, cost), (">=", 2000))
            for name, cost in costs.items()
        ]
        return Findings(rows, [f"{self.num} scenes a round"])


@dataclass(frozen=True)
class LoaderBench(Bench):
    """Training pictures per second and core, from a tar shard, against open_clip_train's loader."""

    threads: int | None = 1
    """CPU threads; one makes a rate a rate per core."""
    shards: str | None = None
    """Tar shards of photographs. Default: synthetic photographs."""
    num: int = 512
    """Pictures of a pass, the first ones of the shards."""
    batch_size: int = 64
    """Pictures of a batch; must divide --num."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num % self.batch_size:
            raise UserError(f"--num {self.num} is no multiple of --batch-size {self.batch_size}")

    def run(self) -> Findings:
        import open_clip

        tokenizer = open_clip.SimpleTokenizer()
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "bench.tar"
            self._write(shard)
            sides = {
                "ours": self._ours(shard, tokenizer),
                "open_clip_train": self._theirs(shard, tokenizer),
            }
            size = shard.stat().st_size
            costs = interleave(sides, self.rounds)
        rates = {name: each(lambda s: self.num / s, cost) for name, cost in costs.items()}
        what = self.shards or f"synthetic {PHOTO[0]}x{PHOTO[1]} photographs"
        notes = [
            f"{self.num} pictures a round ({what}, {size / self.num / 1e3:.0f} kB each), batch "
            f"{self.batch_size}, one process",
            "both: read, decode, random resized crop (0.9, 1.0) to 224 px bicubic, tokenise",
            "ours ends in uint8 and lets the JPEG decoder reduce; open_clip_train decodes in full "
            "and ends in normalised float",
            f"open_clip_train {version('open_clip_torch')}: its validation reader with the training"
            f" transform, as its training reader fails under webdataset {version('webdataset')}",
        ]
        rows = [Row(f"  {name}", "pictures/s", rate) for name, rate in rates.items()]
        return Findings(
            [Row("ours / open_clip_train", "ratio", ratio(*rates.values())), *rows], notes
        )

    def _write(self, shard: Path) -> None:
        """Pictures as KEY.jpg and captions as KEY.txt, a form that both loaders read."""
        from webdataset.writer import TarWriter

        from superclip.data.shards import Shards

        read, held = photograph, self.num
        if self.shards is not None:
            source = Shards(self.shards)
            read, held = source.read, source.num_images
        if held < self.num:
            raise UserError(f"--num {self.num}: {self.shards} holds only {held} pictures")
        with TarWriter(str(shard), encoder=False) as tar:
            for row in range(self.num):
                record = read(row)
                text = record.captions[0].encode()
                tar.write({"__key__": f"{row:06d}", "jpg": record.picture, "txt": text})

    def _ours(self, shard: Path, tokenizer: Any) -> Callable[[], None]:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        from superclip.data import loader
        from superclip.data.order import Order
        from superclip.data.shards import Shards

        source = Shards(str(shard))
        order = Order(source.shard_sizes, seed=0)
        preprocess = loader.Preprocess(224, "crop", OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

        def ours() -> None:
            tokenize = loader.tokenizer_for(tokenizer)  # anew: it remembers captions
            rows = loader.TrainRows(source, preprocess, tokenize, 0, (0.9, 1.0))
            sampler = loader.StepSampler(order, 0, 0, self.batch_size, 0, 1)
            batches = loader.train_batches(rows, sampler, workers=0, pin=False)
            assert sum(len(batch) for batch, _ in batches) == self.num

        return ours

    def _theirs(self, shard: Path, tokenizer: Any) -> Callable[[], None]:
        """Under webdataset 1.0 `is_train=True` ends in a KeyError ('fname') at the end of a shard;
        all that it does more is to shuffle shards and still encoded samples."""
        from argparse import Namespace

        from open_clip import image_transform
        from open_clip_train.data import get_wds_dataset

        options = {"val_num_samples": self.num, "workers": 0, "batch_size": self.batch_size}
        args, transform = Namespace(val_data=str(shard), **options), image_transform(224, True)
        data = get_wds_dataset(args, transform, is_train=False, tokenizer=tokenizer)

        def theirs() -> None:
            assert sum(len(images) for images, _ in data.dataloader) == self.num

        return theirs


def photograph(row: int) -> Record:
    """A JPEG of noise in four octaves, about as many bytes as a photograph, with COCO-like boxes
    and a short caption; a pure function of `row`."""
    import io

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
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("torch", "open_clip_torch", "numpy", "pillow")},
    }


def main(argv: list[str]) -> None:
    """Parse, measure, print; write the JSON that was asked for."""
    benches = (
        Annotated[SweepBench, tyro.conf.subcommand("sweep")]
        | Annotated[TokenLossBench, tyro.conf.subcommand("token-loss")]
        | Annotated[ScenesBench, tyro.conf.subcommand("scenes")]
        | Annotated[LoaderBench, tyro.conf.subcommand("loader")]
    )
    bench: Bench = parse(benches, argv, "python scripts/bench.py", __doc__ or "")
    if bench.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(bench.threads)  # numpy's, read when it loads
        import torch

        torch.set_num_threads(bench.threads)
    before, found = os.getloadavg(), bench.run()
    facts, after = machine(), os.getloadavg()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores, GPU {facts['gpu']}; {versions}")
    print(
        f"{facts['threads']} threads; {bench.rounds} rounds, interleaved; load average "
        f"{before[0]:.1f} before, {after[0]:.1f} after"
    )
    print(*found.notes, sep="\n")
    print(f"\n{'':<42}{'':<12}{'wall: median [min, max]':>23}{'CPU: median [min, max]':>31}")
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
