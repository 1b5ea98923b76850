"""Fixtures of the tests with Hugging Face's, Lightning's and torch's own training tools."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def small_and_paged(fixed_conditions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a small model are paged under paged names, and one thread is enough for them."""
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    torch.set_num_threads(1)
