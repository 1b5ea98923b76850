"""Fixtures of the tests that compile kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from optfactory import backends
from optfactory.backends.cpu import backend as cpu


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled kernels, not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OPTFACTORY_CACHE", str(folder))
    return folder


@pytest.fixture
def no_backends_yet() -> Iterator[None]:
    """Forgets what was warned of and loaded, before and after a test."""
    caches = (backends._backend, cpu._library)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
