"""Checkpoint files that are whole: the old one or the new one, whatever happens between."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

from optfactory.errors import StateError


def save_checkpoint(path: str | os.PathLike[str], obj: Any) -> None:
    """Write a checkpoint with torch.save so that no crash leaves half of it.

    The new file is written beside the old one, forced to the disk and renamed over it. A process
    that is killed meanwhile leaves the old file, and may leave `.<name>.<random>.tmp` beside it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/last.pt", {"step": 7})
    ...     load_checkpoint(f"{folder}/last.pt")
    {'step': 7}

    Args:
        path: the file to write; its folder must exist.
        obj: what torch.save takes, usually a dict of state dicts.

    Raises:
        OSError: there is no room or no permission; the old file is unchanged.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing to the file
    partial = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk."""
    if os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read a checkpoint with torch.load(weights_only=True), after a check that it is undamaged.

    >>> load_checkpoint("missing.pt")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing.pt'

    Args:
        map_location: as of torch.load. `load_state_dict` copies state to where it belongs, so
            that the CPU, the default, costs no GPU memory.

    Raises:
        OSError: the file is not there or cannot be opened.
        StateError: the file is truncated, damaged, or holds other things than tensors and plain
            values.
    """
    with open(path, "rb") as file:
        try:
            damaged = _damaged_record(file)
            if not damaged:
                return torch.load(file, map_location=map_location, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds: zip, pickle, storage, seek
            reason = str(error).partition("\n")[0]
            raise StateError(
                f"cannot read the checkpoint {os.fspath(path)}: it is truncated, damaged or no "
                f"file of torch.save ({type(error).__name__}: {reason})"
            ) from error
    raise StateError(f"the checkpoint {os.fspath(path)} is damaged: its record {damaged} changed")


def _damaged_record(file: BinaryIO) -> str | None:
    """The first record of a zip file whose checksum is wrong; torch does not look at them."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return None
    with zipfile.ZipFile(file) as records:
        name = records.testzip()
    file.seek(0)
    return name
