"""Fixtures of the tests of the examples."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.examples.tools import ROOT


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    """The module that makes tables and pictures; scripts find it beside them."""
    pytest.importorskip("matplotlib")
    file = ROOT / "examples" / "lm" / "comparison.py"
    spec = importlib.util.spec_from_file_location("comparison_of_the_sweep", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
