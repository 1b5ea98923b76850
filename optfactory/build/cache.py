"""The folder of compiled kernels: only its owner can write to it, since what lies there is run."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from multiprocessing import util
from pathlib import Path

from optfactory.errors import KernelCompileError

CACHE_VARIABLE = "OPTFACTORY_CACHE"
REMEDY = f"set {CACHE_VARIABLE} to a folder that only you can write to"

_TEMPORARY = "optfactory-kernels-"
_temporary: dict[int, Path] = {}  # by process, because a forked one outlives its parent
_warned: dict[str, object] = {}


def cache_folder() -> Path:
    """The folder that OPTFACTORY_CACHE names, else the user's cache, else a temporary one.

    Raises:
        KernelCompileError: the named folder cannot be written, or others can write to it.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else _users_cache()
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        foreign = hasattr(os, "getuid") and (facts.st_uid != os.getuid() or facts.st_mode & 0o022)
        if not foreign and os.access(folder, os.W_OK):
            return folder
        reason = "belongs to or can be written by others" if foreign else "cannot be written"
    except (OSError, RuntimeError) as error:  # the latter: ~ stands for no known folder
        reason = str(error)
    problem = f"the folder for compiled kernels, {folder}, is not usable: {reason}"
    if named:
        raise KernelCompileError(f"{problem}; {REMEDY}")
    warn_once(f"{problem}. Every process compiles its kernels anew until you {REMEDY}.")
    return _temporary_folder()


def is_temporary(folder: Path) -> bool:
    """Whether a cache folder is of this process alone, because none could be had that stays."""
    return folder.name.startswith(_TEMPORARY)


def forbids_running(folder: Path) -> bool:
    """Whether a folder's file system is mounted noexec, as far as the system tells."""
    if not hasattr(os, "statvfs") or not hasattr(os, "ST_NOEXEC"):
        return False
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def other_folders(folder: Path) -> list[Path]:
    """Where files may be able to run if this folder's file system forbids it."""
    others = [Path(tempfile.gettempdir()), Path(os.path.expanduser(_users_cache()))]
    return [other for other in others if other != folder and other.is_dir()]


def warn_once(message: str) -> None:
    """Warn, unless this process has said so before."""
    token = object()
    if _warned.setdefault(message, token) is token:
        warnings.warn(message, stacklevel=2)


def _users_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "optfactory")


def _temporary_folder() -> Path:
    """Removed when the process that made it ends; children of multiprocessing count."""
    process = os.getpid()
    folder = _temporary.get(process)
    if folder is None or not folder.is_dir():
        folder = _temporary[process] = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
        util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)
    return folder
