"""From a checked configuration to a run that can start or go on."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from importlib.metadata import version
from typing import Any, cast

import torch

from superclip.config import DataConfig, TrainConfig, to_dict
from superclip.data.batch import Source
from superclip.data.colour import Colours
from superclip.data.loader import PairMaker, Preprocess, Tokenize, TrainRows, limited, tokenizer_for
from superclip.data.order import Order
from superclip.data.scenes import caption_vocabulary
from superclip.data.shards import is_stream
from superclip.data.sources import Mixture, held_out_spec, open_source, shard_weights
from superclip.data.stream import Stream
from superclip.data.text_reduction import TextReduction
from superclip.errors import UserError, nearest
from superclip.evaluation.encode import Encoder
from superclip.loss_options import SuperClipOptions
from superclip.losses import LOSSES, LossContext, build_loss
from superclip.model.adopt import adopt_towers
from superclip.model.factory import (
    activation_name,
    build_clip,
    load_pretrained,
    model_config,
    preprocess_for,
    reduced,
    special_ids,
    text_parts,
    tokenizer,
    unlike_published,
    vocabulary_size,
)
from superclip.model.grid import grid_width
from superclip.model.masking import mask_patches
from superclip.model.superclip import SuperCLIP, TokenHead
from superclip.model.weights import (
    begin_with,
    begun_from,
    file_sha256,
    other_architecture,
    state_sha256,
    token_head_from,
)
from superclip.ops.precision import concrete_precision
from superclip.ops.reducer import GradientReducer
from superclip.ops.statistics import batch_norms
from superclip.ops.world import World
from superclip.training.evaluators import Evaluator, Retrieval
from superclip.training.folder import commit, move_in
from superclip.training.optim import build_optimizer
from superclip.training.preemption import StopRequest
from superclip.training.state import Plan, Run, TrainState
from superclip.training.tracking import Tracker, open_mirror
from superclip.training.utilization import flops

SCENES_POOL = 500


def settled(config: TrainConfig[Any], world: World) -> TrainConfig[Any]:
    """The configuration with `auto` precision and the global batch size filled in.

    Raises:
        UserError: if the global batch can't be dealt to this many processes.
    """
    whole, _, _ = config.optim.dealt(world.size)
    return dataclasses.replace(
        config,
        precision=concrete_precision(config.precision, world.device),
        optim=dataclasses.replace(config.optim, global_batch_size=whole),
    )


def check_stage(config: TrainConfig[Any], before: TrainConfig[Any]) -> None:
    """Find now what a later stage could else refuse only when the earlier one is done.

    Raises:
        UserError: for a model, pictures or data that can't follow.
    """
    models = [reduced(model_config(c.model.model), c.model) for c in (before, config)]
    if odd := other_architecture(models[1], models[0]):
        raise UserError(f"--stage-two {before.stage_two}: another architecture ({odd})")
    if (reduction := config.model.reduction) is not None and reduction.kind != "resize":
        vision = models[1]["vision_cfg"]
        reduction.kept(vision.get("image_size", 224) // vision.get("patch_size", 16))
    if config.data.train_data != before.data.train_data:
        _training_data(config)


def build_run(
    config: TrainConfig[Any], world: World, argv: list[str], stop: StopRequest | None = None
) -> tuple[Run, TrainState]:
    """Data, model, loss and optimizer of a run; also writes `run.json` on the main rank.

    Raises:
        UserError: for anything in the configuration that the data or the model can't meet.
    """
    config = settled(config, world)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = config.data
    source, order = _training_data(config)
    architecture, clip, tag, held_head = _initial_clip(config)
    reduction = config.model.reduction
    if reduction is not None and reduction.kind != "resize":
        mask_patches(clip, reduction, config.seed)
    preprocess = preprocess_for(architecture, data.resize, tag)
    if world.is_main and (odd := unlike_published(preprocess, tag)):
        print(f"note: {odd}", flush=True)
    bpe = tokenizer(architecture)
    tokenize = tokenizer_for(bpe)
    vocabulary = vocabulary_size(architecture, bpe)
    shorten = _text_reduction(config, bpe, source)
    reads = tokenize, shorten
    head = _token_head(config, clip, architecture, vocabulary, source, order.num_rows, *reads)
    if head is not None and held_head is not None:
        _take_head(head, held_head, world)
    _refuse_unmet(config, source)
    plan = _plan(config, order, world)
    context = LossContext(
        vocabulary,
        special_ids(bpe),
        None if head is None else _vocab_ids(head),
        source.num_images,
        source.num_captions,
        plan.steps_per_epoch,
        plan.epochs,
        architecture["embed_dim"],
        config.lr_tau,
        (config.optim.beta1, config.optim.beta2),
        config.optim.eps,
    )
    facts = {
        "activation": activation_name(clip.visual),
        "init_sha256": state_sha256(clip.state_dict()),
        "data_sha256": source.digest,
        "data_name": source.name,
        "commit": commit(),
        "versions": {
            name: version(name)
            for name in ("torch", "open_clip_torch", "numpy", "pillow", *_of_towers(config))
        },
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "device": _device_name(world.device),
        "compile": config.model.compile,
    }
    if batch_norms(clip):
        facts["micro_batch"] = plan.micro_batch  # what it normalises over
        if config.model.grad_checkpointing:
            raise UserError(
                "--grad-checkpointing passes pictures twice, which moves the statistics of this "
                "model's batch norm twice; leave it out (--accum-freq saves memory)"
            )
    if config.model.init_from is not None:
        facts["init_from_sha256"] = file_sha256(begun_from(config.model.init_from))
    if shorten is not None and shorten.kind == "syntax":
        facts["tagger"] = shorten.tagged_by
    _refuse_disagreement(world, facts)
    unit = "raw_features" not in LOSSES[config.loss].needs
    model = SuperCLIP(clip, preprocess.mean, preprocess.std, head, unit).to(world.device)
    learnt = config.options.temperature == "learnable" and config.optim.lr_tau != 0
    clip.logit_scale.requires_grad_(learnt)
    if config.model.grad_checkpointing:
        clip.set_grad_checkpointing()
    if config.model.compile:
        model.compile_towers()
    stop = stop or StopRequest()
    loss = build_loss(config.loss, config.options, context).to(world.device)
    state = TrainState(
        model,
        loss,
        build_optimizer(model, loss, config.optim, config.lr),
        torch.amp.GradScaler(world.device.type, enabled=config.precision == "amp"),
        GradientReducer(model.parameters(), world),
    )
    run = Run(
        config,
        world,
        config.precision,
        plan,
        order,
        TrainRows(  # of a stream, whose rows nobody can read, it carries the parts alone
            cast(Source, source),
            PairMaker(preprocess, tokenize, data.crop_scale, shorten, _colours(data)),
            config.seed,
            data.train_num_samples,
        ),
        preprocess,
        architecture,
        facts,
        config.out,
        Tracker(None),
        _evaluators(config, preprocess, tokenize, world, stop),
        stop,
    )
    world.on_main(lambda: move_in(run, argv))
    return run, state


def _training_data(config: TrainConfig[Any]) -> tuple[Source | Stream, Order]:
    data, num = config.data, config.data.train_num_samples
    if is_stream(data.train_data):
        stream = Stream(data.train_data, num)
        return stream, Order((stream.num_images,), config.seed)
    source = open_source(data.train_data, num, data.data_seed)
    sizes = limited(source.shard_sizes, num, source.name)
    return source, Order(sizes, config.seed, weights=shard_weights(source, data.train_data_weights))


def _colours(data: DataConfig) -> Colours | None:
    if data.color_jitter is None and not data.gray_scale_prob:
        return None
    return Colours(data.color_jitter, data.color_jitter_prob, data.gray_scale_prob)


def _plan(config: TrainConfig[Any], order: Order, world: World) -> Plan:
    whole, micro, accum = config.optim.dealt(world.size)
    return Plan(
        order.steps_per_epoch(whole),
        config.epochs,
        whole,
        micro,
        accum,
        config.log_every,
        config.save_every,
        config.save_frequency,
        config.log_grad_share,
        config.eval_every,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _refuse_disagreement(world: World, facts: dict[str, Any]) -> None:
    """Every rank must have found the same data and the same initial weights.

    Raises:
        UserError: naming the ranks that differ from the first.
    """
    for name in ("data_sha256", "init_sha256", "versions"):
        found = world.gather_objects(facts[name])
        if odd := [r for r, value in enumerate(found) if value != found[0]]:
            raise UserError(
                f"rank(s) {', '.join(map(str, odd))} have another {name} than rank 0; give every "
                "node the same data, weights and packages"
            )


def open_tracker(run: Run, state: TrainState) -> Run:
    """The run with its record opened at the state's step."""
    if not run.world.is_main:
        return run
    mirrors = [
        open_mirror(kind, run.directory, to_dict(run.config), state.step)
        for kind in run.config.trackers
    ]
    path = run.directory / "metrics.jsonl"
    tracker = Tracker(path, state.step, mirrors, flops(run, state.model))
    return dataclasses.replace(run, tracker=tracker)


def _refuse_unmet(config: TrainConfig[Any], source: Source | Stream) -> None:
    """Raises UserError if the data can't supply what the loss needs."""
    if "ids" in LOSSES[config.loss].needs and isinstance(source, Stream):
        raise UserError(
            f"--loss {config.loss} keeps numbers of every sample, and a stream's have no row of "
            "their own; read the shards as files"
        )


def _of_towers(config: TrainConfig[Any]) -> tuple[str, ...]:
    """Packages that decide what the two towers of other libraries compute."""
    return () if config.model.image_tower is None else ("timm", "transformers", "tokenizers")


def _initial_clip(
    config: TrainConfig[Any],
) -> tuple[dict[str, Any], Any, dict[str, Any], dict[str, Any] | None]:
    """Model configuration, model, what is known of the pictures it was made for, and the token head
    of the run that it begins with."""
    options = config.model
    if options.image_tower is not None:
        return *adopt_towers(options, config.seed, config.init_scale), None
    architecture = reduced(model_config(options.model), options)
    known, head = {}, None
    if options.from_scratch:
        clip = build_clip(architecture, config.seed, config.init_scale)
    else:
        clip = build_clip(architecture, config.seed)
        if options.pretrained is not None:
            known = load_pretrained(clip, options.model, architecture, options.pretrained)
        elif options.init_from is not None:
            known, head = begin_with(clip, options.init_from, architecture)
        if options.init_scale is not None:
            torch.nn.init.constant_(clip.logit_scale, math.log(options.init_scale))
    if options.image_positions is not None:
        positions = getattr(clip.visual, "positional_embedding", None)
        if positions is None:
            raise UserError(f"--image-positions: {options.model} has no position embeddings")
        positions.requires_grad_(options.image_positions == "learnable")
    return architecture, clip, known, head


def _take_head(head: TokenHead, held: dict[str, Any], world: World) -> None:
    """The token head of the run that this one begins with, where it has the same columns."""
    old = token_head_from(held)
    assert old is not None
    ids = [_vocab_ids(h) for h in (head, old)]
    same = head.source == old.source and head.linear.weight.shape == old.linear.weight.shape
    if same and all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in [ids]):
        head.load_state_dict(old.state_dict())
    elif world.is_main:
        print("the token head begins anew: its columns are others than before", flush=True)


def _token_head(
    config: TrainConfig[Any],
    clip: Any,
    architecture: dict[str, Any],
    vocabulary: int,
    source: Source | Stream,
    num: int,
    tokenize: Tokenize,
    shorten: TextReduction | None,
) -> TokenHead | None:
    if "token_logits" not in LOSSES[config.loss].needs:
        return None
    options = config.options
    assert isinstance(options, SuperClipOptions)
    patches = options.head_input == "patches"
    width = grid_width(clip.visual) if patches else architecture["embed_dim"]
    if not width:
        raise UserError(
            f"{config.model.name} ends in no grid of patches to read; use --head-input pooled"
        )
    ids = None
    if options.head_vocab == "seen":
        if isinstance(source, Stream):
            raise UserError("--head-vocab seen: a stream's captions aren't known; use full")
        ids = seen_ids(source, num, tokenize, shorten)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TokenHead(width, vocabulary, options.head_input, ids)


def seen_ids(
    source: Source, num: int, tokenize: Tokenize, shorten: TextReduction | None = None
) -> torch.Tensor:
    """Sorted token ids that training may meet in the captions of the first `num` pictures."""
    if source.name == "scenes":
        texts = caption_vocabulary()
        return torch.tensor(sorted({int(token) for text in texts for token in tokenize(text)}))
    seen: set[int] = set()
    for record in (source.read(row) for row in range(num)):
        for which, caption in enumerate(record.captions):
            seen.update(tokenize(caption).tolist())
            if shorten is not None:
                seen.update(shorten.all_ids(record, which))
    return torch.tensor(sorted(seen))


def _text_reduction(
    config: TrainConfig[Any], bpe: Any, source: Source | Stream
) -> TextReduction | None:
    """What shortens training captions.

    Raises:
        UserError: for a text tower with another tokenizer than CLIP's, or if syntax finds no tags.
    """
    kind = config.data.text_reduction
    if kind == "truncate":
        return None
    cut = text_parts(bpe)
    if cut is None:
        raise UserError(
            f"--text-reduction {kind} does not know the tokenizer of {config.model.name}; use "
            "truncate"
        )
    shorten = TextReduction(kind, *cut)
    if kind == "syntax" and isinstance(source, Stream):
        with contextlib.suppress(UserError):  # it may bring tags, which nobody knows beforehand
            shorten.find_tagger()
    elif kind == "syntax":
        parts = source.parts if isinstance(source, Mixture) else (cast(Source, source),)
        for part in parts:
            shorten.all_ids(part.read(0), 0)  # finds a tagger, or says that there is none
    return shorten


def _vocab_ids(head: TokenHead) -> torch.Tensor | None:
    ids = head.vocab_ids
    assert ids is None or isinstance(ids, torch.Tensor)
    return ids


def _evaluators(
    config: TrainConfig[Any],
    preprocess: Preprocess,
    tokenize: Tokenize,
    world: World,
    stop: StopRequest,
) -> tuple[Evaluator, ...]:
    """Retrieval on the held-out data, where the run knows any.

    Raises:
        UserError: if `--keep-best` names no metric of theirs.
    """
    spec = config.data.val_data
    if spec is None:
        try:
            spec = held_out_spec(config.data.train_data)
        except UserError as error:
            if world.is_main:
                print(f"no evaluation during training: {error}", flush=True)
            return _checked_best(config, ())
    source = open_source(spec, seed=config.data.data_seed, held_out=True)
    encoder = Encoder(
        preprocess,
        tokenize,
        world.device,
        config.precision,
        workers=config.data.workers,
        world=world,
        interrupted=lambda: stop.received is not None,
    )
    pool = SCENES_POOL if source.name == "scenes" else None
    return _checked_best(config, (Retrieval("val", source, encoder, pool),))


def _checked_best(
    config: TrainConfig[Any], evaluators: tuple[Evaluator, ...]
) -> tuple[Evaluator, ...]:
    names = [name for evaluator in evaluators for name in evaluator.names]
    if config.keep_best is not None and config.keep_best not in names:
        way_out = nearest(config.keep_best, names) if names else "name data with --val-data"
        raise UserError(f"--keep-best {config.keep_best!r} is never measured; {way_out}")
    return evaluators
