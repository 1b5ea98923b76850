"""Scratch memory: as the plan says to the byte, of no influence on bits; and bytes of states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer, plan
from tests.conftest import on_cpus
from tests.muon.harness import SHAPES, all_bits, built, give, matrices, train

LARGE = 2**30


class Layers(nn.Module):
    """Blocks of a transformer's shapes, and what others train."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 100, bias=False)


def scratch(optimizer: Optimizer2State) -> int:
    """Bytes of the scratch memory that there is."""
    assert optimizer._plan is not None
    return optimizer._plan.scratch.nbytes


def planned(optimizer_name: str, model: nn.Module, **asked: Any) -> dict[str, int]:
    figures = plan(optimizer_name, model, **asked)
    found: dict[str, int] = {}
    for share in figures.shares:
        found[share.what] = found.get(share.what, 0) + share.nbytes
    return found


MEMORIES: list[dict[str, Any]] = [
    {},
    {"ns_memory": 1},
    {"ns_memory": 200_000},
    {"ns_memory": LARGE},
    {"ns_dtype": "bfloat16"},
    {"split": 2, "ns_memory": 100_000},
]


@pytest.mark.parametrize("asked", MEMORIES, ids=str)
@pytest.mark.parametrize("name", ["muon", "muon8bit"])
def test_the_scratch_and_the_states_are_the_plans_to_the_byte(
    name: str, asked: dict[str, Any]
) -> None:
    model = Layers()
    wanted = planned(name, model, **asked)
    optimizer = build_optimizer(name, model, **asked)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.01 * number + 0.01)
    optimizer.step()
    assert scratch(optimizer) == wanted["scratch"]
    states = sum(t.nbytes for entries in optimizer.state.values() for t in entries.values())
    assert states == wanted["state"] == optimizer.memory_report().state_bytes
    optimizer.step()
    assert scratch(optimizer) == wanted["scratch"]


def test_the_default_is_what_the_largest_matrix_needs() -> None:
    """Whatever the depth: itself in float32, and what its products need."""
    one, many = (planned("muon", Layers(depth=depth))["scratch"] for depth in (1, 12))
    up, square = 4 * 64 * 64, 64 * 64
    assert one == many == 4 * (up + up + 4 * square)
    assert "scratch" not in planned("adamw", Layers())


def test_bytes_of_hidden_and_other_parameters_at_8_bits() -> None:
    """One byte and a scale for each row's 256 for Muon, two and two for AdamW; steps beside."""
    model = Layers(width=256)
    optimizer = build_optimizer("muon8bit", model)
    sizes = {"muon8bit": [0, 0], "adamw8bit": [0, 0]}
    rows = {row.name: row for row in optimizer.memory_report().rows}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.ndim == 2:
                sizes[group["optimizer"]][0] += rows[name].nbytes - 8
                sizes[group["optimizer"]][1] += p.numel()
    (hidden, elements), (rest, others) = sizes.values()
    assert hidden / elements == pytest.approx(1 + 4 / 256)
    assert rest / others == pytest.approx(2 * (1 + 4 / 256))


@on_cpus
@pytest.mark.parametrize("name", ["muon", "muon8bit"])
def test_bits_do_not_depend_on_the_memory_or_the_company(name: str, backend: str) -> None:
    """Nor on which other parameters have a gradient in the same step."""
    shapes = [*SHAPES, (96, 64), (4, 48, 80)]
    kept = None
    for asked in ({}, {"ns_memory": 1}, {"ns_memory": 60_000}, {"ns_memory": LARGE}):
        params = matrices(shapes)
        optimizer = built(params, name, min_8bit_size=1000, **asked)
        train(optimizer, params, range(3))
        found = all_bits(optimizer)
        kept = kept or found
        assert found == kept
    alone = matrices(shapes)
    optimizer = built(alone, name, min_8bit_size=1000)
    for step in range(3):
        for chosen in range(len(alone)):
            give(alone, step)
            for number, p in enumerate(alone):
                if number != chosen:
                    p.grad = None
            optimizer.step()
    assert all_bits(optimizer) == kept


@pytest.mark.parametrize("thawed", [(400, 300), (3, 200, 100)])
def test_a_larger_matrix_that_is_trained_later_gets_more(thawed: tuple[int, ...]) -> None:
    params = matrices([(48, 80), (48, 80)])
    late = matrices([thawed])[0].detach().requires_grad_(False)
    optimizer = built([*params, late], lr=0.1)
    train(optimizer, params, range(1))
    before = scratch(optimizer)
    late.requires_grad_()
    everything: list[Tensor] = [*params, late]
    train(optimizer, everything, range(1, 3))
    assert scratch(optimizer) > before
    fresh = matrices([(48, 80), (48, 80)])
    other = built(fresh, lr=0.1)
    train(other, fresh, range(3))
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


def test_other_threads_give_the_same_bits() -> None:
    """Of the passes around products; products are torch's."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = matrices([(300, 200), (64, 128)])
        optimizer = built(params, "muon8bit", ns_steps=1)
        train(optimizer, params, range(2))
        results.append({k: v for k, v in all_bits(optimizer).items() if "momentum" in k})
    assert results[0] == results[1]
