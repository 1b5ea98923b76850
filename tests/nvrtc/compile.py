"""What NVRTC's assembler reports about compiled kernels."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import pytest

from optfactory.backends.cuda.nvrtc import compile_cubin, nvrtc_version
from optfactory.errors import BackendError

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")


def missing_nvrtc() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        nvrtc_version()
    except ImportError as error:
        return f"CuPy is not installed: {error}"
    except BackendError as error:
        return str(error)
    return ""


_MISSING = missing_nvrtc()
needs_nvrtc = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "NVRTC is there")


@dataclass(frozen=True)
class Usage:
    """What one kernel occupies on a multiprocessor; bytes but for registers.

    Attributes:
        registers: of each thread.
        stack_frame: local memory of each thread, that of called functions included; where
            spilled registers lie too.
        spill_stores, spill_loads: of each thread, counted in the code.
        shared_memory: of each block.
    """

    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int
    shared_memory: int


# The assembler's lines on one entry function; between them lie others on time and constants.
_PROPERTIES = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
_ENTRY = re.compile(
    rf"Compiling entry function '(\w+)'.*?{_PROPERTIES}.*?Used (\d+) registers([^\n]*)", re.DOTALL
)


def assert_complete(cubin: bytes) -> None:
    """The file is as long as its ELF header says; drivers refuse a truncated one."""
    assert cubin.startswith(b"\x7fELF")
    (headers,) = struct.unpack_from("<Q", cubin, 32)
    size, count = struct.unpack_from("<HH", cubin, 54)
    assert len(cubin) == headers + size * count


def usage_of(source: str, name: str, architecture: str) -> dict[str, Usage]:
    """The usage of every ``extern "C"`` kernel in a source, compiled as for a device."""
    cubin, log = compile_cubin(source, name, architecture, ("--ptxas-options=-v",))
    assert_complete(cubin)
    found = {}
    for kernel, frame, stores, loads, registers, rest in _ENTRY.findall(log):
        frame = max(int(frame), _amount(rest, "cumulative stack size"))
        shared = _amount(rest, "smem")
        found[kernel] = Usage(int(registers), frame, int(stores), int(loads), shared)
    assert len(found) == log.count("Compiling entry function"), f"a kernel is missing in:\n{log}"
    return found


def _amount(text: str, what: str) -> int:
    """The bytes that a line gives for something; what is 0 is left out there."""
    match = re.search(rf"(\d+) bytes {what}", text)
    return int(match[1]) if match else 0
