"""The folder of compiled kernels: only its owner can write to it, since what lies there is run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from multiprocessing import util
from pathlib import Path

from optfactory.errors import KernelCompileError

CACHE_VARIABLE = "OPTFACTORY_CACHE"
REMEDY = f"set {CACHE_VARIABLE} to a folder that only you can write to"

_TEMPORARY = "optfactory-kernels-"
_ABANDONED = 24 * 3600.0  # seconds since anything was added
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
        numbers = _meaning_of_process_numbers()
        if numbers:
            _remove_abandoned(f"{_TEMPORARY}{numbers}-")
        prefix = f"{_TEMPORARY}{numbers}-{process}-" if numbers else _TEMPORARY
        folder = _temporary[process] = Path(tempfile.mkdtemp(prefix=prefix))
        util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)
    return folder


def _meaning_of_process_numbers() -> str:
    """Equal where a number means the same process: one boot of one machine, one pid namespace.

    Empty where the system does not tell: a temporary folder may be shared with other containers and
    machines, whose processes cannot be seen from here.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = os.readlink("/proc/self/ns/pid")
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def _remove_abandoned(prefix: str) -> None:
    """Remove temporary caches of processes that were killed a day ago or earlier."""
    name = re.compile(rf"{re.escape(prefix)}([1-9][0-9]*)-[a-z0-9_]+")
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        for folder in Path(tempfile.gettempdir()).iterdir():
            found = name.fullmatch(folder.name)
            if found and _is_own_and_old(folder) and _has_ended(int(found[1])):
                shutil.rmtree(folder, ignore_errors=True)


def _is_own_and_old(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return own and time.time() - facts.st_mtime > _ABANDONED


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
