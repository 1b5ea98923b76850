"""A plan's bytes are those of the optimizer that is built later, and those that torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from optfactory import Optimizer2State, build_optimizer, plan
from tests.planning.harness import (
    CASE_NAMES,
    CASES,
    DTYPES,
    SETTINGS,
    Odd,
    counted_state,
    dtype_of,
    is_mapped,
    on_meta,
    parameters_of,
    planned_state,
    sized,
    storage_bytes,
    width_of,
)


def built(name: str, model: nn.Module, **overrides: Any) -> Optimizer2State:
    optimizer = build_optimizer(name, model, **overrides)
    optimizer.init_states()
    return optimizer


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_every_row_is_that_of_the_optimizer_and_what_torch_allocates(
    name: str, setting: str
) -> None:
    overrides, dtype = SETTINGS[setting], dtype_of(setting)
    planned = plan(name, on_meta(Odd, dtype), names=name, **overrides)
    optimizer = built(name, Odd().to(dtype), **overrides)
    assert planned.report == optimizer.memory_report()
    parameters = parameters_of(optimizer)
    assert len(planned.report.rows) == len(parameters) == len(optimizer.state)
    for row, parameter in zip(planned.report.rows, parameters, strict=True):
        entries = optimizer.state[parameter]
        state = entries.values()
        assert row.nbytes == storage_bytes(state), row.name
        assert row.bits == width_of(entries), row.name
        paged = any(map(is_mapped, state))
        assert row.where == ("file-mapped" if paged else "resident"), row.name
    assert planned_state(planned) == counted_state(optimizer)
    assert planned.state_bytes == planned.report.state_bytes == sum(planned_state(planned).values())


def test_the_settings_differ_in_what_they_need() -> None:
    # Else the test above would compare one case again and again.
    sizes = {setting: plan("adamw8bit", on_meta(Odd, dtype_of(setting)), **SETTINGS[setting])
             for name, setting in CASES if name == "adamw8bit"}  # fmt: skip
    states = {setting: planned.state_bytes for setting, planned in sizes.items()}
    same_as_default = {key for key, size in states.items() if size == states["default"]}
    assert (
        same_as_default
        == {
            *("default", "bits", "symmetric", "compat_clip", "stochastic", "rules_pages"),
        }
        & states.keys()
    )
    assert {(name, "default") for name in CASE_NAMES} <= set(CASES)
    assert len(CASES) > 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_does_not_depend_on_the_parameters_dtype_unless_rounding_is_compensated(
    dtype: torch.dtype,
) -> None:
    assert plan("adam8bit", on_meta(Odd, dtype)).report == plan("adam8bit", on_meta(Odd)).report
    if dtype.itemsize == 2:
        bare = plan("adam8bit", on_meta(Odd, dtype)).state_bytes
        kahan = plan("adam8bit", on_meta(Odd, dtype), param_rounding="kahan").state_bytes
        assert kahan - bare == 2 * sum(p.numel() for p in Odd().parameters())


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb8bit"])
def test_the_profiler_sees_the_planned_bytes_when_state_is_allocated(name: str) -> None:
    overrides: dict[str, Any] = {"percentile_clipping": 50} if name == "lamb8bit" else {}
    planned = plan(name, on_meta(Odd), **overrides)
    optimizer = build_optimizer(name, Odd(), **overrides)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.init_states()
    allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    assert allocated == planned.state_bytes


def test_a_mixture_of_dtypes_frozen_and_tied_parameters(tmp_path: Any) -> None:
    def model() -> nn.Module:
        odd = Odd()
        odd.wide.to(torch.bfloat16)
        odd.flat.requires_grad_(False)
        odd.also = odd.embed
        return odd

    overrides = {"param_rounding": "kahan", "page_dir": str(tmp_path)}
    with torch.device("meta"):
        planned = plan("paged_adamw8bit", model(), **overrides)
    optimizer = built("paged_adamw8bit", model(), **overrides)
    assert planned.report == optimizer.memory_report()
    assert planned_state(planned) == counted_state(optimizer)
    assert "flat" not in {row.name for row in planned.report.rows}


def test_equal_shapes_of_two_dtypes_have_a_layout_each() -> None:
    def model() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))
        layers[1].to(torch.bfloat16)
        return layers

    with torch.device("meta"):
        planned = plan("adam8bit", model(), param_rounding="kahan")
    assert planned.report == built("adam8bit", model(), param_rounding="kahan").memory_report()
    first, _, second, *_ = (row.nbytes for row in planned.report.rows)
    assert second == first + 2 * 96 * 96


def test_frozen_tensors_in_a_list_have_neither_state_nor_gradients() -> None:
    model = Odd()
    model.wide.requires_grad_(False)
    planned = plan("adam8bit", list(model.parameters()))
    optimizer = built("adam8bit", list(model.parameters()))
    assert planned.report == optimizer.memory_report()
    assert planned_state(planned) == counted_state(optimizer)
    assert sized(planned, "gradients") == {32: storage_bytes(parameters_of(optimizer))}
    elements = sum(p.numel() for p in parameters_of(optimizer))
    assert [group.elements for group in planned.groups] == [elements]


def test_a_plan_of_a_real_model_is_that_of_one_on_the_meta_device() -> None:
    model = Odd()
    planned, meta = plan("paged_lamb8bit", model), plan("paged_lamb8bit", on_meta(Odd))
    assert str(planned) == str(meta)
    assert planned.as_dict() == meta.as_dict()
