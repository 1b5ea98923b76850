"""Fixtures of the planning tests: surroundings, and the command in this process."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_line import Run, runner, surroundings

__all__ = ["surroundings"]  # for all tests here

Factory = Callable[..., str]

_numbers = itertools.count()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `optfactory plan` in this process: exit code, stdout, stderr."""
    return runner(capsys, "plan")


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Factory]:
    """Writes a module into the current, else empty folder; gives what `--model` takes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(text: str = "", attribute: str = "make") -> str:
        name = f"planned_{os.getpid()}_{next(_numbers)}"
        head = "import torch\nfrom torch import nn\n"
        (tmp_path / f"{name}.py").write_text(f"{head}{text}\n", encoding="utf-8")
        return f"{name}:{attribute}"

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("planned_"):
            del sys.modules[name]
