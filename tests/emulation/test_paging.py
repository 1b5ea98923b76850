"""Paged state of CUDA parameters: the same bits as unpaged, and paged for as long as it lives."""

from __future__ import annotations

import copy
import pickle
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.backends.cuda import paging as cuda_paging
from optfactory.memory import placement
from tests.emulation.harness import (
    Shape,
    assert_same,
    emulator,
    give_gradients,
    guard_states,
    held,
    on,
    values,
)
from tests.emulation.paging import Pages, ShuffledStreams, belts
from tests.torch_api.harness import snapshot
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

# Large and resident ones mixed; rows with short last blocks, of which a part begins anywhere.
SHAPES: list[Shape] = [
    (100,), (40_000,), (33, 300), (64, 40), (131, 501), (4099,), (70, 64), (16, 8, 7, 9),
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"name": "paged_adam"},
    "amsgrad": {"name": "paged_adam", "amsgrad": True},
    "adamw8bit": {"name": "paged_adamw8bit", "min_8bit_size": 1},
    "lamb": {"name": "paged_lamb"},
    "lamb8bit": {"name": "paged_lamb8bit", "min_8bit_size": 1},
}
KINDS = [placement.PINNED, placement.MANAGED]


@pytest.fixture(params=KINDS)
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pages:
    """Paged state of each kind, from 3000 elements on."""
    return Pages(monkeypatch, request.param)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pages:
    return Pages(monkeypatch, placement.PINNED)


def build(options: dict[str, Any]) -> Optimizer2State:
    params = [values(shape, torch.float32, i).requires_grad_() for i, shape in enumerate(SHAPES)]
    return build_optimizer(options, params, lr=0.01)


def unpaged(options: dict[str, Any]) -> Optimizer2State:
    return build({**options, "name": options["name"].removeprefix("paged_")})


def train(optimizers: tuple[Optimizer2State, ...], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            give_gradients(optimizer, step)
            optimizer.step()


def places(optimizer: Optimizer2State) -> list[str]:
    return [row.where for row in optimizer.memory_report().rows]


def large_states(optimizer: Optimizer2State) -> list[Tensor]:
    """The state tensors that are paged."""
    return [
        tensor
        for slot in optimizer._current_plan().slots
        for key, tensor in slot.state.items()
        if slot.layout.tensors[key].where != placement.RESIDENT
    ]


# ---- results ---------------------------------------------------------------------------------


@pytest.mark.parametrize("label", OPTIONS)
def test_paging_changes_no_bit(label: str, pages: Pages) -> None:
    with on(emulator()[0]):
        paged, plain = build(OPTIONS[label]), unpaged(OPTIONS[label])
        offsets = [(5 * i) % 16 for i in range(len(SHAPES))]  # of 16 bytes, or of more
        guard_states(paged, pages.guarded, offsets)
        train((paged, plain), range(3))
    pages.guarded.check()
    assert_same(paged, plain)
    pieces = [piece for belt in belts(paged) for piece in belt.states.pieces]
    assert len(pieces) > 3
    parts = [part for piece in pieces for part in piece.parts]
    assert any(len(piece.parts) > 1 for piece in pieces)
    assert any(part.first > 0 for part in parts)
    assert any(state.data_ptr() % 16 for part in parts for state in part.states())


@pytest.mark.parametrize("label", OPTIONS)
def test_all_kinds_in_one_bucket(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Pages(monkeypatch, *KINDS)
    with on(emulator()[0]):
        paged, plain = build(OPTIONS[label]), unpaged(OPTIONS[label])
        assert set(places(paged)) == {*KINDS, placement.RESIDENT}
        train((paged, plain), range(2))
    assert_same(paged, plain)
    assert len(belts(paged)) == 2


@pytest.mark.parametrize("label", ["adamw8bit", "lamb"])
def test_16_bit_parameters(label: str, pages: Pages) -> None:
    with on(emulator()[0]):
        params = [values(shape, torch.bfloat16, i) for i, shape in enumerate(SHAPES)]
        name = OPTIONS[label]["name"]
        paged, plain = (
            build_optimizer(chosen, [p.clone().requires_grad_() for p in params], lr=0.01)
            for chosen in (name, name.removeprefix("paged_"))
        )
        train((paged, plain), range(2))
    assert_same(paged, plain)


@pytest.mark.parametrize("label", OPTIONS)
def test_streams_wait_for_each_other(
    label: str, pinned: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every order that events allow; were they not heeded, it would show."""
    random = Random(1)
    notices = []
    for heeds_events in (True, False):
        monkeypatch.setattr(
            cuda_paging,
            "_Streams",
            lambda device, heeds=heeds_events: ShuffledStreams(random, heeds),
        )
        with on(emulator()[0]):
            paged, plain = build(OPTIONS[label]), unpaged(OPTIONS[label])
            train((paged, plain), range(4))
        try:
            assert_same(paged, plain)
        except AssertionError as error:
            notices.append((heeds_events, str(error)))
    assert [heeds for heeds, _ in notices] == [False]


def test_a_skipped_step_leaves_paged_states(pages: Pages) -> None:
    with on(emulator()[0]):
        optimizer = build(OPTIONS["lamb8bit"])
        train((optimizer,), range(2))
        before = snapshot(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        optimizer.step()
        assert snapshot(optimizer) == before


# ---- how it gets there -----------------------------------------------------------------------


@pytest.mark.parametrize("label", OPTIONS)
def test_statistics_put_nothing_back(
    label: str, pinned: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for method in ("fetch", "put_back"):
        inner = getattr(cuda_paging.PinnedStates, method)

        def counted(self: Any, number: int, name: str = method, inner: Any = inner) -> None:
            calls.append(name)
            inner(self, number)

        monkeypatch.setattr(cuda_paging.PinnedStates, method, counted)
    with on(emulator()[0]):
        optimizer = build(OPTIONS[label])
        train((optimizer,), range(1))
    pieces = sum(len(belt.states.pieces) for belt in belts(optimizer))
    passes = 2 if label.startswith("lamb") else 1
    assert calls.count("put_back") == pieces
    assert calls.count("fetch") == passes * pieces


@pytest.mark.parametrize("label", OPTIONS)
def test_managed_pages_are_asked_for_once_a_pass(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(monkeypatch, placement.MANAGED)
    backend, driver = emulator()
    with on(backend):
        optimizer = build(OPTIONS[label])
        train((optimizer,), range(1))
        addresses = [tensor.data_ptr() for tensor in large_states(optimizer)]
        pages.prefetched.clear()
        driver.launches.clear()
        train((optimizer,), range(1, 2))
    passes = 2 if label.startswith("lamb") else 1
    wanted = sum(tensor.nbytes for tensor in large_states(optimizer))
    assert sum(nbytes for _, nbytes in pages.prefetched) == passes * wanted
    assert len(set(pages.prefetched)) == len(pages.prefetched) // passes
    for first, nbytes in pages.prefetched:
        inside = (
            tensor.data_ptr() <= first and first + nbytes <= tensor.data_ptr() + tensor.nbytes
            for tensor in large_states(optimizer)
        )
        assert any(inside)
    assert [tensor.data_ptr() for tensor in large_states(optimizer)] == addresses


# ---- staying paged ---------------------------------------------------------------------------


def test_the_report_says_where_state_is_and_why_not(pages: Pages) -> None:
    optimizer = build(OPTIONS["adamw8bit"])
    where = next(place for place in places(optimizer) if place != placement.RESIDENT)
    assert where in KINDS
    for row, shape in zip(optimizer.memory_report().rows, SHAPES, strict=True):
        numel = torch.Size(shape).numel()
        assert row.where == (where if numel >= 3000 else placement.RESIDENT)
        assert ("fewer than 3000: not paged" in row.reason) == (numel < 3000)
    assert where in str(optimizer.memory_report())
    assert places(unpaged(OPTIONS["adamw8bit"])) == [placement.RESIDENT] * len(SHAPES)


def reloaded(optimizer: Optimizer2State) -> Optimizer2State:
    other = build(OPTIONS["adamw8bit"])
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(held(other), held(optimizer), strict=True):
            p.copy_(q)
    return other


COPIES = {
    "load_state_dict": reloaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_paged_and_go_on(way: str, pages: Pages) -> None:
    with on(emulator()[0]):
        optimizer = build(OPTIONS["adamw8bit"])
        train((optimizer,), range(2))
        pages.managed.clear()
        other = COPIES[way](optimizer)
        assert places(other) == places(optimizer)
        mine, theirs = large_states(optimizer), large_states(other)
        assert not {t.data_ptr() for t in mine} & {t.data_ptr() for t in theirs}
        is_managed = placement.MANAGED in places(other)
        assert pages.managed == ([t.nbytes for t in theirs] if is_managed else [])
        assert_same(optimizer, other)
        train((optimizer, other), range(2, 4))
        assert len(belts(other)) == len(belts(optimizer)) == 1
    assert_same(optimizer, other)


@pytest.mark.parametrize("way", ["state_dict", *COPIES])
def test_pinned_state_is_read_when_it_is_whole(way: str, pages: Pages) -> None:
    """A step leaves while state is still copied to the host."""
    with on(emulator()[0]):
        optimizer = build(OPTIONS["adamw8bit"])
        train((optimizer,), range(1))
        assert pages.waits == 0
        COPIES[way](optimizer) if way in COPIES else optimizer.state_dict()
    assert (pages.waits > 0) == (placement.PINNED in places(optimizer))
