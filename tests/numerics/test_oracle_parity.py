"""Every optimizer against the float64 references, element by element, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from optfactory import get_optimizer_info
from tests.families import (
    CAUTIOUS,
    FAMILIES,
    FIRST,
    NAMES,
    acts_on,
    beside,
    known_to,
    states_of,
)
from tests.numerics.harness import (
    DTYPES,
    Twin,
    array,
    assert_close,
    gradient,
    options_of,
    own_parameters,
    parameters,
)
from tests.reference import REFERENCES, reference_of
from tests.reference.base import Options, State
from tests.reference.tracked import Tracked

STEPS = 5

VARIANTS: dict[str, dict[str, Any]] = {
    "no_bias_correction": {"bias_correction": False},
    "l2": {"adam_w_mode": False, "weight_decay": 0.1},
    "decoupled": {"adam_w_mode": True, "weight_decay": 0.1, "lr": 0.01},
    "long_steps": {"lr": 1.0},  # the update outweighs the parameter's own rounding
    "no_decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True, "optim_bits": 32},
    "betas": {"betas": (0.0, 0.5), "eps": 1e-3},
    "small_8bit": {"min_8bit_size": 1, "betas": (0.95, 0.98)},
}
LAMB_VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {"trust_ratio": "clip"},
    "clip_hard": {"trust_ratio": "clip", "max_unorm": 0.02, "weight_decay": 0.1},
    "clip_off": {"trust_ratio": "clip", "max_unorm": 0.0},
    "clip_l2": {"trust_ratio": "clip", "adam_w_mode": False, "weight_decay": 0.1},
    "amsgrad_clip": {"trust_ratio": "clip", "amsgrad": True, "optim_bits": 32},
}


def test_every_family_has_a_reference() -> None:
    assert len(NAMES) >= 18
    for family in FAMILIES:
        states = {state.name: state.signed for state in states_of(family)}
        assert reference_of(family).states == states
    assert set(REFERENCES) <= set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_reference(name: str) -> None:
    info = get_optimizer_info(name)
    # The rounding of codes is no part of a paper.
    rounding = info.defaults["state_rounding"]
    want = replace(REFERENCES[info.family].defaults, state_rounding=rounding)
    got = options_of(name, **info.defaults)
    assert got == replace(want, width=got.width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_defaults_follow_the_reference(name: str, dtype: str, backend: str) -> None:
    twin = Twin(name, own_parameters(name, DTYPES[dtype]))
    for step in range(STEPS):
        twin.step(step)
    if get_optimizer_info(name).optim_bits == 8:
        twin.count.check()


def _variants_of(family: str) -> dict[str, dict[str, Any]]:
    """What a family has of each variant, without those of which nothing is left or that are one."""
    table = VARIANTS | (LAMB_VARIANTS if acts_on(family, "trust_ratio") else {})
    table |= {key: {key: True, **(beside(family, key) or {})} for key in CAUTIOUS}
    table |= reference_of(family).facts.variants
    found: dict[str, dict[str, Any]] = {}
    for variant, asked in table.items():
        known = known_to(family, asked)
        if known.keys() - {"optim_bits"} and known not in found.values():
            found[variant] = known
    return found


def _variants() -> list[Any]:
    cases = []
    for family in FAMILIES:
        for variant, asked in _variants_of(family).items():
            widths = [asked["optim_bits"]] if "optim_bits" in asked else [32, 16, 8]
            for width in widths:
                values = asked | {"optim_bits": width}
                cases.append(pytest.param(family, values, id=f"{family}-{width}-{variant}"))
    return cases


def test_the_first_families_have_every_variant() -> None:
    for family in FIRST:
        table = VARIANTS | (LAMB_VARIANTS if family == "lamb" else {})
        assert table.items() <= _variants_of(family).items()


@pytest.mark.parametrize(("family", "asked"), _variants())
def test_options_follow_the_reference(family: str, asked: dict[str, Any], backend: str) -> None:
    twin = Twin(family, own_parameters(family, torch.float32), **asked)
    for step in range(STEPS):
        twin.step(step)
    if asked["optim_bits"] == 8:
        twin.count.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_stay_on_the_free_running_reference(family: str, backend: str) -> None:
    """32-bit: no resynchronisation, so that an error which every step repeats would add up."""
    twin = Twin(family, own_parameters(family, torch.float32, [(300,), (70, 64)]))
    free = [array(p) for p in twin.params]
    states = [State.zeros(tuple(p.shape), twin.states) for p in twin.params]
    spent = [0.0 for _ in free]
    for step in range(20):
        twin.step(step)
        for i, p in enumerate(twin.params):
            g = array(gradient(tuple(p.shape), p.dtype, 1000 * step + i))
            update = twin.step_reference(free[i], g, states[i], twin.options)
            free[i], states[i] = update.p.value, update.state()
            spent[i] = spent[i] + update.p.error
            assert_close(array(p), Tracked(free[i], 2 * spent[i]), f"{family} step {step}")


def test_learning_rate_of_a_group_and_of_a_schedule_reach_the_step(backend: str) -> None:
    params = parameters(torch.float32, [(257,), (70, 64)])
    twin = Twin("adam", params, lr=0.1)
    for step, lr in enumerate((0.1, 0.01, 0.0, 1e-5)):
        for group in twin.optimizer.param_groups:
            group["lr"] = lr
        twin.options = Options(lr=lr)
        twin.step(step)
