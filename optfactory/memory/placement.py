"""Where optimizer state lives: ordinary memory, or memory that makes room for other data.

A paged tensor on a CPU is a shared mapping of a file in a private temporary folder. The folder is
removed as soon as the file is mapped: the disk space is freed with the tensor, also when the
process is killed.

A paged tensor of a CUDA parameter is either managed memory, whose pages CUDA moves between host and
device as they are needed, or pinned host memory that every step streams through the device.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from optfactory.memory.managed import concurrent_managed_access, managed_tensor

# Smaller tensors stay in ordinary memory, as in bitsandbytes: paging them would save nothing.
PAGED_MIN_NUMEL = 100_000

RESIDENT = "resident"
FILE_MAPPED = "file-mapped"
MANAGED = "managed"
PINNED = "pinned"


def place_for(
    numel: int, device: torch.device, is_paged: bool, page_memory: str
) -> tuple[str, str]:
    """Where a state tensor of this many elements is kept, and why it is not paged if it is not.

    Args:
        device: the parameter's device.
        page_memory: ``managed``, ``pinned`` or ``auto``, which takes managed memory where the
            device and the system support that both use it at once.
    """
    if not is_paged:
        return RESIDENT, ""
    if numel < PAGED_MIN_NUMEL:
        return RESIDENT, f"{numel} elements, fewer than {PAGED_MIN_NUMEL}: not paged"
    if device.type != "cuda":
        return FILE_MAPPED, ""
    if page_memory == "auto":
        return (MANAGED if concurrent_managed_access(device) else PINNED), ""
    return page_memory, ""


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    where: str,
    page_dir: str | None,
    fill: float = 0,
) -> Tensor:
    """A contiguous tensor filled with one value, placed as `where` says.

    Raises:
        OSError: the folder of the paged file has no room or cannot be written.
    """
    if where == RESIDENT:
        return torch.full(shape, fill, dtype=dtype, device=device)
    if where == MANAGED:
        return managed_tensor(shape, dtype, device).fill_(fill)
    if where == PINNED:
        return torch.empty(
            shape, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available()
        ).fill_(fill)
    return _map_file(math.prod(shape), dtype, page_dir).fill_(fill).view(shape)


def _map_file(numel: int, dtype: torch.dtype, page_dir: str | None) -> Tensor:
    folder = page_dir or default_page_dir()
    nbytes = numel * dtype.itemsize
    try:
        with tempfile.TemporaryDirectory(
            prefix="optfactory-", dir=folder, ignore_cleanup_errors=True
        ) as private:
            path = Path(private, "state")
            with path.open("wb") as file:
                _reserve(file.fileno(), nbytes)
            return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
    except OSError as error:
        message = (
            f"cannot place {nbytes} bytes of paged optimizer state in {folder}: {error.strerror}; "
            "choose a folder with room by page_dir"
        )
        raise OSError(error.errno, message) from error


def _reserve(file: int, nbytes: int) -> None:
    # Without reserved blocks a full disk would kill the process at a later write to the mapping.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.truncate(file, nbytes)


def default_page_dir() -> str:
    """The temporary folder, or /var/tmp where the former lies in memory and could not evict."""
    folder = tempfile.gettempdir()
    if _in_memory(folder) and Path("/var/tmp").is_dir() and not _in_memory("/var/tmp"):
        return "/var/tmp"
    return folder


def _in_memory(folder: str) -> bool:
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return False
    path = os.path.realpath(folder)
    best, kind = "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, filesystem, *_ = line.split(" ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, filesystem
    return kind in ("tmpfs", "ramfs")
