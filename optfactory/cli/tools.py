"""Commands that look at models and machines: plan, doctor, bench. They load torch when they run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from optfactory.catalog.overrides import UsageError, read_config
from optfactory.cli.output import print_json

DTYPES = ("float32", "bfloat16", "float16")
_PICTURES = (".png", ".pdf", ".svg")
_PAGES = (".html", ".htm")


def plan(arguments: argparse.Namespace) -> int:
    """`optfactory plan`; exit code 1 if a rule matches nothing or it does not fit."""
    from optfactory.factory import resolve
    from optfactory.planning.memory_plan import plan, read_size
    from optfactory.planning.model import load_model
    from optfactory.planning.spread import read_mesh, read_scheme

    picture = None if arguments.plot is None else picture_file(arguments.plot)
    page = None if arguments.html is None else _file("--html", arguments.html, _PAGES)
    read_size(arguments.memory)
    read_scheme(arguments.shard, read_mesh(arguments.mesh))
    # All words first: they are checked in no time, and the model may be slow to make.
    config = resolve(read_config(arguments.source, arguments.overrides))
    with contextlib.redirect_stdout(sys.stderr):  # what a user's code prints is no result
        model = load_model(arguments.model, arguments.dtype)
    planned = plan(
        config,
        model,
        device=arguments.device,
        memory=arguments.memory,
        mesh=arguments.mesh,
        shard=arguments.shard,
        names=arguments.names.split(","),
    )
    if arguments.json:
        print_json(planned.as_dict())
    else:
        print(planned)
    if picture:
        from optfactory.planning.plot import plot

        with written(picture):
            plot(planned, picture, arguments.model)
    if page:
        _write(page, planned.to_html(arguments.model))
    return 1 if planned.unmatched or planned.verdict() == "no" else 0


def _file(option: str, text: str, endings: tuple[str, ...]) -> Path:
    path = Path(text)
    if path.suffix.lower() not in endings:
        raise UsageError(f"{option} takes a file ending in {', '.join(endings)}, got {text!r}")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: there is no folder {path.parent}")
    return path


def _write(path: Path, text: str) -> None:
    with written(path):
        path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """While a file is written.

    Raises:
        UsageError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def picture_file(text: str) -> Path:
    """The file of `--plot`.

    Raises:
        UsageError: it cannot be drawn; known before any work.
    """
    path = _file("--plot", text, _PICTURES)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run: pip install matplotlib")
    return path


def doctor(arguments: argparse.Namespace) -> int:
    """`optfactory doctor`; exit code 1 if something is broken."""
    from optfactory.doctor import checks

    findings = checks()
    if arguments.json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print(*findings, sep="\n")
    return 1 if any(finding.status == "broken" for finding in findings) else 0


def bench(arguments: argparse.Namespace) -> int:
    """`optfactory bench`."""
    from optfactory.bench.command import run

    return run(arguments.words)
