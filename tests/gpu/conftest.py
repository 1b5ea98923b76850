"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """State is paged from 1000 elements on, and moves in many pieces."""
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    monkeypatch.setattr("optfactory.backends.cuda.paging.PIECE_BYTES", 2**15)
