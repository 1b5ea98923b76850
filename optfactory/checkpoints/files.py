"""Checkpoint files that are whole: the old one or the new one, whatever happens between."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

from optfactory.checkpoints.contents import problems, refused_classes, storable
from optfactory.errors import StateError

# Of the name in the temporary file's, which is longer by 38 letters, where most systems take 255.
_SHOWN_BYTES = 60

# Classes that their package declares safe to load, as it is imported.
_DECLARED_SAFE = "torchao.optim."


def save_checkpoint(path: str | os.PathLike[str], obj: Any) -> None:
    """Write a checkpoint with torch.save so that no crash leaves half of it.

    The new file is written beside the old one, forced to the disk and renamed over it. A process
    that is killed meanwhile leaves the old file, and may leave `.<name>.<random>.tmp` beside it
    (of a long name only the beginning).

    Only what `load_checkpoint` reads is written: numbers and texts of NumPy, and of classes derived
    from Python's, become Python's own, anything else that it refuses is refused here.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/last.pt", {"step": 7})
    ...     load_checkpoint(f"{folder}/last.pt")
    {'step': 7}

    Args:
        path: the file to write; its folder must exist.
        obj: what torch.save takes, usually a dict of state dicts.

    Raises:
        OSError: there is no room or no permission, or something other than a file is there; the
            old file is unchanged.
        StateError: there is an object that `load_checkpoint` would refuse; says where and what to
            store in its place. The old file is unchanged.
    """
    _refuse_what_is_no_file(path)
    target = Path(os.path.realpath(path))  # a link keeps pointing to the file
    begin = os.fsencode(target.name)[:_SHOWN_BYTES].decode(errors="ignore")
    partial = target.with_name(f".{begin}.{uuid4().hex}.tmp")
    try:
        with partial.open("x+b") as file:
            _write(file, storable(obj))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _refuse_what_is_no_file(path: str | os.PathLike[str]) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise OSError(
            errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL,
            f"{kind} is there, which a checkpoint would replace; give the path of a file, or write "
            "into what is there with torch.save",
            os.fspath(path),
        )


def _write(file: BinaryIO, obj: Any) -> None:
    """Write with torch.save what can be read back.

    Raises:
        StateError: something in the object cannot.
    """
    try:
        torch.save(obj, file)
        refused = refused_classes(file)
        if not refused:
            return
        cause: Exception | None = None
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        refused, cause = [], error
    found = problems(obj)
    if cause is not None and not found:
        raise cause
    listed = "".join(f"\n  {problem}" for problem in found or refused)
    raise StateError(
        "cannot save the checkpoint: it holds what torch.load(weights_only=True), and so "
        f"load_checkpoint, does not read:{listed}"
    ) from cause


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
        StateError: the file is truncated or damaged, or is whole and holds other things than
            tensors and plain values.
    """
    with open(path, "rb") as file:
        try:
            damaged = _damaged_record(file)
            if not damaged:
                return torch.load(file, map_location=map_location, weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds: zip, pickle, storage, seek
            raise StateError(f"cannot read the checkpoint {_why(path, file, error)}") from error
    raise StateError(f"the checkpoint {os.fspath(path)} is damaged: its record {damaged} changed")


def _why(path: str | os.PathLike[str], file: BinaryIO, error: Exception) -> str:
    """Which file could not be read, and why."""
    reason = str(error).partition("\n")[0]
    is_refusal = isinstance(error, pickle.UnpicklingError)
    refused = refused_classes(file, str(error)) if is_refusal else []
    if refused and all(name.startswith(_DECLARED_SAFE) for name in refused):
        return (
            f"{os.fspath(path)}: it holds {', '.join(refused)}, which torch knows as safe once "
            "torchao.optim is imported; the file need not be damaged. Import it before you load"
        )
    if refused:
        return (
            f"{os.fspath(path)}: it holds {', '.join(refused)}, which weights_only=True does not "
            "call, as that may run foreign code; the file need not be damaged. If you trust who "
            "wrote it, read it with torch.load(path, weights_only=False), and save it again with "
            "plain values in place of these objects"
        )
    what = "it is truncated, damaged or no file of torch.save"
    if is_refusal and zipfile.is_zipfile(file):  # its checksums were right
        what, reason = "it is whole, and weights_only=True does not read all of it", str(error)
    return f"{os.fspath(path)}: {what} ({type(error).__name__}: {reason})"


def _damaged_record(file: BinaryIO) -> str | None:
    """The first record of a zip file whose checksum is wrong; torch does not look at them."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return None
    with zipfile.ZipFile(file) as records:
        name = records.testzip()
    file.seek(0)
    return name
