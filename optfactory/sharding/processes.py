"""The processes of a distributed run."""

from __future__ import annotations

from torch import distributed as dist


def is_one_of_many() -> bool:
    """Whether this process trains together with others, as far as torch.distributed knows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
