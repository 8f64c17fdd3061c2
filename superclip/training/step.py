"""One optimizer step: the same path for one micro-batch and for many."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from superclip.data.batch import Batch
from superclip.losses import Terms
from superclip.model.output import ClipOutput
from superclip.training.optim import autocast
from superclip.training.schedule import cosine
from superclip.training.state import Run, TrainState

MAX_LOGIT_SCALE = math.log(100)


def train_step(state: TrainState, batch: Batch, run: Run) -> Terms:
    """Advance the model by one step; returns the detached terms of this rank.

    Pair terms need all features at once, row terms do not. So features are computed first (without
    a graph if there are several micro-batches), the pair terms give the gradient at the features,
    and each micro-batch then carries its slice of it back (GradCache, Gao et al. 2021). Every
    gradient, the scale's included, is that of the whole batch.
    """
    config, world = run.config.optim, run.world
    _set_lr(state, run)
    micros = batch.split(config.accum_freq)
    state.loss.observe(batch, world)
    several = len(micros) > 1
    with torch.no_grad() if several else contextlib.nullcontext():
        outs = [_forward(state.model if several else state.forward, micro, run) for micro in micros]

    image, text = (
        torch.cat([getattr(out, name) for out in outs]).detach().requires_grad_()
        for name in ("image_features", "text_features")
    )
    scale = outs[0].scale.detach().requires_grad_()
    terms = state.loss.pair_terms(image, text, scale, batch, world)
    state.scaler.scale(_total(terms)).backward()
    assert image.grad is not None and text.grad is not None and scale.grad is not None
    image_grads, text_grads = image.grad.chunk(len(micros)), text.grad.chunk(len(micros))

    for k, micro in enumerate(micros):
        last = k == len(micros) - 1
        with _synchronised(state.forward, last):
            out = _forward(state.forward, micro, run) if several else outs[0]
            with autocast(run.precision, world.device):
                rows = state.loss.row_terms(out, micro)
            tensors = [out.image_features, out.text_features, out.scale]
            grads: list[Tensor | None] = [
                image_grads[k],
                text_grads[k],
                scale.grad if last else torch.zeros_like(scale),
            ]
            if rows:
                tensors.append(state.scaler.scale(_total(rows)) / len(micros))
                grads.append(None)
            torch.autograd.backward(tensors, grads)
        for name, value in rows.items():
            terms[name] = terms.get(name, 0) + value.detach() / len(micros)

    _update(state, config.grad_clip_norm)
    return {name: value.detach() for name, value in terms.items()}


def _total(terms: Terms) -> Tensor:
    return torch.stack(
        [value.float() if value.dtype != torch.float64 else value for value in terms.values()]
    ).sum()


def _forward(model: nn.Module, batch: Batch, run: Run) -> ClipOutput:
    with autocast(run.precision, run.world.device):
        return model(batch.images, batch.tokens)


def _synchronised(forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """DDP reduces gradients with the last micro-batch only."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return contextlib.nullcontext()


def _set_lr(state: TrainState, run: Run) -> None:
    lr = cosine(state.step, run.config.lr, run.config.optim.warmup, run.plan.total_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr


def _update(state: TrainState, clip_norm: float | None) -> None:
    """Clip (towers and token head each by themselves), step, clamp the scale to at most 100."""
    state.scaler.unscale_(state.optimizer)
    parts = {"clip": state.model.clip, "head": state.model.token_head}
    for name, part in parts.items():
        if part is not None:
            limit = math.inf if clip_norm is None else clip_norm
            state.grad_norms[name] = torch.nn.utils.clip_grad_norm_(part.parameters(), limit)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        state.model.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    state.step += 1
