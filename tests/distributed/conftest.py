"""Processes for the tests of this folder, which all run in one worker of pytest-xdist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed as dist

from tests.distributed.processes import Processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> Iterator[Processes]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    running = Processes(folder, {"OPTFACTORY_CACHE": os.environ["OPTFACTORY_CACHE"]})
    yield running
    running.stop()
