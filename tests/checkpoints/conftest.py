"""Fixtures of the checkpoint tests."""

from __future__ import annotations

from tests.torch_api.conftest import small_tensors

__all__ = ["small_tensors"]
