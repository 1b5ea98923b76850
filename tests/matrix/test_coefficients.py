"""Named sets against their sources, and what users may list."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.optim._muon as torch_muon

from optfactory.errors import ConfigError
from optfactory.matrix import coefficients
from optfactory.matrix.coefficients import NAMED, steps_of
from tests.reference.orthogonal import polynomials


def test_muon_is_the_set_of_torch() -> None:
    triple = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)
    assert steps_of("muon", torch_muon.DEFAULT_NS_STEPS) == (triple,) * 5


def test_polar_express_is_the_papers_algorithm() -> None:
    # arXiv:2505.16932, Algorithm 1, divided by powers of 1.01, to four decimals as others print it.
    printed = [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ]
    assert np.allclose(steps_of("polar_express", 8), printed, rtol=0, atol=1e-4)
    assert steps_of("polar_express", 10)[7:] == ((1.875, -1.25, 0.375),) * 3


@pytest.mark.parametrize(
    ("name", "count", "smallest", "low", "high"),
    [
        ("muon", 5, 0.003, 0.68, 1.21),
        ("you", 5, 0.003, 0.97, 1.15),
        ("polar_express", 5, 0.001, 0.84, 1.13),
        ("polar_express", 6, 0.001, 0.99, 1.01),
        ("polar_express", 8, 0.001, 1 - 1e-4, 1 + 1e-4),
    ],
)
def test_singular_values_come_near_to_one(
    name: str, count: int, smallest: float, low: float, high: float
) -> None:
    values = polynomials(np.geomspace(smallest, 1, 100_001), steps_of(name, count))
    assert low < values.min() < values.max() < high


@pytest.mark.parametrize("name", NAMED)
def test_no_step_of_a_set_takes_a_value_beyond_two(name: str) -> None:
    count = len(NAMED[name].triples)
    for steps in range(1, count + 1):
        assert polynomials(np.linspace(0, 1, 10_001), steps_of(name, steps)).max() < 2


def test_a_list_has_one_triple_or_one_for_each_step() -> None:
    cubic = (1.5, -0.5, 0)
    assert steps_of([cubic], 3) == ((1.5, -0.5, 0.0),) * 3
    assert steps_of([cubic, [2, -1.5, 0.5]], 2) == ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))
    with pytest.raises(ConfigError, match=r"2 triples for 3 steps.*\(ns_steps: 2\)"):
        steps_of([cubic, cubic], 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("moun", "unknown set 'moun'; sets are muon, you, polar_express"),
        ([], "0 triples for 5 steps"),
        ([(1.5, -0.5)], r"ns_coefficients\[0\]: \(1.5, -0.5\) is not three finite numbers"),
        ([(1.5, -0.5, math.nan)], "three finite numbers"),
        ([(1.5, -0.5, True)], "three finite numbers"),
        ([(1.5, -0.5, "0")], "three finite numbers"),
        (["abc"], "three finite numbers"),
        ([(3.4445, 4.7750, 2.0315)], "take a singular value of .* beyond 10"),
    ],
)
def test_other_coefficients_are_refused(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steps_of(given, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "count"), [("muon", 0), ("muon", 100), ("you", 6)])
def test_other_numbers_of_steps_are_refused(name: str, count: int) -> None:
    with pytest.raises(ConfigError, match=r"ns_steps|'you' has 5 steps, not 6"):
        steps_of(name, count)


def test_schemas_may_import_the_sets_without_torch() -> None:
    source = Path(coefficients.__file__).read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    modules = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.Import) and "torch" in ast.dump(node) for node in nodes)
    assert modules <= {*sys.stdlib_module_names, "collections.abc", "optfactory.errors"}
