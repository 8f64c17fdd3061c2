"""The process group, seen as one small value. The only file that calls `torch.distributed`."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float64, Shaped
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from superclip.errors import UserError
from superclip.ops.phases import phase

T = TypeVar("T")
PATIENCE = 5.0
"""Seconds in which living processes answer a roll call."""


class PeerLost(UserError):
    """Another process, or the way to it, is gone."""


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size: position and number of processes.
        local_rank: position on this machine, which chooses the GPU.
        device: where this process computes.
        store: where processes leave notes for one another (host names, causes of failure).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    store: Store | None = None

    @staticmethod
    def from_env(device: str = "auto", timeout_minutes: float = 30.0) -> World:
        """Join the group that `torchrun` or `srun` describes, or stand alone. NCCL on CUDA, gloo on
        CPU.

        Raises:
            UserError: if CUDA is asked for and absent.
            PeerLost: if the others do not come.
        """
        env = os.environ
        if not ("WORLD_SIZE" in env and "RANK" in env):
            _adopt_slurm(env)
        rank, size, local_rank = (
            int(env.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        target = choose_device(device, local_rank)
        if target.type == "cuda":
            torch.cuda.set_device(target)
        if size == 1:
            return World(device=target)
        timeout = timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
            store = PrefixStore(_session(store, rank, size, timeout.total_seconds()), store)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout
            )
        except (RuntimeError, ValueError) as error:
            raise PeerLost(
                f"the {size} processes did not find one another at {env.get('MASTER_ADDR')}:"
                f"{env.get('MASTER_PORT')} ({_first_line(error)})"
            ) from None
        notes = PrefixStore("superclip", store)
        notes.set(f"host/{rank}", socket.gethostname())
        return World(rank, size, local_rank, target, notes)

    @staticmethod
    @contextlib.contextmanager
    def joined(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
        """`from_env` for as long as the block runs; whatever ends a rank is told to the others.

        Raises:
            UserError: for a rank's own mistake, with its name before it; or for lost peers, with
                what is known of them.
        """
        world = World.from_env(device, timeout_minutes)
        if world.size == 1:
            yield world
            return
        me = f"rank {world.rank} of {world.size} on {socket.gethostname()}"
        try:
            yield world
        except PeerLost as error:
            raise UserError(
                f"{me} lost its peers: {world.roll_call()} ({error}); the same command goes on "
                "from the last checkpoint"
            ) from None
        except (UserError, OSError) as error:
            world.leave_note(describe(error))
            raise UserError(f"{me}: {describe(error)}") from None
        except BaseException as error:
            world.leave_note(f"{type(error).__name__}: {_first_line(error)}")
            raise
        world.close()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            self._call(dist.barrier)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; exact for integers."""
        if self.size > 1:
            self._call(dist.all_reduce, tensor)
        return tensor

    def sum_later(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum over ranks, in place; calling the result waits for the end of it."""
        work = self._call(dist.all_reduce, tensor, async_op=True)
        return lambda: self._call(work.wait)

    def gather(self, rows: Shaped[Tensor, "b d"]) -> Shaped[Tensor, "B d"]:
        """Rows of every rank in rank order; differentiable, with the exact gradient."""
        return _Gather.apply(rows, self) if self.size > 1 else rows  # pyright: ignore[reportReturnType]

    def exchange(self, numbers: Float64[Tensor, " n"]) -> Float64[Tensor, "k n"]:
        """The same few numbers of every rank, on the CPU: row r is rank r's."""
        if self.size == 1:
            return numbers[None]
        out = torch.empty(self.size * len(numbers), dtype=torch.float64)
        self._call(dist.all_gather_into_tensor, out, numbers)
        return out.view(self.size, -1)

    def gather_objects(self, value: T) -> list[T]:
        """A small plain value of every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on the main rank alone; every rank gets its (small, plain) result or its
        `UserError`."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (UserError, OSError) as error:
                outcome[1] = describe(error)
        # Not a broadcast: gloo may not notice a dead peer on a rank that only sends.
        outcome = self.gather_objects(outcome)[0]
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def leave_note(self, cause: str) -> None:
        """Tell the other ranks why this one ends."""
        if self.store is not None:
            self.store.set(f"failed/{self.rank}", cause)

    def roll_call(self) -> str:
        """Which ranks failed, and why, or do not answer; for the last words of those that live."""
        told: list[str] = []
        # A cable cut while the store waits for an answer is under no timeout of the store's.
        asking = threading.Thread(target=lambda: told.append(self._ask_around()), daemon=True)
        asking.start()
        asking.join(2 * PATIENCE)
        return told[0] if told else "the host of rank 0 does not answer"

    def _ask_around(self) -> str:
        store = self.store
        assert store is not None
        try:
            store.set_timeout(timedelta(seconds=PATIENCE))
            store.set(f"alive/{self.rank}", "")
            end = time.monotonic() + PATIENCE
            others = set(range(self.size)) - {self.rank}
            while others and time.monotonic() < end:
                others = {r for r in others if not store.check([f"alive/{r}"])}
                if any(store.check([f"failed/{r}"]) for r in others):
                    break
                time.sleep(0.1)
            told = []
            for r in sorted(others):
                host = store.get(f"host/{r}").decode()
                failed = store.check([f"failed/{r}"])
                cause = store.get(f"failed/{r}").decode() if failed else "does not answer"
                told.append(f"rank {r} on {host}: {cause}")
            return "; ".join(told) or "every rank still answers"
        except (RuntimeError, ValueError):
            return "the host of rank 0 does not answer"

    def _call(self, collective: Callable[..., T], *args: Any, **options: Any) -> T:
        try:
            with phase("communication"):
                return collective(*args, **options)
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from None


def _session(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name for this meeting of the ranks, new every time and the same on all of them.

    torchrun's store outlives a restart: what the dead wrote there (gloo's addresses among it) must
    not be read by those who come after. Each rank calls with a word of its own until rank 0
    answers to that very word. TORCHELASTIC_RESTART_COUNT would not do, agents count it apart.

    Raises:
        RuntimeError: if the others do not come in time.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"session/{mine}").decode()
        store.add(f"met/{name}", 1)
        return name
    end = time.monotonic() + timeout
    while store.add(f"met/{mine}", 0) < size - 1:
        if time.monotonic() > end:
            raise RuntimeError(f"not all of them came within {timeout:g} s")
        for r in range(1, size):
            if store.check([f"hello/{r}"]):
                store.set(f"session/{store.get(f'hello/{r}').decode()}", mine)
        time.sleep(0.05)
    return mine


def describe(error: Exception) -> str:
    """One line for a mistake or a failed file operation."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _adopt_slurm(env: Any) -> None:
    """Spell SLURM's variables as torchrun does; a job that started no tasks stands alone."""
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))  # unlike SLURM_NTASKS, set by srun alone
    if size == 1:
        return
    env |= {
        "WORLD_SIZE": str(size),
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
    }
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" not in env and nodes:
        env["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_ADDR" not in env:
        raise UserError("several SLURM tasks, but no MASTER_ADDR and no list of nodes; export it")
    env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", 0)) % 12_000))


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("gpu[003-005,9],cpu1"), first_host("a-1,b")
    ('gpu003', 'a-1')
    """
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^]]*\]([^,]*))?", nodes)
    assert match is not None, nodes
    return match[1] + (match[2] or "") + (match[3] or "")


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto` takes the GPU of this local rank where there is one.

    Raises:
        UserError: if the device is unknown or absent.
    """
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if target.type not in ("cpu", "cuda", "mps", "xpu"):  # torch knows more, which hold no numbers
        raise UserError(f"--device {device!r} can't compute here; use auto, cpu, cuda or cuda:N")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: {torch.cuda.device_count()} CUDA device(s) are visible; start as "
            "many processes a node as it has GPUs (SLURM: --gpus-per-node, not --gpus-per-task)"
        )
    return target


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, features: Tensor, world: World) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.world, ctx.rows = world, features.shape[0]
        out = features.new_empty(world.size * features.shape[0], features.shape[1])
        world._call(dist.all_gather_into_tensor, out, features.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = ctx.world.sum(grad.contiguous())
        start = ctx.world.rank * ctx.rows
        return grad[start : start + ctx.rows], None
