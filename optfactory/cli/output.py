"""How commands print."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextmanager
def patient_stdout() -> Iterator[None]:
    """Let a command go on after its reader left, as `head` does: files may be yet to be written."""
    given = sys.stdout
    try:
        given.flush()
        descriptor = given.fileno()
    except (AttributeError, OSError, ValueError):  # there is none, or it stands for something else
        yield
        return
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Pipe(descriptor)),
        encoding=given.encoding,
        errors=given.errors,
        line_buffering=bool(given.line_buffering),
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = given


class _Pipe(io.RawIOBase):
    """Writes to a file descriptor, and drops what nobody reads any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def print_json(value: object) -> None:
    """Print a value as JSON; it has no infinite numbers, and configs are read from text too."""
    print(json.dumps(_without_infinities(value), indent=2, allow_nan=False))


def _without_infinities(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
