"""Which instruction sets a processor is taken to have, and which one is used."""

from __future__ import annotations

import platform
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from optfactory.build import processor
from optfactory.build.compiler import find_compiler
from optfactory.errors import BackendError, ConfigError
from tests.unit.harness import needs_compiler

# Lines of /proc/cpuinfo, shortened to what decides and some of what does not.
CORE2 = (
    "fpu vme de pse tsc msr cx8 mmx fxsr sse sse2 ht syscall nx lm pni monitor ssse3 cx16 sse4_1"
)
NEHALEM = f"{CORE2} sse4_2 popcnt lahf_lm"
SANDY_BRIDGE = f"{NEHALEM} aes xsave avx"
HASWELL = f"{SANDY_BRIDGE} fma movbe f16c rdrand abm bmi1 avx2 smep bmi2 erms invpcid"
CASCADE_LAKE = f"{HASWELL} avx512f avx512dq clflushopt avx512cd avx512bw avx512vl avx512_vnni"
ICE_LAKE = f"{CASCADE_LAKE} avx512ifma avx512vbmi avx512_vbmi2 gfni avx512_bitalg"
GENOA = f"{ICE_LAKE} sse4a"
XEON_PHI = f"{HASWELL} avx512f avx512cd avx512er avx512pf"
GRAVITON = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics"

V2, V3, V4, VBMI = "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-vbmi"
AMD = "x86-64-v4-amd"


def cpuinfo(*flags: str, key: str = "flags") -> str:
    lines = "processor\t: {}\nmodel name\t: flags of avx512vbmi\n{}\t\t: {}\nbugs\t\t: avx2\n\n"
    return "".join(lines.format(number, key, text) for number, text in enumerate(flags))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this machine look like another one."""

    def pretend(text: str, kind: str = "x86_64") -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(platform, "machine", lambda: kind)
        monkeypatch.delenv("OPTFACTORY_INSTRUCTIONS", raising=False)

    return pretend


def names(sets):
    return [item.name for item in sets]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (CORE2, []),
        (NEHALEM, [V2]),
        (SANDY_BRIDGE, [V2]),
        (HASWELL, [V3, V2]),
        (CASCADE_LAKE, [V4, V3, V2]),
        (XEON_PHI, [V3, V2]),
        (ICE_LAKE, [VBMI, V4, V3, V2]),
        (GENOA, [AMD, VBMI, V4, V3, V2]),
        (ICE_LAKE.replace("avx2 ", ""), [V2]),  # as hypervisors may hide a part
    ],
)
def test_a_processor_has_the_sets_whose_features_it_lists(flags, expected, machine):
    machine(cpuinfo(flags, flags))
    assert names(processor.runnable_sets()) == expected
    assert names(processor.wanted_sets()) == expected


def test_arm_processors_list_their_features_under_another_name(machine):
    machine(cpuinfo(GRAVITON, key="Features"), "aarch64")
    assert names(processor.runnable_sets()) == ["armv8-a"]
    machine(cpuinfo(GRAVITON.replace("asimd", ""), key="Features"), "aarch64")
    assert processor.runnable_sets() == []


def test_threads_move_between_unlike_processors_so_all_of_them_count(machine):
    machine(cpuinfo(ICE_LAKE, HASWELL, ICE_LAKE))
    assert names(processor.runnable_sets()) == [V3, V2]


@pytest.mark.parametrize(
    ("text", "kind"), [("", "x86_64"), (cpuinfo(ICE_LAKE), "ppc64le"), ("flags\n", "x86_64")]
)
def test_what_is_not_known_has_none(text, kind, machine):
    machine(text, kind)
    assert processor.runnable_sets() == []


def test_a_system_without_cpuinfo_has_none(machine, tmp_path):
    machine("")
    (tmp_path / "cpuinfo").unlink()
    assert processor.runnable_sets() == []


# ---- the variable ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted", "forced"),
    [
        ("auto", [VBMI, V4, V3, V2], None),
        ("native", [], None),
        (VBMI, [VBMI], VBMI),
        (V4, [V4], V4),
        (V3, [V3], V3),
        (V2, [V2], V2),
    ],
)
def test_the_variable_chooses(value, wanted, forced, machine, monkeypatch):
    machine(cpuinfo(ICE_LAKE))
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", value)
    assert names(processor.wanted_sets()) == wanted
    found = processor.forced_set()
    assert (found and found.name) == forced


@pytest.mark.parametrize("value", ["avx2", "", "armv8-a", "X86-64-V3", "auto "])
def test_an_unknown_set_is_refused_with_what_is_allowed(value, machine, monkeypatch):
    machine(cpuinfo(ICE_LAKE))
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", value)
    with pytest.raises(ConfigError, match="OPTFACTORY_INSTRUCTIONS") as caught:
        processor.wanted_sets()
    for word in (repr(value), "auto", "native", VBMI, V4, V3, V2):
        assert word in str(caught.value)


def test_a_set_that_the_processor_lacks_is_refused_with_what_is_missing(machine, monkeypatch):
    machine(cpuinfo(CASCADE_LAKE))
    monkeypatch.setenv("OPTFACTORY_INSTRUCTIONS", VBMI)
    with pytest.raises(BackendError, match="lacks avx512vbmi; set it to auto"):
        processor.wanted_sets()


# ---- what compilers make of the flags --------------------------------------------------------

# How Linux calls what compilers call otherwise, and of which features some are a part.
ALIASES = {"bmi": "bmi1", "lzcnt": "abm", "sse3": "pni", "lahf_sahf": "lahf_lm"}
ALIASES |= {"gcc_have_sync_compare_and_swap_16": "cx16", "crc32": "sse4_2"}
PARTS = {"evex256": "avx512vl", "evex512": "avx512f"}


def features_of(*flags: str) -> set[str]:
    command = [*find_compiler(), *flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    macros = {name.lower() for name in re.findall(r"^#define __(\w+?)(?:__)? 1$", text, re.M)}
    known = {(ALIASES | PARTS).get(name, name) for name in macros}
    return {name for name in known if not name.startswith("fp_fast_")}


# On other machines the only set is the least that all of them have.
X86_SETS = [target for target in processor.own_sets() if target.machine == "x86_64"]


@needs_compiler
@pytest.mark.parametrize("target", X86_SETS, ids=lambda target: target.name)
def test_compilers_use_no_more_than_a_processor_is_asked_for(target):
    used = features_of(*target.flags) - features_of("-march=x86-64")
    assert used == target.features


def test_sets_are_sorted_so_that_the_first_one_is_the_best():
    for machine in {target.machine for target in processor.INSTRUCTION_SETS}:
        own = [t.features for t in processor.INSTRUCTION_SETS if t.machine == machine]
        assert all(better > worse for better, worse in pairwise(own))
