"""Fixture of the conformance tests: deviations from a peer, with their limits and on record."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def deviation(request: pytest.FixtureRequest) -> Iterator[Callable[[str, float, float], None]]:
    """Asserts that a deviation keeps its limit; `--junitxml` tells each test's largest ones."""
    largest: dict[str, tuple[float, float]] = {}

    def keep(what: str, value: float, limit: float) -> None:
        largest[what] = max(largest.get(what, (0.0, limit)), (float(value), limit))
        assert value <= limit, f"{what}: {value:.3g}, allowed {limit:.3g}"

    yield keep
    request.node.user_properties.extend(
        (what, f"{value:.3g} of {limit:.3g}") for what, (value, limit) in largest.items()
    )


@pytest.fixture
def backend(backend: str) -> str:
    """As everywhere, with one thread: small tensors only wait for a second one."""
    torch.set_num_threads(1)
    return backend
