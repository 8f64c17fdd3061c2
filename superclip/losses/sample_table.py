"""Numbers that a loss keeps of every sample of the training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from superclip.data.batch import Batch
from superclip.errors import UserError
from superclip.ops.world import World

Place = Literal["device", "host"]


class SampleTable(nn.Module):
    """A row of float32 columns a sample; every rank holds all rows and writes the same into them.

    So any number of ranks can go on from one file, and a step sends only the rows it changes.

    Args:
        samples: rows, by the contiguous ids of a batch.
        initial: a column's name and what it holds before the first visit.
        place: "host" keeps the table in main memory, and costs a copy of a batch's rows each way.
    """

    rows: Tensor

    def __init__(self, samples: int, initial: Mapping[str, float], place: Place = "device"):
        super().__init__()
        self.columns, self.place = tuple(initial), place
        self.register_buffer("rows", torch.tensor([list(initial.values())]).repeat(samples, 1))
        self.register_load_state_dict_pre_hook(_refuse_other_size)

    def gather(self, ids: Int[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
        """The columns of some samples, where the ids are.

        Raises:
            UserError: for an id that has no row.
        """
        found = self.rows[self._known(ids)].to(ids.device)
        return dict(zip(self.columns, found.unbind(1)))

    def update(self, ids: Int[Tensor, " b"], new: Float[Tensor, "b k"]) -> None:
        """Write all columns of some samples.

        A sample that comes several times gets the mean of its rows, summed in double precision, so
        that their order does not show.

        Raises:
            UserError: for an id that has no row.
        """
        unique, place = self._known(ids).unique(return_inverse=True)
        new = new.to(self.rows.device, torch.float64)
        sums = new.new_zeros(len(unique), new.shape[1]).index_add_(0, place, new)
        self.rows[unique] = (sums / place.bincount()[:, None]).to(self.rows.dtype)

    def _known(self, ids: Tensor) -> Tensor:
        low, high = torch.stack(ids.aminmax()).tolist()  # one wait for the device
        if low < 0 or high >= len(self.rows):
            raise UserError(
                f"sample {low if low < 0 else high} is not among the {len(self.rows)} that this "
                "run keeps numbers of; the data have changed since it began"
            )
        return ids.to(self.rows.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleTable:
        """On the host the table takes a new type, but stays."""
        if self.place == "host":
            self.rows = self.rows.to(fn(self.rows[:0]).dtype)
            return self
        return super()._apply(fn, recurse)


def _refuse_other_size(
    table: SampleTable, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Raises UserError if a checkpoint is of other samples or columns."""
    saved = state.get(f"{prefix}rows", table.rows)
    if saved.shape != table.rows.shape:
        raise UserError(
            f"the checkpoint keeps {saved.shape[1]} number(s) of {saved.shape[0]} samples, this "
            f"run {table.rows.shape[1]} of {table.rows.shape[0]}; go on with the data that it was "
            "trained on, or start anew from its weights (--pretrained)"
        )


class PairTables(nn.Module):
    """A table of pictures and one of captions; values are `[2, b]`, pictures first.

    Args:
        images, captions: rows of either.
        initial, place: as of `SampleTable`.
    """

    def __init__(
        self, images: int, captions: int, initial: Mapping[str, float], place: Place = "device"
    ):
        super().__init__()
        self.images = SampleTable(images, initial, place)
        self.captions = SampleTable(captions, initial, place)

    def gather(self, batch: Batch) -> dict[str, Float[Tensor, "2 b"]]:
        """Every column, of this rank's samples."""
        found = [self.images.gather(batch.image_ids), self.captions.gather(batch.caption_ids)]
        return {name: torch.stack([side[name] for side in found]) for name in found[0]}

    def update(
        self, batch: Batch, values: Mapping[str, Float[Tensor, "2 b"]], world: World
    ) -> None:
        """Write this rank's samples into the tables of every rank.

        A global batch with a number that is not finite leaves no trace: its update is left out too,
        or ends the run (`--on-nonfinite`).
        """
        sides = [torch.stack(rows, 1) for rows in zip(*(values[n] for n in self.images.columns))]
        new = world.gather(torch.cat(sides, 1))
        if not new.isfinite().all():
            return
        new = new.chunk(2, 1)
        ids = world.gather(torch.stack([batch.image_ids, batch.caption_ids], 1)).unbind(1)
        for table, own, rows in zip((self.images, self.captions), ids, new):
            table.update(own, rows)
