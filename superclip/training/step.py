"""One optimizer step: the same path for one micro-batch and for many, one rank and many."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn

from superclip.data.batch import Batch
from superclip.losses import Terms
from superclip.model.output import ClipOutput
from superclip.ops.phases import phase
from superclip.ops.precision import attention_kernel, autocast
from superclip.ops.statistics import fixed_statistics
from superclip.training.optim import set_learning_rates
from superclip.training.shares import TermGradients
from superclip.training.state import Run, TrainState

MAX_LOGIT_SCALE = math.log(100)


def train_step(state: TrainState, batch: Batch, run: Run) -> Terms:
    """Advance the model by one step; returns the detached terms of this rank.

    Pair terms need all features at once, row terms do not. So features are computed first (without
    a graph if there are several micro-batches), the pair terms give the gradient at the features,
    and each micro-batch then carries its slice of it back (GradCache, Gao et al. 2021). Every
    gradient, the scale's included, is that of the whole batch. A gradient that is not finite
    changes no weight and clears `state.finite`.
    """
    length, scale = run.plan.total_steps, state.model.clip.logit_scale
    rates = run.config.optim, run.config.lr, state.step, length, scale.detach()
    set_learning_rates(state.optimizer, *rates)
    with attention_kernel(run.precision, run.world.device):
        terms, shares = _gradients(state, batch, run)
    with phase("optimizer"):
        _update(state, run)
    state.norms |= shares
    return terms


def _gradients(state: TrainState, batch: Batch, run: Run) -> tuple[Terms, dict[str, Tensor]]:
    """Leave the averaged (and scaled) gradient of this step in the parameters."""
    world, scaled = run.world, state.scaler.scale
    micros = batch.split(run.plan.accum_freq)
    several = len(micros) > 1
    measured = run.plan.shares_at(state.step + 1)
    tower = TermGradients(state.model.clip.visual.parameters()) if measured else None

    state.loss.observe(batch, world)
    with phase("forward"), contextlib.ExitStack() as first:
        if several:  # each micro-batch passes again, with a graph
            first.enter_context(torch.no_grad())
            first.enter_context(fixed_statistics(state.model))
        outs = [_forward(state, micro, k, run) for k, micro in enumerate(micros)]
    with phase("loss"):
        image, text = (
            torch.cat([getattr(out, name) for out in outs]).detach().requires_grad_()
            for name in ("image_features", "text_features")
        )
        leaves = image, text, outs[0].scale.detach().requires_grad_()
        terms = state.loss.pair_terms(*leaves, batch, world)
        pair_grads = {
            name: torch.autograd.grad(
                scaled(term), leaves, retain_graph=True, materialize_grads=True
            )
            for name, term in (terms.items() if measured else ())
        }
        own = list(state.loss.parameters())
        whole = torch.autograd.grad(scaled(_total(terms)), [*leaves, *own], materialize_grads=True)
        for p, grad in zip(own, whole[3:]):
            p.grad = world.sum(grad) / world.size

    for k, micro in enumerate(micros):
        last = k == len(micros) - 1
        with phase("forward"):
            out = _forward(state, micro, k, run) if several else outs[0]
        with phase("loss"), autocast(run.precision, world.device):
            rows = state.loss.row_terms(out, micro)
        rows = {name: value / len(micros) for name, value in rows.items()}
        for name, value in rows.items():
            terms[name] = terms.get(name, 0) + value.detach()
        features = [out.image_features, out.text_features]
        if out.scale.requires_grad:
            features.append(out.scale)
        if tower is not None:
            for name, (at_image, *_) in pair_grads.items():
                tower.add(name, features[:1], [at_image.chunk(len(micros))[k]])
            for name, value in rows.items():
                tower.add(name, [scaled(value)], [None])
        grads: list[Tensor | None] = [g.chunk(len(micros))[k] for g in whole[:2]]
        if out.scale.requires_grad:
            grads.append(whole[2] if last else torch.zeros_like(whole[2]))
        if rows:
            features.append(scaled(_total(rows)))
            grads.append(None)
        averaging = state.reducer.averaging() if last else contextlib.nullcontext()
        with phase("backward"), averaging:
            torch.autograd.backward(features, grads)
    shares = {} if tower is None else tower.shares(world)
    return {name: value.detach() for name, value in terms.items()}, shares


def _total(terms: Terms) -> Tensor:
    return torch.stack(
        [value.float() if value.dtype != torch.float64 else value for value in terms.values()]
    ).sum()


def _forward(state: TrainState, batch: Batch, micro: int, run: Run) -> ClipOutput:
    """Random numbers of the model, if it draws any, are counted like all others."""
    place = run.world.rank * run.plan.accum_freq + micro
    state.model.choose_patches(batch.image_ids, state.step // run.plan.steps_per_epoch)
    torch.manual_seed(((run.config.seed << 40) + (state.step << 16) + place) % 2**63)
    with autocast(run.precision, run.world.device):
        return state.model(batch.images, batch.tokens)


def _update(state: TrainState, run: Run) -> None:
    """Clip (towers, token head and the loss's own parameters each by themselves), step, clamp the
    scale to at most 100."""
    state.scaler.unscale_(state.optimizer)
    parts: dict[str, nn.Module] = {"clip": state.model.clip}
    if state.model.token_head is not None:
        parts["head"] = state.model.token_head
    if any(True for _ in state.loss.parameters()):
        parts["loss"] = state.loss
    limit = run.config.optim.grad_clip_norm or math.inf
    state.norms = {
        f"grad_norm_{name}": torch.nn.utils.clip_grad_norm_(part.parameters(), limit)
        for name, part in parts.items()
    }
    finite = all(bool(norm.isfinite()) for norm in state.norms.values())
    scaling = state.scaler.is_enabled()
    # A large loss scale makes infinite gradients by design, and falls; at 1 they are the model's.
    state.finite = finite or (scaling and state.scaler.get_scale() > 1)
    before = _copies(parts) if run.plan.logs_at(state.step + 1) else None
    if finite or scaling:
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        state.model.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        for name, old in (before or {}).items():
            new: list[Tensor] = list(parts[name].parameters())
            moved = [a - b for a, b in zip(new, old)]
            state.norms[f"param_norm_{name}"] = _norm(new)
            state.norms[f"update_norm_{name}"] = _norm(moved)
    state.step += 1


def _copies(parts: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)
