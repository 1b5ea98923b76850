"""The command `optfactory` in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
