"""The scalars of a step: of numbers and of tensors alike, and by nothing but the step's number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optfactory import resolve
from optfactory.optimizers.nadam import NAdamConfig
from tests.families import FAMILIES, rule_of, selections
from tests.reference import reference_of
from tests.unit.harness import NAMES

STEPS = (1, 2, 3, 5, 6, 7, 20, 100, 10_000, 2_000_000)


def _settings(family: str) -> list[dict[str, Any]]:
    """What selects a rule, and the variants of the family's facts."""
    return [*selections(family), *map(dict, reference_of(family).facts.variants.values())]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_give_what_numbers_give(family: str) -> None:
    """As where a CUDA graph is captured: there, step and learning rate are on the device."""
    for asked in _settings(family):
        config = resolve(family, **asked)
        group = config.model_dump()
        for step in STEPS:
            want = config.scalars(group, float(step))
            lr = torch.tensor(group["lr"], dtype=torch.float64)
            got = config.scalars({**group, "lr": lr}, torch.tensor(float(step)).double())
            assert got.keys() == want.keys() >= set(rule_of(family, **asked).scalars)
            for key, value in want.items():
                assert float(got[key]) == pytest.approx(value, rel=1e-12, abs=1e-300), (key, step)


@pytest.mark.parametrize("name", [name for name in NAMES if "nadam" in name])
@pytest.mark.parametrize("speed", [0.0, 1e-5, 4e-3, 0.1, 3.0])
def test_the_product_of_momenta_is_that_of_all_steps(name: str, speed: float) -> None:
    group = resolve(name, momentum_decay=speed, betas=(0.99, 0.999)).model_dump()
    product = 1.0
    for step in range(1, 2001):
        now, ahead = (0.99 * (1 - 0.5 * 0.96 ** (number * speed)) for number in (step, step + 1))
        product *= now
        scalars = NAdamConfig.scalars(group, float(step))
        size = scalars["step_size"] / (group["lr"] * (1 - 0.999**step) ** 0.5)
        of_g, of_avg = (1 - now) / (1 - product), ahead / (1 - product * ahead)
        assert size * scalars["share_of_g"] == pytest.approx(of_g, rel=1e-9)
        assert size * scalars["share_of_avg"] == pytest.approx(of_avg, rel=1e-9)
