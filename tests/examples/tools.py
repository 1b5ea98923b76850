"""What the tests of examples/sweep.py share: the script as a process, runs, pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["steps=12", "warmup=2", "eval_every=6", "eval_batches=2", "batch=4", "context=16"]
TINY += ["model.width=64", "model.depth=1", "model.heads=2"]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "sweep.py"), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_of(
    name: str, val_loss: float = 2.0, state_bytes: int = 800, seed: int = 0
) -> dict[str, Any]:
    figures = {"optimizer": name, "val_loss": val_loss, "state_bytes": state_bytes, "seed": seed}
    where = {"model": "a model of two blocks", "device": "Abacus 2, 2 threads"}
    return {**figures, **where, "parameters": 100, "unigram_loss": 3.0}


def figures_of(comparison: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are drawn from now on."""
    kept: list[Any] = []
    subplots = comparison.plt.subplots

    def keep(**options: Any) -> Any:
        figure, axes = subplots(**options)
        kept.append(figure)
        return figure, axes

    monkeypatch.setattr(comparison.plt, "subplots", keep)
    return kept
