"""examples/plan_memory.py as a user runs it, and its model from the command line."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optfactory import list_optimizers
from tests.families import states_of

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


NOT = "It does not fit: 25.29 GiB, and 14.02 GiB that can leave, of 24.00 GiB."


def assert_says(out: str, verdict: str, last: str) -> None:
    lines = out.splitlines()
    assert lines[0] == "paged_adamw8bit for 291 trained tensors of 6,738,415,616 elements"
    assert [line for line in lines if line.startswith(verdict)]
    assert lines[-1] == f"without paging anything out, {last}"
    for group in ("embeddings", "no_decay", "head", "default"):
        assert [line for line in lines if line.startswith(group)]


def test_by_default_it_says_that_24_gib_are_too_few(tmp_path: Path) -> None:
    out = run(tmp_path, str(ROOT / "examples" / "plan_memory.py"))
    assert_says(out, NOT, "24GiB are enough for: none")


# Weights and gradients of 16 bits take 25 GiB, each state of 4 bits 3.3, of 8 bits 6.4, of 16 bits
# 12.6.
MOST = {"4bit": 3, "8bit": 2, "fp8": 2, "16bit": 1}
TWO_STATES = [
    name
    for name in list_optimizers()
    if len(states_of(name)) <= next((n for end, n in MOST.items() if name.endswith(end)), 0)
]


@pytest.mark.parametrize(("memory", "names"), [("40GiB", TWO_STATES), ("1TB", list_optimizers())])
def test_it_lists_the_names_that_fit(
    memory: str,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", memory])
    runpy.run_path(str(ROOT / "examples" / "plan_memory.py"), run_name="__main__")
    assert_says(
        capsys.readouterr().out, "It fits: ", f"{memory} are enough for: {', '.join(names)}"
    )


def test_its_model_is_planned_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("-m", "optfactory", "plan", "paged_adamw8bit", "--model", "examples.plan_memory:llama")
    out = run(tmp_path, *words, "--names", "*adamw*", "--plot", "plan.png")
    assert "6,738,415,616 elements" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
