"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.harness import eager, peer
from tests.torch_api.conftest import small_tensors

__all__ = ["small_tensors"]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torchao's steps as they are: compiling them takes minutes."""
    peer("torchao.optim")
    with eager():
        yield
