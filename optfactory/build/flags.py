"""The flags kernels are compiled with, and what to do without those that a compiler lacks."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from optfactory.build.processor import forced_set
from optfactory.errors import BrokenCompilerError, KernelCompileError

# No fast-math: what NaN, infinities, subnormals and divisions do is part of the specification,
# and without contraction every product and sum is rounded where the rule text says so.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
OPENMP = "-fopenmp"
_X86_FLAGS = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
_OUTPUT_LENGTH = 20_000
_NO_PROGRAM = (errno.ENOENT, errno.EACCES, errno.ENOEXEC)

# What tells a flag that a compiler lacks from a kernel that it could not build this time.
_PROBE = """
int probe(int n) {
  int sum = 0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += i;
  return sum;
}
"""

Flags = tuple[str, ...]

# What compilers take, by command and wanted flags, as far as this process has asked them.
_known: dict[tuple[Flags, Flags], Flags] = {}


def wanted_flags() -> Flags:
    """The flags of the fastest kernel, in addition to `FLAGS`.

    Raises:
        ConfigError, BackendError: as `optfactory.build.processor.forced_set`.
    """
    return (*_needed_flags(), *([] if forced_set() else ["-march=native", *_X86_FLAGS]), OPENMP)


def usable_flags(command: Sequence[str], wanted: Flags, folder: Path) -> Flags:
    """The wanted flags, or those of them that the compiler takes; it is asked once a process.

    Raises:
        BrokenCompilerError: it does not even build two lines of C++; carries its output.
    """
    key = (tuple(command), wanted)
    if key not in _known:
        _known[key] = _ask(command, wanted, folder)
    return _known[key]


def missing_flags(wanted: Flags, usable: Flags) -> Flags:
    """What of the wanted flags a compiler lacks."""
    return tuple(flag for flag in wanted if flag not in usable)


def build(command: Sequence[str], flags: Sequence[str], source: str, library: Path) -> str:
    """Build a shared library; what the compiler said if there is none, else nothing.

    Raises:
        OSError: the library's folder cannot be written.
        KernelCompileError: no process can be started.
    """
    text = library.with_suffix(".cpp")
    library.unlink(missing_ok=True)
    text.write_text(source, encoding="utf-8")
    whole = [*command, *FLAGS, "-shared", *flags, str(text), "-o", str(library)]
    # What compilers keep on the way goes with the folder, also when they are killed.
    environment = os.environ | {"TMPDIR": str(library.parent)}
    try:
        done = subprocess.run(whole, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        if error.errno in _NO_PROGRAM:
            return str(error)
        raise KernelCompileError(
            f"the C++ compiler {shlex.join(command)} cannot be started now: {error.strerror}; "
            "make room for another process, or set OPTFACTORY_BACKEND=reference"
        ) from error
    if done.returncode == 0 and library.is_file():
        return ""
    said = (done.stderr.strip() or done.stdout.strip() or "nothing")[:_OUTPUT_LENGTH]
    return f"{said}\n(ended by signal {-done.returncode})" if done.returncode < 0 else said


def _needed_flags() -> Flags:
    """Flags that users insist on."""
    forced = forced_set()
    return forced.flags if forced else ()


def _ask(command: Sequence[str], wanted: Flags, folder: Path) -> Flags:
    def refusal(*flags: str) -> str:
        return build(command, flags, _PROBE, folder / "probe.so")

    if not refusal(*wanted):
        return wanted
    needed = _needed_flags()
    if said := refusal(*needed):
        raise BrokenCompilerError(
            f"the C++ compiler {shlex.join(command)} builds nothing; mend it, name another in the "
            f"variable CXX, or set OPTFACTORY_BACKEND=reference. It said:\n{said}"
        )
    # What failed above for a passing reason, and not for its flags, is now asked again.
    flags = list(needed)
    for flag in wanted[len(needed) :]:
        if not refusal(*needed, flag):
            flags.append(flag)
        elif flag == OPENMP and not refusal(*needed, "-fopenmp-simd"):
            flags.append("-fopenmp-simd")
    return tuple(flags)
