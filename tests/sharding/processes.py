"""Real processes for tests of sharded tensors: gloo on this machine, started once for all cases."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def on_ranks(world: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call a function of a module on every rank; gives what each returns.

    Args:
        work: takes the rank, the world's size and `args`.
        folder: empty, for the meeting of the ranks and their results.
    """
    multiprocessing.spawn(_enter, (world, work, str(folder), args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(
    rank: int, world: int, work: Callable[..., Any], folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(work(rank, world, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
