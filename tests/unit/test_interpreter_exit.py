"""Steps at the interpreter's end, when no thread can be started any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.harness import needs_compiler

ROOT = Path(__file__).resolve().parents[2]

# One optimizer with one kernel and one with several; nothing was compiled before the end.
STEPS = """
import atexit, sys, threading
import torch
from optfactory import build_optimizer

dtypes = (torch.float32, torch.bfloat16, torch.float16)
params = [torch.ones(300, dtype=dtype).requires_grad_() for dtype in dtypes]
optimizers = [
    build_optimizer("adam", part, master_weights="none") for part in (params[:1], params[1:])
]

def steps():
    for optimizer in optimizers:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    print("stepped")
"""
AT_EXIT = {
    "an atexit handler": "atexit.register(steps)",
    "a thread that outlives main": (
        "def wait():\n    threading.main_thread().join()\n    steps()\n"
        "threading.Thread(target=wait).start()"
    ),
}


@needs_compiler
@pytest.mark.parametrize("where", AT_EXIT)
def test_kernels_are_compiled_at_the_interpreters_end(where: str, cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEPS + AT_EXIT[where]],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPTFACTORY_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("stepped\n", "")
    assert len(list(cache.glob("*.so"))) == 3
