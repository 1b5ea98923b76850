"""Kernels that came with the wheel: for machines without a compiler, first steps without a wait.

`optfactory.build.wheel` puts them into ``_prebuilt/<instruction set>/<label>-<digest>.so``. The
digest is that of source and flags, so that a kernel of another version or of other options is never
found.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import warnings
from functools import cache
from pathlib import Path

from optfactory.build.flags import FLAGS
from optfactory.build.processor import InstructionSet, wanted_sets

FOLDER = Path(__file__).resolve().parents[1] / "_prebuilt"


def relative_path(source: str, label: str, target: InstructionSet) -> Path:
    """Where the kernel built from a source for an instruction set lies within `FOLDER`."""
    text = "\0".join([source, *FLAGS, *target.flags])
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    return Path(target.name, f"{label}-{digest}.so")


def available() -> bool:
    """Whether there is any kernel that this processor can run.

    Raises:
        ConfigError, BackendError: as `optfactory.build.processor.forced_set`.
    """
    return any(next((FOLDER / item.name).glob("*.so"), None) for item in wanted_sets())


def load(source: str, label: str) -> ctypes.CDLL | None:
    """The prebuilt kernel of a source for the best instruction set, or None if there is none.

    Raises:
        ConfigError, BackendError: as `optfactory.build.processor.forced_set`.
    """
    for target in wanted_sets():
        path = FOLDER / relative_path(source, label, target)
        if path.is_file():
            return _load(path)
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    _share_openmp()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"the prebuilt kernel {path} cannot be loaded: {error}. Reinstall optfactory with pip; "
            "until then the kernel is compiled, or does without",
            stacklevel=2,
        )
        return None


@cache
def _share_openmp() -> None:
    """Let kernels find the OpenMP runtime that torch runs on.

    They name none themselves: wheels of torch bring their own under various names, and a second
    one would start as many threads again. Most of them make it visible to all libraries.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    for path in [*_loaded_runtimes(), "libgomp.so.1"]:
        try:
            runtime = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(runtime, "GOMP_parallel"):
            return


def _loaded_runtimes() -> list[str]:
    """The OpenMP runtimes in this process, torch's first."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    paths = sorted(set(re.findall(r"/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*$", maps, re.M)))
    return sorted(paths, key=lambda path: "/torch" not in path)
