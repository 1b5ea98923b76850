"""Paged state on a GPU: managed or pinned memory, the same bits, paged for good, and freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from tests.devices import is_managed
from tests.gpu.harness import (
    DEVICE,
    NAMES,
    busy,
    content,
    give,
    gradients,
    needs_gpu,
    parameters,
    train,
    trained,
)
from tests.torch_api.harness import assert_same_training

pytestmark = needs_gpu

PAGED = [name for name in NAMES if name.startswith("paged_")]
FEW = ["paged_adam", "paged_adamw8bit", "paged_lamb8bit"]
MEMORIES = ["managed", "pinned", "auto"]
LARGE = [(400, 250), (500_003,), (1000, 301)]  # paged, and the next is not
SHAPES = [*LARGE, (333, 300)]

memories = pytest.mark.parametrize("memory", MEMORIES)
few = pytest.mark.parametrize("name", FEW)


def large_states(optimizer: Optimizer2State) -> list[Tensor]:
    """The state tensors that are to be paged."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        tensor
        for p in params
        if p.numel() >= 100_000
        for key, tensor in optimizer.state[p].items()
        if key != "step" and not key.endswith("_absmax")
    ]


def assert_paged(optimizer: Optimizer2State, memory: str) -> None:
    wanted = optimizer.memory_report().rows[0].where if memory == "auto" else memory
    assert wanted in ("managed", "pinned")
    states = large_states(optimizer)
    assert len(states) == 2 * len(LARGE)
    for state in states:
        assert is_managed(state) == (wanted == "managed")
        assert state.is_pinned() == (wanted == "pinned")
        assert state.device.type == ("cuda" if wanted == "managed" else "cpu")
    rows = optimizer.memory_report().rows
    assert [row.where for row in rows] == [wanted] * len(LARGE) + ["resident"]


# ---- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@memories
@pytest.mark.parametrize("name", PAGED)
def test_paging_changes_no_bit(name: str, memory: str, dtype: torch.dtype) -> None:
    paged = trained(name, parameters(DEVICE, SHAPES, dtype), page_memory=memory)
    resident = trained(name.removeprefix("paged_"), parameters(DEVICE, SHAPES, dtype))
    assert_paged(paged, memory)
    assert_same_training(paged, resident)


@pytest.mark.parametrize("piece", [1, 2**14, 2**20])
@pytest.mark.parametrize("memory", ["managed", "pinned"])
@few
def test_the_size_of_pieces_changes_no_bit(
    name: str, memory: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a chunk at a time: each buffer is then used again many times in a step."""
    resident = trained(name.removeprefix("paged_"), parameters(DEVICE, SHAPES))
    monkeypatch.setattr("optfactory.backends.cuda.paging.PIECE_BYTES", piece)
    paged = trained(name, parameters(DEVICE, SHAPES), page_memory=memory)
    assert_same_training(paged, resident)


def test_groups_may_differ_in_where_their_state_is() -> None:
    params = parameters(DEVICE, [(1000, 301)] * 3)
    places: list[dict[str, Any]] = [
        {"page_memory": "managed"}, {"page_memory": "pinned"}, {"is_paged": False}
    ]  # fmt: skip
    groups = [{"params": [p], **place} for p, place in zip(params, places, strict=True)]
    optimizer = build_optimizer("paged_adamw8bit", groups)
    train(optimizer, params, range(3))
    wheres = [row.where for row in optimizer.memory_report().rows]
    assert wheres == ["managed", "pinned", "resident"]
    others = parameters(DEVICE, [(1000, 301)] * 3)
    expected = trained("adamw8bit", others)
    assert content(optimizer) == content(expected)


def test_amsgrads_third_state_is_paged_too() -> None:
    for memory in ("managed", "pinned"):
        options: dict[str, Any] = {"amsgrad": True, "page_memory": memory}
        paged = trained("paged_adam", parameters(DEVICE, SHAPES), **options)
        resident = trained("adam", parameters(DEVICE, SHAPES), amsgrad=True)
        assert len(large_states(paged)) == 3 * len(LARGE)
        assert_same_training(paged, resident)


# ---- complete, though copies were under way ---------------------------------------------------


def _clones(states: list[Tensor]) -> list[Tensor]:
    return [state.clone() for state in states]


def _saved(optimizer: Optimizer2State) -> list[Tensor]:
    entries = optimizer.state_dict()["state"].values()
    tensors = [t for entry in entries for key, t in entry.items() if t.numel() >= 100_000]
    return _clones([t for t in tensors if t.device.type == "cpu"])


def _deepcopied(optimizer: Optimizer2State) -> list[Tensor]:
    return _clones(large_states(copy.deepcopy(optimizer)))


def _pickled(optimizer: Optimizer2State) -> list[Tensor]:
    return _clones(large_states(pickle.loads(pickle.dumps(optimizer))))


@pytest.mark.parametrize("save", [_saved, _deepcopied, _pickled])
@few
def test_what_is_saved_right_after_a_step_is_complete(
    name: str, save: Callable[[Optimizer2State], list[Tensor]]
) -> None:
    params = parameters(DEVICE, SHAPES)
    optimizer = trained(name, params, steps=2, page_memory="pinned")
    give(params, gradients(params, 2))
    torch.cuda.synchronize()
    busy(0.1)
    optimizer.step()
    got = save(optimizer)
    expected = trained(name.removeprefix("paged_"), parameters(DEVICE, SHAPES))
    for state, want in zip(got, large_states(expected), strict=True):
        assert torch.equal(state.cpu(), want.cpu())


# ---- paged for good ---------------------------------------------------------------------------


def loaded(optimizer: Optimizer2State, place: str | None) -> dict[str, Any]:
    """A checkpoint that went through a file, read to `place`."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, map_location=place, weights_only=True)
    return saved


@pytest.mark.parametrize("place", [None, "cpu", "cuda"])
@pytest.mark.parametrize("initialised", [False, True])
@memories
@few
def test_state_stays_paged_when_loaded(
    name: str, memory: str, initialised: bool, place: str | None
) -> None:
    params = parameters(DEVICE, SHAPES)
    optimizer = trained(name, params, page_memory=memory)
    others = [p.detach().clone().requires_grad_() for p in params]
    resumed = build_optimizer(name, others, page_memory=memory)
    if initialised:
        resumed.init_states()
    resumed.load_state_dict(loaded(optimizer, place))
    assert_paged(resumed, memory)
    assert_same_training(resumed, optimizer)
    train(optimizer, params, range(3, 5))
    train(resumed, others, range(3, 5))
    assert_same_training(resumed, optimizer)


@pytest.mark.parametrize("from_paged", [False, True])
@pytest.mark.parametrize("memory", ["managed", "pinned"])
def test_a_checkpoint_goes_on_paged_or_not(memory: str, from_paged: bool) -> None:
    names = ["adamw8bit", "paged_adamw8bit"]
    options: list[dict[str, Any]] = [{}, {"page_memory": memory}]
    source, target = (1, 0) if from_paged else (0, 1)
    params = parameters(DEVICE, SHAPES)
    optimizer = trained(names[source], params, **options[source])
    others = [p.detach().clone().requires_grad_() for p in params]
    resumed = build_optimizer(names[target], others, **options[target])
    resumed.load_state_dict(loaded(optimizer, None))
    train(optimizer, params, range(3, 5))
    train(resumed, others, range(3, 5))
    assert_same_training(resumed, optimizer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@memories
def test_copies_are_paged_and_independent(
    memory: str, duplicate: Callable[[Optimizer2State], Optimizer2State]
) -> None:
    params = parameters(DEVICE, SHAPES)
    optimizer = trained("paged_adamw8bit", params, page_memory=memory)
    before = content(optimizer)
    other = duplicate(optimizer)
    others = other.param_groups[0]["params"]
    assert_paged(other, memory)
    train(other, others, range(3, 5))
    assert content(optimizer) == before
    assert_paged(optimizer, memory)
    train(optimizer, params, range(3, 5))
    assert content(optimizer) == content(other)


# ---- freed ------------------------------------------------------------------------------------


def _free() -> int:
    """Bytes that the device has free, with nothing that only torch's allocator holds back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(DEVICE)[0]


@pytest.mark.parametrize("copied", [False, True])
def test_managed_memory_is_freed_with_the_optimizer(copied: bool) -> None:
    shape = [(4096, 4096)]  # 128 MiB of 32-bit state
    room = 2 * 4 * 4096 * 4096
    trained("paged_adam", parameters(DEVICE, shape), steps=1, page_memory="managed")  # loads code
    params = parameters(DEVICE, shape)
    give(params, gradients(params, 0))
    free = _free()
    for _ in range(3):
        optimizer: Any = build_optimizer("paged_adam", params, page_memory="managed")
        optimizer.step()
        other: Any = copy.deepcopy(optimizer.state_dict()) if copied else None
        if copied:
            optimizer.load_state_dict(other)
        assert free - _free() >= room // 2
        optimizer = other = None
        assert free - _free() <= room // 8


@pytest.mark.parametrize("memory", ["managed", "pinned"])
def test_an_optimizer_may_go_while_its_step_is_under_way(memory: str) -> None:
    """Its memory must not be given to others before the step is done."""
    for _ in range(3):
        params = parameters(DEVICE, SHAPES)
        optimizer: Any = trained("paged_adam", params, steps=2, page_memory=memory)
        give(params, gradients(params, 2))
        busy(0.05)
        optimizer.step()
        optimizer = None
        gc.collect()
        others = [torch.full((1_000_003,), torch.nan, device=DEVICE) for _ in range(8)]
        expected = parameters(DEVICE, SHAPES)
        trained("adam", expected, steps=3)
        for p, want in zip(params, expected, strict=True):
            assert torch.equal(p, want)
        assert all(bool(other.isnan().all()) for other in others)
