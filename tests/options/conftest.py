"""A sample of the options' tests: all of them compile hundreds of kernel variants.

Of each test, a few parameter sets per backend run, spread evenly; OPTFACTORY_ALL_TESTS=1 runs all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

_KEPT = 2
_FOLDER = Path(__file__).parent


def _backend(item: pytest.Item) -> str:
    spec = getattr(item, "callspec", None)
    return str(spec.params.get("backend", "")) if spec else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("OPTFACTORY_ALL_TESTS"):
        return
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if _FOLDER in item.path.parents:
            cases[item.nodeid.split("[")[0], _backend(item)].append(item)
    left_out = {
        id(item)
        for found in cases.values()
        for index, item in enumerate(found)
        if len(found) > _KEPT and index % -(-len(found) // _KEPT)
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]
