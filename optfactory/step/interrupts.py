"""Signals that wait, so that Ctrl-C does not cut in two what must be whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Those for which programs install handlers that raise or save a checkpoint. SIGINT comes first:
# once it waits, nothing usual can interrupt the rest.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGBREAK")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], Any]


class Uninterrupted:
    """Within its block Python's signal handlers wait; they run when it is left.

    Only the main thread runs handlers, so that elsewhere it has nothing to do. Handlers that are
    not Python's (a debugger's, the system's) are left alone.
    """

    def __init__(self) -> None:
        self._held: dict[int, Handler] = {}
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._held[number] = handler
                    signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        for number, frame in self._noted:
            self._held[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))

    def _restore(self) -> None:
        for number in reversed(self._held):
            signal.signal(number, self._held[number])
