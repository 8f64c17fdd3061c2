"""Gradients averaged over ranks while the backward pass still runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from superclip.ops.world import World


class GradientReducer:
    """Data parallelism without a wrapper around the model.

    Buckets are filled in reverse order of the parameters and never re-formed. torch's own
    DistributedDataParallel re-forms them after the first step, so that a resumed run would add in
    another order than the undisturbed one; from three ranks on that shows in the bits.

    Args:
        parameters: those that are trained, in the same order on every rank.
        bucket_bytes: about as much is sent at once (DDP's 25 MiB).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], world: World, bucket_bytes: int = 25 << 20
    ):
        self.world = world
        self._buckets: list[list[nn.Parameter]] = []
        self._missing: list[int] = []
        self._sent: list[tuple] | None = None
        if world.size == 1:
            return
        room = 0
        for p in reversed([p for p in parameters if p.requires_grad]):
            size = p.numel() * p.element_size()
            if size > room or p.dtype != self._buckets[-1][0].dtype:
                self._buckets.append([])
                room = bucket_bytes
            self._buckets[-1].append(p)
            room -= size
        home = {p: k for k, bucket in enumerate(self._buckets) for p in bucket}
        for p in home:
            p.register_post_accumulate_grad_hook(lambda p: self._ready(home[p]))

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        """A backward pass inside the block leaves gradients that are means over all ranks."""
        if self.world.size == 1:
            yield
            return
        self._sent, self._missing = [], [len(bucket) for bucket in self._buckets]
        try:
            yield
            for k in range(len(self._sent), len(self._buckets)):  # some parameters were not used
                self._send(k)
            for wait, flat, used in self._sent:
                wait()
                parts = (flat / self.world.size).split([p.numel() for p in used])
                for p, part in zip(used, parts):
                    p.grad = part.view_as(p)
        finally:
            self._sent = None

    def _ready(self, k: int) -> None:
        """Send every bucket that is full, in the same order on every rank."""
        if self._sent is None:
            return
        self._missing[k] -= 1
        assert self._missing[k] >= 0, "a parameter's gradient came twice in one backward pass"
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(len(self._sent))

    def _send(self, k: int) -> None:
        assert self._sent is not None
        used = [p for p in self._buckets[k] if p.grad is not None]
        none = self._buckets[k][0].new_zeros(0)
        flat = torch.cat([none, *(p.grad.flatten() for p in used if p.grad is not None)])
        self._sent.append((self.world.sum_later(flat), flat, used))
