"""The process group, seen as one small value. The only file that calls `torch.distributed`
collectives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from superclip.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size: position and number of processes.
        local_rank: position on this machine, which chooses the GPU.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @staticmethod
    def from_env(device: str = "auto", timeout_minutes: float = 30.0) -> World:
        """Join the group that `torchrun` or `srun` describes, or stand alone. NCCL on CUDA, gloo on
        CPU.

        Raises:
            UserError: if CUDA is asked for and absent.
        """
        env = os.environ
        torchrun = "WORLD_SIZE" in env and "RANK" in env
        size = int(env["WORLD_SIZE"] if torchrun else env.get("SLURM_NTASKS", 1))
        if not torchrun and size > 1 and "SLURM_PROCID" not in env:
            size = 1  # an interactive allocation: tasks are allowed, none was started
        rank = int(env["RANK"] if torchrun else env.get("SLURM_PROCID", 0)) if size > 1 else 0
        local_rank = (
            int(env.get("LOCAL_RANK" if torchrun else "SLURM_LOCALID", 0)) if size > 1 else 0
        )
        target = choose_device(device, local_rank)
        if target.type == "cuda":
            torch.cuda.set_device(target)
        if size > 1:
            if not torchrun and "MASTER_ADDR" not in env:
                raise UserError(
                    "several SLURM tasks, but MASTER_ADDR and MASTER_PORT are not set; use "
                    "torchrun or export them"
                )
            backend = "nccl" if target.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, rank=rank, world_size=size, timeout=timedelta(minutes=timeout_minutes)
            )
        return World(rank, size, local_rank, target)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; exact for integers."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "B d"]:
        """Rows of every rank in rank order; differentiable with the exact gradient (losses.md
        10.4)."""
        return _Gather.apply(features, self) if self.size > 1 else features  # pyright: ignore[reportReturnType]


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
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
    return target


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, features: Tensor, world: World) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.world, ctx.rows = world, features.shape[0]
        out = features.new_empty(world.size * features.shape[0], features.shape[1])
        dist.all_gather_into_tensor(out, features.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = ctx.world.rank * ctx.rows
        return grad[start : start + ctx.rows], None
