"""Fixtures of the tests against torch's optimizer API."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def small_tensors(fixed_conditions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paged from 1000 elements on, and too small for more than one thread."""
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    torch.set_num_threads(1)
