"""Loader, training step and feature extraction, against open_clip_train."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from benches.core import Bench, Findings, Row, interleave, peak_of, settle_on
from superclip.errors import UserError

if TYPE_CHECKING:  # threads are set before numpy and torch load
    from superclip.data.batch import Batch, Record
    from superclip.training.state import Run, TrainState


PHOTO = 640, 480
"""Pixels of a full-size photograph, COCO's commonest size."""


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


def our_run(setup: Setup, loss: str, **model: Any) -> tuple[Run, TrainState]:
    """A run of the trainer that never comes to an epoch's end, where it would evaluate and save."""
    from superclip.config import train_config
    from superclip.ops.world import World, choose_device
    from superclip.training.build import build_run, open_tracker

    values = {name: getattr(setup, name) for name in ("batch_size", "workers", "precision")}
    values |= {"train_data": setup.shards or "scenes", "val_data": "scenes"}
    values |= {"out": str(setup.folder / f"{loss}-{Path(setup.model).stem}"), "log_every": 1000}
    config = train_config(values | {"loss": loss, "model": {"model": setup.model} | model})
    run, state = build_run(config, World(device=choose_device(setup.device)), [])
    state.model.train()
    plan = dataclasses.replace(run.plan, steps_per_epoch=1 << 40)
    return open_tracker(dataclasses.replace(run, plan=plan), state), state


def our_batches(run: Run, start: int, steps: int) -> Iterator[tuple[Batch, Counter[str]]]:
    """What the trainer reads for these steps, on its device; captions are tokenised anew."""
    from superclip.data.loader import StepSampler, train_batches
    from superclip.training.loop import on_device

    run.rows.make.tokenize.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
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
