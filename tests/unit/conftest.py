"""Fixtures of the tests that compile kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from optfactory import backends
from optfactory.backends.cpu import backend as cpu
from optfactory.build import cache as kernel_cache
from optfactory.build import flags
from optfactory.build.compiler import find_compiler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled kernels, not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OPTFACTORY_CACHE", str(folder))
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler named by CXX that notes in a file each kernel that it builds."""
    real = find_compiler()
    assert real is not None
    log, script = tmp_path / "calls", tmp_path / "noting-c++"
    log.touch()
    note = f'case "$*" in *probe.cpp*) ;; *) echo "$@" >> "{log}";; esac'
    script.write_text(f'#!/bin/sh\n{note}\nexec {" ".join(real)} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    return log


@pytest.fixture
def no_backends_yet() -> Iterator[None]:
    """Forgets what was warned of and loaded, before and after a test."""
    _forget_loaded()
    yield
    _forget_loaded()


def _forget_loaded() -> None:
    for cached in (backends._backend, cpu._library):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def fresh_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks compilers anew, and hears each warning."""
    monkeypatch.setattr(flags, "_known", {})
    monkeypatch.setattr(kernel_cache, "_warned", {})
