"""examples/resharding.py as a user runs it: the same losses on any number of processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="torch was built without gloo",
    ),
]


def test_losses_are_those_of_one_process_unless_state_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "resharding.py"), "lion8bit"),
            *("--processes", "2,1", "--steps", "3", "--plot", "picture.png"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(
        r"^(.+): last loss [\d.]+, at most (\S+) from one process$", done.stdout, re.M
    )
    apart = {label: float(far) for label, far in lines}
    assert list(apart) == ["one process", "resharded", "resharded, state lost"]
    assert apart["resharded"] == 0
    assert apart["resharded, state lost"] > 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
