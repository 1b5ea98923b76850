"""Rows of directions that are normalised by their second moments (NorMuon), and their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer, families
from optfactory.checkpoints.convert import decode
from optfactory.checkpoints.own import live_record
from optfactory.extend import MatrixConfig, UpdateRule, register
from tests.conftest import on_cpus
from tests.muon.harness import (
    PlainMuon,
    all_bits,
    assert_follows,
    built,
    give,
    give_graded,
    matrices,
    moments,
    plain_settings,
    train,
)
from tests.muon.test_memory import LARGE, Layers, planned, scratch

ON: dict[str, Any] = {"neuron_norm": True, "lr": 0.1}
SHAPES = [(48, 80), (96, 64), (64, 64), (48, 80), (3, 24, 80)]
widths = pytest.mark.parametrize("name", ["muon", "muon8bit"])


def parts(p: Tensor, asked: Mapping[str, Any]) -> list[Tensor]:
    """The matrices of a parameter, as views."""
    if asked.get("flatten"):
        p = p.reshape(len(p), -1)
    stack = p.reshape(-1, *p.shape[-2:])
    return [block for matrix in stack for block in matrix.chunk(asked.get("split", 1))]


def momenta(optimizer: Optimizer2State) -> Iterator[Tensor]:
    for slot in optimizer._current_plan().slots:
        yield decode(live_record(slot.layout, slot.state).states["momentum_buffer"])


# ---- the mathematics -----------------------------------------------------------------------------

CASES: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
    ([(48, 80), (80, 48), (64, 64), (48, 80), (2, 70), (70, 2)], {}),
    ([(96, 64), (64, 96)], {"adjust_lr": "original", "neuron_beta": 0.5, "nesterov": False}),
    ([(4, 24, 80), (3, 80, 64)], {"neuron_beta": 0.0}),
    ([(144, 64), (4, 66, 70)], {"split": 3}),
    ([(32, 8, 3, 3), (24, 4, 20)], {"flatten": True}),
]


@on_cpus
@widths
@pytest.mark.parametrize(("shapes", "asked"), CASES, ids=str)
def test_steps_are_those_of_float64(
    shapes: list[tuple[int, ...]], asked: dict[str, Any], name: str, backend: str
) -> None:
    """Each from the momentum that is there, which 8 bits round."""
    asked = {**ON, **asked}
    params = matrices(shapes)
    starts = [part.clone() for p in params for part in parts(p.detach(), asked)]
    settings = plain_settings({"neuron_beta": 0.95, **asked})
    plain = [PlainMuon(part, **settings) for part in starts]
    optimizer = built(params, name, min_8bit_size=1000, **asked)
    optimizer.init_states()
    for step in range(4):
        give_graded(params, step)
        grads = [g for p in params if p.grad is not None for g in parts(p.grad, asked)]
        buffers = [b for one in momenta(optimizer) for b in parts(one, asked)]
        for other, g, b in zip(plain, grads, buffers, strict=True):
            other.buffer = b.double()
            other.step(g)
        optimizer.step()
    found = torch.cat([v.flatten() for v in moments(optimizer)])
    wanted = torch.cat([other.neurons.flatten() for other in plain])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    now = [part for p in params for part in parts(p.detach(), asked)]
    for got, other, start in zip(now, plain, starts, strict=True):
        assert_follows(got, other, start, 2e-5)


def test_rows_move_by_other_lengths_than_without_it() -> None:
    """So that the comparison with float64 shows something; the matrix goes as far as before."""
    lengths = []
    for asked in ({}, {"neuron_norm": True}):
        params = matrices([(48, 80)])
        start = params[0].detach().clone()
        optimizer = built(params, lr=0.1, weight_decay=0.0, **asked)
        give_graded(params, 0)
        optimizer.step()
        lengths.append((params[0].detach() - start).norm(dim=1))
    without, normalised = lengths
    assert without.max() / without.min() > 1.3
    assert normalised.max() / normalised.min() == pytest.approx(1, abs=1e-4)
    assert normalised.norm() / without.norm() == pytest.approx(1, abs=1e-5)


@on_cpus
def test_zero_rows_stay_and_zero_matrices_decay(backend: str) -> None:
    params = matrices([(48, 80), (48, 80), (2, 48, 80)])
    starts = [p.detach().clone() for p in params]
    optimizer = built(params, **ON, weight_decay=0.5)
    for step in range(3):
        give_graded(params, step)
        params[0].grad[7] = 0  # type: ignore[index]
        params[1].grad.zero_()  # type: ignore[union-attr]
        params[2].grad[1] = 0  # type: ignore[index]
        optimizer.step()
    for got, start in (
        (params[0][7], starts[0][7]),
        (params[1], starts[1]),
        (params[2][1], starts[2][1]),
    ):
        torch.testing.assert_close(got.detach(), start * 0.95**3)
    assert all(p.isfinite().all() for p in params)
    one, zero, stack = moments(optimizer)
    assert one[7] == 0
    assert not zero.any()
    assert not stack[1].any()
    assert stack[0].all()


@on_cpus
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_leaves_the_moments_of_its_matrix(bad: float, backend: str) -> None:
    """At 8 bits its momentum starts afresh, and then the matrix can be trained again."""
    one, other = matrices(SHAPES), matrices(SHAPES)
    asked = {**ON, "min_8bit_size": 1}
    optimizers = [built(params, "muon8bit", **asked) for params in (one, other)]
    for step in range(3):
        before = moments(optimizers[0]) if step else []
        for params, optimizer in zip((one, other), optimizers, strict=True):
            give(params, step)
            if step == 1 and params is one:
                one[0].grad[3, 4] = bad  # type: ignore[index]
                one[4].grad[1, 3, 4] = bad  # type: ignore[index]
            optimizer.step()
        if step == 1 and bad != 3e38:  # whose direction is 0
            after = moments(optimizers[0])
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[4][1], after[4][1])
    assert all(torch.equal(one[n], other[n]) for n in (1, 2, 3))
    assert torch.equal(one[4][[0, 2]], other[4][[0, 2]])
    assert torch.isnan(one[0]).all() == (bad != 3e38)
    assert all(v.isfinite().all() for v in moments(optimizers[0]))


# ---- memory --------------------------------------------------------------------------------------


@on_cpus
@widths
def test_bits_do_not_depend_on_the_memory_or_the_company(name: str, backend: str) -> None:
    shapes = [*SHAPES, (4, 48, 80), (2, 700)]
    kept = None
    for asked in ({}, {"ns_memory": 1}, {"ns_memory": LARGE}):
        params = matrices(shapes)
        optimizer = built(params, name, min_8bit_size=1000, **ON, **asked)
        train(optimizer, params, range(3))
        found = all_bits(optimizer)
        kept = kept or found
        assert found == kept
    alone = matrices(shapes)
    optimizer = built(alone, name, min_8bit_size=1000, **ON)
    for step in range(3):
        for chosen in range(len(alone)):
            give(alone, step)
            for number, p in enumerate(alone):
                if number != chosen:
                    p.grad = None
            optimizer.step()
    assert all_bits(optimizer) == kept


@widths
@pytest.mark.parametrize("asked", [{}, {"split": 2, "ns_memory": 100_000}], ids=str)
def test_bytes_are_the_plans(name: str, asked: dict[str, Any]) -> None:
    model: nn.Module = Layers()
    wanted, without = (planned(name, model, neuron_norm=on, **asked) for on in (True, False))
    optimizer = build_optimizer(name, model, neuron_norm=True, **asked)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    rows = sum(
        len(p)
        for group in optimizer.param_groups
        for p in group["params"]
        if group["optimizer"] == name
    )
    assert wanted["state"] == without["state"] + 4 * rows
    assert scratch(optimizer) == wanted["scratch"] == without["scratch"]
    states = sum(t.nbytes for entries in optimizer.state.values() for t in entries.values())
    assert states == wanted["state"] == optimizer.memory_report().state_bytes


def test_what_a_step_allocates_is_a_number_for_each_row() -> None:
    """The scratch memory is what matrices share, and nothing else is as large as one."""
    params = matrices([(96, 160), (96, 160)])
    largest = []
    for asked in ({}, {"neuron_norm": True}):
        optimizer = built(params, "muon", **asked)
        train(optimizer, params, range(2))
        give(params, 2)
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        sizes = [event.self_cpu_memory_usage for event in profile.events()]
        largest.append(max(sizes, default=0))
    assert largest[1] - largest[0] <= 8 * 2 * 96


# ---- optimizers from outside ---------------------------------------------------------------------


class PlainConfig(MatrixConfig):
    """Orthogonalized gradients, without momentum."""

    family: ClassVar[str] = "plain"

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return UpdateRule("plain_muon", (), (), text="u = g;", transform="orthogonalize")

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        return {"decay": 1.0, "step_size": group["lr"]}


@on_cpus
def test_a_family_from_outside_has_it(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(families, "_registered", {})
    register(PlainConfig)
    params = matrices([(48, 80), (80, 48)])
    starts = [p.detach().clone() for p in params]
    plain = [PlainMuon(p, lr=0.1, weight_decay=0.0, momentum=0.0, neuron_beta=0.9) for p in starts]
    optimizer = built(params, "plain", **ON, neuron_beta=0.9)
    for step in range(2):
        give_graded(params, step)
        for p, other in zip(params, plain, strict=True):
            assert p.grad is not None
            other.step(p.grad)
        optimizer.step()
    for p, other, start in zip(params, plain, starts, strict=True):
        assert_follows(p, other, start, 2e-5)
