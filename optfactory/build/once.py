"""Files of the kernel cache are built once, by one process, while others that want them wait."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optfactory.build.cache import REMEDY
from optfactory.errors import KernelCompileError

if sys.platform != "win32":
    import fcntl

_LOG = logging.getLogger("optfactory")
_PREFIX = "build-"
_POLL = 0.1  # seconds
# After so long one builds beside whoever has the lock, which may be a stopped process.
_PATIENCE = 600.0
# Folders that tell nothing of their process are taken to be abandoned after a day.
_OLD = 24 * 3600.0

# Locks are shared with forked processes, which would hold them for as long as they live.
_held: set[int] = set()


def _drop_locks() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder to build a file of the cache in; no other process builds the same one meanwhile.

    Ask again whether the file is there: others may have built it in the meantime.

    Raises:
        KernelCompileError: the file cannot be written.
    """
    try:
        with _lock(target) as locked:
            _remove_abandoned(target.parent, target.stem if locked else "")
            prefix = _prefix(target.stem) if locked else _PREFIX
            with tempfile.TemporaryDirectory(
                prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
            ) as folder:
                yield Path(folder)
    except OSError as error:
        raise KernelCompileError(
            f"the compiled kernel {target} cannot be written: {error.strerror}; free some room, "
            f"or {REMEDY}"
        ) from error


def install(file: Path, target: Path, started: float) -> None:
    """Move a file that is whole into place, and log how long it took since `time.monotonic`."""
    os.replace(file, target)
    _LOG.info("compiled the kernel %s in %.1f s", target.name, time.monotonic() - started)


@contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Whether the lock of a file was had; not where the file system knows no locks."""
    path = _lock_file(target.parent, target.stem)
    handle = _acquire(path, _PATIENCE)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _release(path, handle)


def _acquire(path: Path, patience: float) -> int | None:
    """An open file that is locked, or None if others keep it locked or there are no locks.

    The file is removed when it is unlocked: what was locked counts only while it is still there.
    """
    until = time.monotonic() + patience
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        _held.add(handle)
        try:
            _flock(handle)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass  # removed by the one that had it
        except BlockingIOError:
            if time.monotonic() >= until:
                _close(handle)
                return None
            time.sleep(_POLL)
        except OSError:
            _release(path, handle)
            return None
        except BaseException:  # Ctrl-C while waiting
            _close(handle)
            raise
        _close(handle)


def _flock(handle: int) -> None:
    if sys.platform == "win32":
        raise OSError("no locks")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(path: Path, handle: int) -> None:
    with suppress(OSError):
        path.unlink()
    _close(handle)


def _close(handle: int) -> None:
    _held.remove(handle)
    os.close(handle)


def _lock_file(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.lock"


def _prefix(stem: str) -> str:
    """Of a folder whose process has the lock of this file; it may mean nothing to other hosts."""
    host = re.sub(r"\W", "_", platform.node())
    return f"{_PREFIX}{host}-{stem}-"


def _remove_abandoned(cache: Path, locked: str) -> None:
    """Remove what killed processes were building; the lock of one file is ours already."""
    own = _prefix("").removesuffix("-")
    for folder in cache.glob(f"{_PREFIX}*"):
        stem = folder.name.removeprefix(own).rpartition("-")[0]
        if not folder.name.startswith(own):
            if _age(folder) > _OLD:
                shutil.rmtree(folder, ignore_errors=True)
        elif stem == locked:
            shutil.rmtree(folder, ignore_errors=True)
        elif (handle := _acquire(path := _lock_file(cache, stem), patience=0.0)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _release(path, handle)


def _age(folder: Path) -> float:
    """In seconds; that of a folder which is gone is 0."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0
