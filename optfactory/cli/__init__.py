"""The command `optfactory`: list, show, check, copy, schema, configs, plan, explain, bench, doctor.

Exit codes: 0 all is well; 1 an invalid config, drifted config files, a plan that does not fit,
rules or a scheduler that would fail, or something that `doctor` found broken; 2 wrong usage.
Results go to stdout and errors to stderr, as JSON with `--json`. Only `plan`, `explain`, `bench`
and `doctor` load torch. `bench` reads its own options, and its `--json` names a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from optfactory.catalog.overrides import UsageError
from optfactory.cli import parser
from optfactory.cli.output import patient_stdout
from optfactory.errors import OptFactoryError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse itself exits with 2 on wrong usage."""
    with patient_stdout():
        arguments = parser.parse(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        try:
            return command(arguments)
        except OptFactoryError as error:
            _report(error, arguments.json)
            return 2 if isinstance(error, UsageError) else 1


def _report(error: OptFactoryError, as_json: bool) -> None:
    if as_json:
        problems = list(getattr(error, "problems", ()))
        detail = {"type": type(error).__name__, "message": str(error), "problems": problems}
        print(json.dumps({"error": detail}, indent=2), file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)
