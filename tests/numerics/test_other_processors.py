"""Kernels for other processors compute the same bits, seen on one with AVX2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optfactory.build.processor import INSTRUCTIONS_VARIABLE, runnable_sets
from tests.sampling import runs_all

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).with_name("avx512.h")
AVX2 = "x86-64-v3"

SCRIPT = """
import hashlib, torch
from optfactory import build_optimizer

digest = hashlib.sha256()
generator = torch.Generator().manual_seed(0)
draw = lambda shape: torch.randn(shape, generator=generator)
for name, asked in (
    ("lamb8bit", {}),
    ("lamb8bit", {"state_rounding": "stochastic"}),
    ("adamwfp8", {"master_weights": "split"}),
    ("adamw4bit", {}),
    ("ademamix16bit", {}),
    ("adamw", {"state_bits": {"exp_avg": 4, "exp_avg_sq": 16}}),
):
    shapes = [(20, 300), (4098,), (64, 256), (65, 65)]
    params = [draw(shape).bfloat16().requires_grad_() for shape in shapes]
    optimizer = build_optimizer(name, params, lr=1e-2, **asked)
    for step in range(3):
        for p in params:
            spread = 10 ** (-8 * torch.rand(p.shape, generator=generator))
            p.grad = (draw(p.shape) * spread).bfloat16()
        optimizer.step()
    for tensor in [*params, *(t for p in params for t in optimizer.state[p].values())]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def trained(cache: Path, *flags: str) -> str:
    """A digest of what training leaves, by kernels compiled with these flags."""
    environment = {
        INSTRUCTIONS_VARIABLE: AVX2,
        "OPTFACTORY_BACKEND": "cpu",
        "OPTFACTORY_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "CXX": " ".join(["g++", *flags]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(AVX2 not in {item.name for item in runnable_sets()}, reason=f"needs {AVX2}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_same_bits_with_avx512(tmp_path: Path) -> None:
    shim = ("-Wno-psabi", "-include", str(SHIM))
    expected = trained(tmp_path / "avx2")
    assert trained(tmp_path / "vbmi", "-DSHIM_VBMI", *shim) == expected
    if runs_all():
        assert trained(tmp_path / "avx512", *shim) == expected


@pytest.mark.slow
@pytest.mark.skipif(AVX2 not in {item.name for item in runnable_sets()}, reason=f"needs {AVX2}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_same_bits_with_vectors_of_four(tmp_path: Path) -> None:
    """Those of NEON, here of x86; and by look-ups in tables, as x86 processors without AVX2."""
    expected = trained(tmp_path / "eight")
    assert trained(tmp_path / "four", "-mno-avx2", "-DTEST_VECTORS_OF_FOUR") == expected
    if runs_all():
        assert trained(tmp_path / "tables", "-mno-avx2") == expected
