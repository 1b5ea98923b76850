"""Where kernels are built with sanitizers (a step of .ci/run), these do stop at a planted bug."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.harness import SANITIZED

ROOT = Path(__file__).parents[2]

SOURCE = r"""
extern "C" void write_behind(float* x, long n) { x[n] = 1.0f; }
extern "C" int count_up(int n) { return n + 1; }
extern "C" float read_between(const char* x) { return *reinterpret_cast<const float*>(x + 1); }
"""
PLANTED = {
    "write_behind": ("x.data_ptr(), 5", "heap-buffer-overflow"),
    "count_up": ("2**31 - 1", "signed integer overflow"),
    "read_between": ("x.data_ptr()", "misaligned address"),
}
SCRIPT = """
import ctypes, sys, torch
from optfactory.build.compiler import load_library
x = torch.zeros(5)
library = load_library(sys.argv[1], "planted")
print(library.BUG(*(ctypes.c_long(a) for a in (ARGUMENTS,))))
"""


@pytest.mark.skipif(not SANITIZED, reason="CXX asks for no sanitizers")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_stops_the_process(bug: str) -> None:
    call, complaint = PLANTED[bug]
    script = SCRIPT.replace("BUG", bug).replace("ARGUMENTS", call)
    done = subprocess.run(
        [sys.executable, "-c", script, SOURCE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert complaint in done.stderr
