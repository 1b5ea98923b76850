"""A forked process can go on: OpenMP's threads are gone there, and waiting for them would hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import has_compiler

ROOT = Path(__file__).parents[2]

# Enough elements for several chunks, so that the parent really starts threads.
PROGRAM = """
import os
import torch
from optfactory import build_optimizer

torch.set_num_threads(2)
p = torch.ones(1 << 18, requires_grad=True)
optimizer = build_optimizer("lamb8bit", [p], lr=0.1)
p.grad = torch.ones_like(p)
optimizer.step()
before = p.detach().clone()
child = os.fork()
optimizer.step()
# A few elements only: torch's own parallel operations would hang in the child.
changed = bool((p[:10] < before[:10]).all())
if child == 0:
    os._exit(0 if changed else 1)
assert changed
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler for the native backend")
def test_parent_and_child_both_go_on_after_a_fork() -> None:
    # A hang is what this looks for: the time limit only ends it.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPTFACTORY_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
