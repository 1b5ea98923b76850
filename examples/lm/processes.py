"""Training on several processes: FSDP2, shares of batches, checkpoints for any number of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer


@dataclass(frozen=True)
class Processes:
    """The processes that torchrun started, as one of them sees it; alone without torchrun."""

    rank: int
    count: int
    device: str

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes reports."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether the model is sharded; torchrun with one process shards it, too."""
        return dist.is_initialized()

    def shard(self, model: nn.Module) -> None:
        """Leave a part of every parameter on each process: first the blocks, then the rest."""
        if self.are_several:
            mesh = init_device_mesh(torch.device(self.device).type, (self.count,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This process' windows of a batch, which is the same for any number of processes."""
        inputs, targets = (part.tensor_split(self.count)[self.rank] for part in batch)
        return inputs.to(self.device), targets.to(self.device)

    def mean(self, value: Tensor) -> float:
        """The mean over all processes."""
        value = value.detach().clone()
        if self.are_several:
            dist.all_reduce(value)
        return value.item() / self.count


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did."""
    if "RANK" not in os.environ:
        yield Processes(0, 1, device)
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Collectives on the CPU too: async checkpoints and state on the host need them.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # one that leaves earlier would break the connections of the others
    finally:
        dist.destroy_process_group()


def save(folder: str, model: nn.Module, optimizer: Optimizer, rest: dict[str, Any]) -> None:
    """Write one more checkpoint into a folder; one that is cut short leaves those before it."""
    weights, state = get_state_dict(model, optimizer)
    target = Path(folder) / f"step-{rest['step']:08d}"
    dcp.save({"model": weights, "optimizer": state, **rest}, checkpoint_id=str(target))


def load(folder: str, model: nn.Module, optimizer: Optimizer, rest: dict[str, Any]) -> None:
    """Read a folder's last whole checkpoint, written by any number of processes; fills `rest`."""
    # DCP writes this file last.
    last = max(Path(folder).glob("step-*/.metadata"), default=None)
    if last is None:
        raise FileNotFoundError(f"there is no whole checkpoint in {folder}")
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, **rest}
    dcp.load(saved, checkpoint_id=str(last.parent))
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    rest |= {key: saved[key] for key in rest}
