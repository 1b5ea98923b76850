"""Instruction sets: which ones kernels are built for, and which of them this processor has.

The environment variable OPTFACTORY_INSTRUCTIONS chooses, read when a kernel is first needed:
``auto`` (the default) takes the best prebuilt kernel that this processor can run and compiles the
others for this very processor, ``native`` compiles all, and the name of an instruction set insists
on it.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from optfactory.errors import BackendError, ConfigError

INSTRUCTIONS_VARIABLE = "OPTFACTORY_INSTRUCTIONS"
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class InstructionSet:
    """A set of instructions that compilers can be told to use.

    Attributes:
        name: also of the folder of its prebuilt kernels.
        machine: as `platform.machine` says.
        features: what /proc/cpuinfo must list.
        flags: what makes compilers use exactly these instructions.
    """

    name: str
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]


_V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# The best ones first. VBMI, which looks 8-bit codes up in registers, came with Ice Lake and Zen 4;
# kernels for processors of AMD, which alone have SSE4a, gather less.
INSTRUCTION_SETS = (
    InstructionSet(
        "x86-64-v4-amd",
        "x86_64",
        _V4 | {"avx512vbmi", "sse4a"},
        ("-march=x86-64-v4", "-mavx512vbmi", "-msse4a", "-mprefer-vector-width=512"),
    ),
    InstructionSet(
        "x86-64-v4-vbmi",
        "x86_64",
        _V4 | {"avx512vbmi"},
        ("-march=x86-64-v4", "-mavx512vbmi", "-mprefer-vector-width=512"),
    ),
    InstructionSet("x86-64-v4", "x86_64", _V4, ("-march=x86-64-v4", "-mprefer-vector-width=512")),
    InstructionSet("x86-64-v3", "x86_64", _V3, ("-march=x86-64-v3",)),
    InstructionSet("x86-64-v2", "x86_64", _V2, ("-march=x86-64-v2",)),
    InstructionSet("armv8-a", "aarch64", frozenset({"asimd"}), ("-march=armv8-a",)),
)


def cpuinfo() -> str:
    """What Linux says of the processors; empty where it cannot be read."""
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def own_sets() -> list[InstructionSet]:
    """The instruction sets for this kind of machine, whether the processor has them or not."""
    return [item for item in INSTRUCTION_SETS if item.machine == platform.machine()]


def runnable_sets() -> list[InstructionSet]:
    """The instruction sets that this processor has, the best one first."""
    features = _common_features(cpuinfo())
    return [item for item in own_sets() if item.features <= features]


def wanted_sets() -> list[InstructionSet]:
    """The instruction sets of which a prebuilt kernel may be taken, the best one first.

    Raises:
        ConfigError, BackendError: as `forced_set`.
    """
    if _choice() == "native":
        return []
    forced = forced_set()
    return [forced] if forced else runnable_sets()


def forced_set() -> InstructionSet | None:
    """The instruction set that OPTFACTORY_INSTRUCTIONS insists on, if any.

    Raises:
        ConfigError: there is none of that name for this kind of machine.
        BackendError: this processor does not have it.
    """
    choice = _choice()
    if choice in ("auto", "native"):
        return None
    known = {item.name: item for item in own_sets()}
    if choice not in known:
        raise ConfigError(
            f"{INSTRUCTIONS_VARIABLE} is {choice!r}; "
            f"allowed are {', '.join(['auto', 'native', *known])}"
        )
    missing = known[choice].features - _common_features(cpuinfo())
    if missing:
        raise BackendError(
            f"{INSTRUCTIONS_VARIABLE} is {choice!r}, but this processor lacks "
            f"{', '.join(sorted(missing))}; set it to auto"
        )
    return known[choice]


def _choice() -> str:
    return os.environ.get(INSTRUCTIONS_VARIABLE, "auto")


def _common_features(text: str) -> frozenset[str]:
    """What all processors have: a machine may mix different ones, and threads move between them."""
    found = [
        frozenset(values.split())
        for key, _, values in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*found) if found else frozenset()
