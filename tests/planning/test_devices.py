"""Plans for another device than the model's, such as a GPU that this machine does not have."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, plan
from optfactory.memory.placement import PAGED_MIN_NUMEL
from optfactory.planning.memory_plan import MemoryPlan
from tests.planning.harness import NAMES, Odd, on_meta, state_shares

ELEMENTS = [p.numel() for p in Odd().parameters()]
LARGE = sum(n for n in ELEMENTS if n >= PAGED_MIN_NUMEL)


def places(planned: MemoryPlan) -> dict[tuple[str, str], int]:
    """Bytes of state by device and place."""
    found: Counter[tuple[str, str]] = Counter()
    for share in state_shares(planned):
        found[share.device, share.place] += share.nbytes
    return dict(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_planned_without_one(name: str) -> None:
    model = on_meta(Odd)
    planned, here = plan(name, model, device="cuda"), plan(name, model)
    assert planned.state_bytes == here.state_bytes
    rows = zip(planned.report.rows, here.report.rows, strict=True)
    for gpu, cpu in rows:
        assert (gpu.name, gpu.bits, gpu.nbytes, gpu.reason) == (
            *(cpu.name, cpu.bits, cpu.nbytes, cpu.reason),
        )
        assert gpu.where == {"file-mapped": "managed"}.get(cpu.where, cpu.where)
    assert {s.device for s in planned.shares if s.what != "state"} == {"cuda"}
    assert ("paged" in name) == any(row.where == "managed" for row in planned.report.rows)


def test_the_bytes_of_a_gpu_by_hand() -> None:
    steps = 8 * len(ELEMENTS)  # counted on the host
    resident = 8 * sum(ELEMENTS)
    assert places(plan("adam", on_meta(Odd), device="cuda")) == {
        ("cuda", "resident"): resident,
        ("cpu", "resident"): steps,
    }
    for page_memory, place in (("auto", "managed"), ("managed", "managed"), ("pinned", "pinned")):
        planned = plan("paged_adam", on_meta(Odd), device="cuda", page_memory=page_memory)
        assert places(planned) == {
            ("cuda", place): 8 * LARGE,
            ("cuda", "resident"): resident - 8 * LARGE,
            ("cpu", "resident"): steps,
        }
        assert planned.needed()[1] == 8 * LARGE


def test_a_captured_graph_keeps_steps_on_the_device() -> None:
    planned = plan("adam", on_meta(Odd), device="cuda", capturable=True)
    assert places(planned) == {("cuda", "resident"): 8 * sum(ELEMENTS) + 8 * len(ELEMENTS)}
    problems = {other.name: other.problem for other in planned.alternatives if other.problem}
    assert set(problems) == {name for name in NAMES if name.startswith("paged_")}
    assert all("CUDA graph" in problem for problem in problems.values())


@pytest.mark.parametrize("name", ["adam", "paged_adam8bit"])
def test_a_model_on_the_cpu_may_be_planned_for_a_gpu(name: str) -> None:
    real, meta = (plan(name, model, device="cuda") for model in (Odd(), on_meta(Odd)))
    assert str(real) == str(meta)
    assert real.as_dict() == meta.as_dict()


def test_a_device_may_be_given_as_torch_has_it_and_with_a_number() -> None:
    texts = {
        str(plan("paged_adam", on_meta(Odd), device=device))
        for device in ("cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 1))
    }
    assert len(texts) == 1


def test_by_default_the_device_is_where_the_model_is_and_the_cpu_for_meta() -> None:
    for planned in (plan("paged_adam", Odd()), plan("paged_adam", on_meta(Odd))):
        assert {share.device for share in planned.shares} == {"cpu"}
        assert {share.place for share in planned.shares} == {"resident", "file-mapped"}
    assert str(plan("paged_adam", Odd(), device="cpu")) == str(plan("paged_adam", Odd()))


def test_half_of_a_model_may_be_on_the_meta_device() -> None:
    model = nn.ModuleDict({"a": nn.Linear(400, 300), "b": on_meta(lambda: nn.Linear(400, 300))})
    planned = plan("paged_adamw8bit", model)
    whole = nn.ModuleDict({"a": nn.Linear(400, 300), "b": nn.Linear(400, 300)})
    report = build_optimizer("paged_adamw8bit", whole).memory_report()
    assert planned.report == report


def test_a_plan_inside_of_the_meta_context_changes_nothing() -> None:
    # As in `with torch.device("meta"): plan("adam8bit", Model())`.
    with torch.device("meta"):
        model = Odd()
        planned = plan("paged_adamw8bit", model, memory="1GiB")
    assert planned.as_dict() == plan("paged_adamw8bit", model, memory="1GiB").as_dict()
    optimizer = build_optimizer("paged_adamw8bit", Odd())
    optimizer.init_states()
    states: list[dict[str, Any]] = list(optimizer.state.values())
    assert {value.device.type for state in states for value in state.values()} == {"cpu"}
