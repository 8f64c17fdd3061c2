"""A loss or a gradient that is not finite: named, kept for inspection, or skipped and counted."""

from __future__ import annotations

import torch

from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.ops.precision import autocast
from superclip.training.checkpoint import weights_and_facts, write_atomically
from superclip.training.consensus import News
from superclip.training.state import Run, TrainState


def handle_nonfinite(run: Run, state: TrainState, batch: Batch, news: News) -> None:
    """Count the step, or stop; the update with that gradient has been left out either way.

    The file that is kept holds the weights as they met the batch, in a checkpoint's layout, and
    beside them `batch` and `terms`.

    Raises:
        UserError: on every rank, with step, ranks and ids, unless `--on-nonfinite skip`.
    """
    if run.config.on_nonfinite == "skip":
        state.nonfinite += 1
        return
    ids = _broken_ids(run, state, batch)
    ranks = [r for r, found in enumerate(ids) if found] or news.broken_ranks or [0]
    path = run.directory / f"nonfinite_step_{state.step}_rank_{ranks[0]}.pt"
    if run.world.rank == ranks[0]:
        kept = {name: tensor.cpu() for name, tensor in vars(batch).items()}
        write_atomically(weights_and_facts(run, state) | {"batch": kept, "terms": news.terms}, path)
    run.world.barrier()
    what = "loss" if news.broken_ranks else "gradient"
    pictures = ids[ranks[0]] or batch.image_ids.tolist()
    more = ", ..." if len(pictures) > 8 else ""
    raise UserError(
        f"the {what} is not finite at step {state.step} (loss {news.terms['loss']:g}) on rank(s) "
        f"{', '.join(map(str, ranks))}, image ids {', '.join(map(str, pictures[:8]))}{more}; the "
        f"batch is kept in {path}; lower --lr, use --precision fp32, or --on-nonfinite skip"
    )


@torch.no_grad()
def _broken_ids(run: Run, state: TrainState, batch: Batch) -> list[list[int]]:
    """For every rank the image ids whose own features are not finite."""
    found: list[int] = []
    for micro in batch.split(run.plan.accum_freq):
        with autocast(run.precision, run.world.device):
            out = state.model(micro.images, micro.tokens)
        fine = out.image_features.isfinite().all(1) & out.text_features.isfinite().all(1)
        found += micro.image_ids[~fine].tolist()
    return run.world.gather_objects(found)
