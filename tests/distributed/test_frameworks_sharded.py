"""accelerate's and Lightning's own FSDP2, started by torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

from tests.distributed.launched import USES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> list[dict]:
    """What differed from one process, for each framework, on each of two processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("launched")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node", "2", "-m", "tests.distributed.launched", str(folder)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [*torchrun, *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return [json.loads((folder / f"process {rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("module", USES)
def test_training_is_that_of_one_process(launched: list[dict], module: str) -> None:
    if not importlib.util.find_spec(module):
        pytest.skip(f"{module} is not installed")
    assert [found[module] for found in launched] == [[], []]


def test_lightnings_fsdp_strategy_is_for_gpus() -> None:
    """Why it is not tried here; ModelParallelStrategy is."""
    lightning = pytest.importorskip("lightning")
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        lightning.Trainer(accelerator="cpu", strategy="fsdp", logger=False)
