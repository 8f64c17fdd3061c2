"""From a checked configuration to a run that can start or go on."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from superclip.config import SuperClipOptions, TrainConfig, differences, to_dict, train_config
from superclip.data.batch import Source
from superclip.data.loader import Tokenize, TrainRows, limited, tokenizer_for
from superclip.data.order import Order
from superclip.data.scenes import caption_vocabulary
from superclip.data.sources import held_out_spec, open_source
from superclip.errors import UserError
from superclip.losses import LOSSES, LossContext, build_loss
from superclip.model.factory import (
    activation_name,
    build_clip,
    load_pretrained,
    model_config,
    preprocess_for,
    special_ids,
    tokenizer,
)
from superclip.model.superclip import SuperCLIP, TokenHead
from superclip.model.weights import state_sha256
from superclip.ops.world import World
from superclip.training.evaluators import Encoder, Evaluator, Retrieval
from superclip.training.optim import adamw, concrete_precision
from superclip.training.state import Plan, Run, TrainState
from superclip.training.tracking import Tracker, open_mirror

SCENES_POOL = 500


def claim_directory(config: TrainConfig[Any], world: World) -> bool:
    """Make `--out` this run's own; True if the run in it is already finished.

    Raises:
        UserError: if another run stands there.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    record = out / "run.json"
    if record.exists():
        if config.overwrite:
            return False  # the old run goes once the new one is known to be buildable
        try:
            old = train_config(json.loads(record.read_text())["config"], str(record))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{record} can't be read ({error}); use another --out or --overwrite"
            ) from None
        found = differences(old, config)
        if found:
            raise UserError(
                f"{out} holds another run ({'; '.join(found[:3])}); use another --out, or "
                "--overwrite to delete it"
            )
        return zipfile.is_zipfile(out / "final_epoch.pt")
    strangers = [p.name for pattern in ("*.pt", "metrics.jsonl") for p in out.glob(pattern)]
    if strangers:
        raise UserError(f"{out} holds {strangers[0]} but no run.json; use another --out")
    return False


def _lock(out: Path) -> None:
    """Keep other processes off this run until this one ends, however it ends.

    Raises:
        UserError: if another process trains here.
    """
    descriptor = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)  # open until the process ends
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {out}; use another --out") from None


def _remove_run(out: Path) -> None:
    """Delete what a run writes, and nothing else that may lie in the folder."""
    if not (out / "run.json").exists():
        return
    for path in [
        *out.glob("*.pt"),
        *out.glob(".*.partial"),
        *out.glob("eval_*.json"),
        *(out / n for n in ("run.json", "metrics.jsonl")),
    ]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "sweep", ignore_errors=True)


def build_run(config: TrainConfig[Any], world: World, argv: list[str]) -> tuple[Run, TrainState]:
    """Data, model, loss and optimizer of a run; also writes `run.json` on the main rank.

    Raises:
        UserError: for anything in the configuration that the data or the model can't meet.
    """
    precision = concrete_precision(config.precision, world.device)
    config = dataclasses.replace(config, precision=precision)
    source = open_source(
        config.data.train_data, config.data.train_num_samples, config.data.data_seed
    )
    order = Order(
        limited(source.shard_sizes, config.data.train_num_samples, source.name), config.seed
    )
    global_batch = config.optim.batch_size * config.optim.accum_freq * world.size
    plan = Plan(
        order.steps_per_epoch(global_batch),
        config.epochs,
        config.log_every,
        config.save_every,
        config.save_frequency,
    )
    architecture = model_config(config.model.model)
    clip, tag = _initial_clip(config, architecture)
    preprocess = preprocess_for(architecture, config.data.resize, tag)
    bpe = tokenizer(architecture)
    tokenize = tokenizer_for(bpe)
    vocabulary = architecture["text_cfg"].get("vocab_size", 49408)
    head = _token_head(config, clip, architecture, vocabulary, source, order.num_rows, tokenize)
    context = LossContext(vocabulary, special_ids(bpe), None if head is None else _vocab_ids(head))
    facts = {
        "activation": activation_name(clip.visual),
        "init_sha256": state_sha256(clip.state_dict()),
        "data_sha256": source.digest,
        "data_name": source.name,
        "commit": commit(),
        "versions": {
            name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")
        },
        "world_size": world.size,
        "threads": torch.get_num_threads(),
    }
    model = SuperCLIP(clip, preprocess.mean, preprocess.std, head).to(world.device)
    if config.model.grad_checkpointing:
        clip.set_grad_checkpointing()
    ids = [world.device.index] if world.device.type == "cuda" else None
    forward: nn.Module = (
        DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        if world.size > 1
        else model
    )
    state = TrainState(
        model,
        forward,
        build_loss(config.loss, config.options, context).to(world.device),
        adamw(model, config.optim, config.lr),
        torch.amp.GradScaler(world.device.type, enabled=precision == "amp"),
    )
    evaluators = _evaluators(config, preprocess, tokenize, world, precision)
    directory = config.out
    rows = TrainRows(source, preprocess, tokenize, config.seed, config.data.crop_scale)
    run = Run(
        config,
        world,
        precision,
        plan,
        order,
        rows,
        preprocess,
        architecture,
        facts,
        directory,
        Tracker(None),
        evaluators,
    )
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        _lock(directory)
        if config.overwrite:
            _remove_run(directory)
        _write_record(run, argv)
    world.barrier()
    return run, state


def open_tracker(run: Run, state: TrainState) -> Run:
    """The run with its record opened at the state's step."""
    if not run.world.is_main:
        return run
    mirror = open_mirror(run.config.report_to, run.directory, to_dict(run.config))
    tracker = Tracker(run.directory / "metrics.jsonl", state.step, mirror)
    return dataclasses.replace(run, tracker=tracker)


def _initial_clip(
    config: TrainConfig[Any], architecture: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    if config.model.pretrained is None:
        return build_clip(architecture, config.seed, config.model.init_scale), {}
    clip = build_clip(architecture, config.seed)
    return clip, load_pretrained(clip, config.model.model, architecture, config.model.pretrained)


def _token_head(
    config: TrainConfig[Any],
    clip: Any,
    architecture: dict[str, Any],
    vocabulary: int,
    source: Source,
    num: int,
    tokenize: Tokenize,
) -> TokenHead | None:
    if "token_logits" not in LOSSES[config.loss].needs:
        return None
    options = config.options
    assert isinstance(options, SuperClipOptions)
    native = (
        hasattr(clip.visual, "forward_intermediates")
        and "timm_model_name" not in architecture["vision_cfg"]
    )
    if options.head_input == "patches" and not native:
        raise UserError(
            f"--model {config.model.model} has no patch tokens to read; use --head-input pooled"
        )
    width = (
        architecture["vision_cfg"]["width"]
        if options.head_input == "patches"
        else architecture["embed_dim"]
    )
    ids = seen_ids(source, num, tokenize) if options.head_vocab == "seen" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TokenHead(width, vocabulary, options.head_input, ids)


def seen_ids(source: Source, num: int, tokenize: Tokenize) -> torch.Tensor:
    """Sorted token ids that the captions of the first `num` pictures hold."""
    closed = caption_vocabulary() if source.name == "scenes" else None
    texts: Iterable[str] = (
        closed if closed is not None else (c for r in range(num) for c in source.read(r).captions)
    )
    return torch.tensor(sorted({int(token) for text in texts for token in tokenize(text)}))


def _vocab_ids(head: TokenHead) -> torch.Tensor | None:
    ids = head.vocab_ids
    assert ids is None or isinstance(ids, torch.Tensor)
    return ids


def _evaluators(config, preprocess, tokenize, world: World, precision) -> tuple[Evaluator, ...]:
    """Retrieval on the held-out data, where the run knows any."""
    spec = config.data.val_data
    if spec is None:
        try:
            spec = held_out_spec(config.data.train_data)
        except UserError as error:
            if world.is_main:
                print(f"no evaluation during training: {error}", flush=True)
            return ()
    source = open_source(spec, seed=config.data.data_seed, held_out=True)
    encoder = Encoder(preprocess, tokenize, world.device, precision, workers=config.data.workers)
    return (Retrieval("val", source, encoder, SCENES_POOL if source.name == "scenes" else None),)


def _write_record(run: Run, argv: list[str]) -> None:
    record = {
        "command": argv,
        "config": to_dict(run.config),
        "steps_per_epoch": run.plan.steps_per_epoch,
        "total_steps": run.plan.total_steps,
        **run.facts,
    }
    path = run.directory / "run.json"
    if path.exists():
        old = json.loads(path.read_text())
        for name in ("world_size", "threads", "versions"):
            if old.get(name) != record[name]:
                print(
                    f"warning: {name} was {old.get(name)}, is {record[name]}: not bit-equal to an "
                    "undisturbed run"
                )
        record["command"] = old["command"]
    path.write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    """The commit of the source, with + where the tree differs from it; "unknown" outside a
    checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head, dirty = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
