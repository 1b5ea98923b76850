"""Kernels do not get longer unnoticed: timings are too noisy to test, instructions are not.

A count above its ceiling by more than 5 % fails; when a change is worth it, or when kernels got
shorter, write what `python tests/instructions/count.py` prints into CEILINGS.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optfactory.build.compiler import find_compiler
from optfactory.build.processor import INSTRUCTIONS_VARIABLE, runnable_sets

ROOT = Path(__file__).parents[2]
COUNTER = Path(__file__).with_name("count.py")
UNAVAILABLE = 3  # as there
SLACK = 1.05

# Instructions an element with g++ 12; another compiler would need ceilings of its own.
COMPILER = 12
_WIDE = {
    "adamw": 1.31,
    "adamw16bit": 3.36,
    "adamw8bit": 7.1,
    "adamwfp8": 7.12,
    "adamw4bit": 9.12,
    "lamb8bit": 11.03,
    # Rounded at random.
    "lion8bit": 5.9,
    "ademamix8bit": 13.4,
}
CEILINGS = {
    "x86-64-v4-amd": _WIDE,
    "x86-64-v4-vbmi": _WIDE,
    # 8 bits took 10.87 and 17.34 with tables, of which each look-up is many micro-operations.
    "x86-64-v3": {
        "adamw": 2.7,
        "adamw16bit": 7.2,
        "adamw8bit": 13.0,
        "adamwfp8": 11.8,
        "adamw4bit": 14.2,
        "lamb8bit": 21.0,
        "lion8bit": 10.9,
        "ademamix8bit": 25.2,
    },
}


def compiler_version() -> int:
    """The major version of g++; 0 for other compilers."""
    command = find_compiler()
    if command is None:
        return 0
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"(?:g\+\+|c\+\+|gcc)\S* .*?(\d+)\.\d+\.\d+", done.stdout)
    return int(found[1]) if found and "clang" not in done.stdout else 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts with ptrace")
@pytest.mark.skipif(compiler_version() != COMPILER, reason=f"ceilings are of g++ {COMPILER}")
@pytest.mark.parametrize("instruction_set", CEILINGS)
def test_instructions_an_element(instruction_set: str) -> None:
    if instruction_set not in {item.name for item in runnable_sets()}:
        pytest.skip(f"this processor has no {instruction_set}")
    ceilings = CEILINGS[instruction_set]
    done = subprocess.run(
        [sys.executable, str(COUNTER), *ceilings],
        env=os.environ | {INSTRUCTIONS_VARIABLE: instruction_set, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    too_many = {name: counts[name] for name in counts if counts[name] > SLACK * ceilings[name]}
    assert not too_many, f"more than {SLACK} x {ceilings}"
