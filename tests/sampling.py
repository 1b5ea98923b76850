"""A sample of the tests with hundreds of parameter sets, which would take CI longer than it has.

Of each test, a few parameter sets per backend run, spread evenly; and where tests are not about the
mathematics, the native backend and one of the others in turn. OPTFACTORY_ALL_TESTS=1 runs all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import pytest

T = TypeVar("T")

_TESTS = Path(__file__).parent

# Parameter sets that are kept of a test, by file or by folder. Those of options compile a kernel
# each, those of examples and of plugins start processes.
KEPT = {"options": 1, "frameworks": 1, "conformance": 1, "numerics": 1, "robustness": 1}
KEPT |= dict.fromkeys(("bench", "checkpoints", "emulation", "nvrtc"), 1)
KEPT |= {"torch_api": 1, "distributed": 1, "sharding": 1, "matrix": 2, "muon": 1}
KEPT |= {"examples": 1, "packaging": 1, "unit": 2, "param_groups": 2, "planning": 1}
KEPT |= {"unit/test_plugins.py": 2, "unit/test_small_stacks.py": 1, "unit/test_contributing.py": 1}


def runs_all() -> bool:
    """Whether everything is to be tested, however long it takes."""
    return bool(os.environ.get("OPTFACTORY_ALL_TESTS"))


def spread(items: Sequence[T], kept: int) -> list[T]:
    """Some of the items, spread evenly, for a loop within a test; all where all are to run."""
    return list(items) if runs_all() else list(items[:: max(1, -(-len(items) // kept))])


# Tests that take CI too long for what they add: other processors' kernels, all kernels of a wheel,
# processes by the dozen. By file, or by file and test.
ONLY_WITH_ALL = (
    *("numerics/test_other_processors.py", "instructions/test_counts.py"),
    *("distributed/test_plans.py", "examples/test_sweep.py", "packaging/test_prebuilt.py"),
    *("distributed/test_whole_matrices_in_models.py", "examples/test_resharding.py"),
    "examples/test_torchrun.py::test_the_short_example_goes_on_with_another_number_of_processes",
)

# Tests of these folders run on every backend.
ON_EVERY_BACKEND = ("numerics", "emulation", "sharding", "muon")
OTHER_BACKENDS = ("reference", "emulated")


def _in_turn(case: tuple[str, str]) -> bool:
    """Whether a test runs on this backend: of two that take turns, on one by the test's name."""
    test, backend = case
    chosen = OTHER_BACKENDS[crc32(test.encode()) % len(OTHER_BACKENDS)]
    return backend not in OTHER_BACKENDS or backend == chosen


def _backend(item: pytest.Item) -> str:
    spec = getattr(item, "callspec", None)
    return str(spec.params.get("backend", "")) if spec else ""


def keep_a_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the other tests."""
    if runs_all():
        return
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.is_relative_to(_TESTS):
            cases[item.nodeid.split("[")[0], _backend(item)].append(item)
    left_out = set()
    for case, found in cases.items():
        place = found[0].path.relative_to(_TESTS)
        name = place.as_posix()
        is_turn = place.parts[0] in ON_EVERY_BACKEND or _in_turn(case)
        test = f"{name}::{case[0].rpartition('::')[2]}"
        if not {name, test}.isdisjoint(ONLY_WITH_ALL) or not is_turn:
            left_out |= set(map(id, found))
            continue
        kept = KEPT.get(name, KEPT.get(place.parts[0], len(found)))
        distance = -(-len(found) // kept)
        left_out |= {id(item) for index, item in enumerate(found) if index % distance}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]
    # The longest ones first, so that no worker is alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
