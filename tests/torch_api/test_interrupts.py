"""Ctrl-C and other signals wait until a step is whole."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from optfactory import Optimizer2State, backends, build_optimizer
from optfactory.step.interrupts import Uninterrupted
from tests.torch_api.harness import SHAPES, held, parameters, train

in_steps = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def interrupted_at(
    optimizer: Optimizer2State, patch: pytest.MonkeyPatch, number: int, which: int
) -> None:
    """Let a signal arrive before the update of the optimizer's n-th bucket."""
    backend = backends.backend_for(held(optimizer)[0].device)
    real, calls = backend.update, []

    def update(bucket: Any) -> Any:
        calls.append(bucket)
        if len(calls) == which:
            signal.raise_signal(number)
        yield from real(bucket)

    patch.setattr(backend, "update", update)


@in_steps
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_signal_that_raises_leaves_a_whole_step(
    which: int, number: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        optimizer = build_optimizer("adam8bit", parameters())
        train(optimizer, range(1))
        interrupted_at(optimizer, monkeypatch, number, which)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert {optimizer.state[p]["step"].item() for p in held(optimizer)} == {2}
    assert len(held(optimizer)) == len(SHAPES)


def test_every_signal_that_arrived_is_handled_when_the_block_is_left() -> None:
    handled: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    before = {n: signal.signal(n, lambda n, frame: handled.append(n)) for n in numbers}
    try:
        with Uninterrupted():
            for number in numbers:
                signal.raise_signal(number)
            assert not handled
        assert handled == list(numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_leave_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
