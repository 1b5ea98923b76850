"""Fixtures of the tests on the emulator."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(fixed_conditions: None) -> None:
    """Tensors are small here: a second thread would only be waited for."""
    torch.set_num_threads(1)
