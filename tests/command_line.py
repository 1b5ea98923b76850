"""The command `optfactory` in this process, and what folders that run it have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from optfactory.cli import main

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str], *command: str) -> Run:
    """Runs a command with further words: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            code = main([*command, *map(str, words)])
        except SystemExit as stop:  # argparse's own way out
            code = int(str(stop.code))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def ok(result: tuple[int, str, str], code: int = 0) -> str:
    """What a command printed that has no complaint."""
    assert (result[0], result[2]) == (code, "")
    return result[1]


def refused(result: tuple[int, str, str], code: int = 1) -> str:
    """What a command said that printed no result."""
    assert (result[0], result[1]) == (code, "")
    return result[2]


@pytest.fixture(autouse=True)
def surroundings(fixed_conditions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, since nothing here computes, and no GPU, whatever this machine has."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
