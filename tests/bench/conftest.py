"""One thread and the portable backend: what is measured does not matter here."""

import pytest
import torch


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch, fixed_conditions: None) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
