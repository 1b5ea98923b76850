"""Fixtures of the tests of `explain`: surroundings, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Run, runner, surroundings

__all__ = ["surroundings"]  # for all tests here

Write = Callable[[str, str], Path]

TINY = "tests.explaining.models:tiny"


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
