"""Kernels work on threads whose stacks are as small as systems allow."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from tests.unit.harness import needs_compiler

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "adam8bit": {"block_size": 4096},
    "lamb8bit": {"block_size": 4096},
    "adamw8bit": {"block_wise": False},
}

# Several chunks, so that OpenMP starts a thread, and only its stack is small.
PROGRAM = """
import sys
import torch
from tests.unit.test_small_stacks import digest
torch.set_num_threads(2)
print(digest(sys.argv[1]))
"""


def digest(name: str) -> str:
    """Of the parameters after steps with an odd end, a strided and a 16-bit tensor."""
    torch.manual_seed(0)
    whole, strided, half = torch.randn(3, 501, 523)
    params = [whole, strided.t(), half.bfloat16()]
    params = [p.requires_grad_() for p in params]
    options: dict[str, Any] = {"lr": 0.1, "percentile_clipping": 5, **CASES[name]}
    optimizer = build_optimizer(name, params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    text = b"".join(p.detach().float().numpy().tobytes() for p in params)
    return hashlib.sha256(text).hexdigest()


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_largest_blocks_need_no_more_stack_than_16_kb(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "cpu")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, name],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_STACKSIZE": "16k"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(name)
