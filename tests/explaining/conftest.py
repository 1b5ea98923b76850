"""Fixtures of the tests of `explain`: surroundings, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command_line import Run, runner

Write = Callable[[str, str], Path]

TINY = "tests.explaining.models:tiny"


@pytest.fixture(autouse=True)
def surroundings(fixed_conditions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, since nothing here computes, and no GPU, whatever this machine has."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `optfactory explain` in this process: exit code, stdout, stderr."""
    return runner(capsys, "explain")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the given name."""

    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
