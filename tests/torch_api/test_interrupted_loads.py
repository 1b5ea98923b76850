"""A load that is interrupted, or that fails on its way, has happened as a whole or not at all."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import optfactory
from optfactory import Optimizer2State, build_optimizer
from optfactory.checkpoints import convert
from tests.torch_api.harness import (
    assert_same_training,
    clones,
    held,
    is_file_mapped,
    parameters,
    snapshot,
    through_file,
    train,
    trained,
)

PACKAGE = str(Path(optfactory.__file__).parent)

pytestmark = pytest.mark.usefixtures("small_tensors")


def contents(optimizer: Optimizer2State) -> list[Any]:
    """Everything but the places of tensors."""
    found = snapshot(optimizer)
    states = [{key: facts[1:] for key, facts in entry.items()} for entry in found["states"]]
    return [found["params"], states, found["groups"]]


def with_interrupt_at(event: int, call: Callable[[], object]) -> int:
    """Raise KeyboardInterrupt at so many lines of the package from the beginning of a call.

    Returns:
        how many lines were begun.
    """
    begun = 0

    def trace(frame: FrameType, what: str, _: Any) -> Any:
        nonlocal begun
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if what == "line":
            begun += 1
            if begun == event:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return begun


# Between making a temporary folder and entering it, Python removes the folder and says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_the_old_state_or_the_new_one() -> None:
    saved = through_file(trained("paged_adamw8bit", lr=0.5).state_dict())
    optimizer = trained("paged_adamw8bit", steps=1)
    before = copy.deepcopy(optimizer)
    old = contents(optimizer)
    other = copy.deepcopy(optimizer)
    lines = with_interrupt_at(-1, lambda: other.load_state_dict(saved))
    new = contents(other)[1:]
    seen = []
    for event in [*range(1, lines, lines // 40), *range(lines - 20, lines + 1)]:
        optimizer = copy.deepcopy(before)
        with pytest.raises(KeyboardInterrupt):
            with_interrupt_at(event, partial(optimizer.load_state_dict, saved))
        seen.append(contents(optimizer)[1:])
        assert seen[-1] in (old[1:], new)
    assert seen[0] == old[1:]
    assert seen[-1] == new


@pytest.mark.parametrize("steps", [0, 2])
def test_an_error_in_the_last_copy_changes_nothing(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = through_file(trained("adam8bit", lr=0.5).state_dict())
    optimizer = trained("adam8bit", steps=steps)
    before = snapshot(optimizer)
    write, written = convert.write, []

    def fail(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 6:
            raise RuntimeError("broken")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write", fail)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["adamw", "paged_lamb8bit"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_loads_in_inference_mode(name: str, steps: int) -> None:
    source = trained(name)
    with torch.inference_mode():
        saved = through_file(source.state_dict())
        optimizer = build_optimizer(name, clones(held(source)))
    train(optimizer, range(steps))
    for p, q in zip(held(optimizer), held(source), strict=True):
        p.data.copy_(q.data)
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    states = [t for entry in optimizer.state.values() for t in entry.values()]
    assert not any(t.is_inference() for t in states)
    train(source, range(3, 5))
    train(optimizer, range(3, 5))
    assert_same_training(optimizer, source)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("layout", ["own", "torch", "bitsandbytes"])
def test_what_is_taken_in_inference_mode_is_ordinary(name: str, layout: str) -> None:
    optimizer = build_optimizer(name, parameters(), lr=torch.tensor(0.5))
    train(optimizer, range(1))
    with torch.inference_mode():
        is_own = layout == "own"
        saved = optimizer.state_dict() if is_own else optimizer.export_state_dict(layout)
    values = [*saved["param_groups"], *saved["state"].values()]
    tensors = [t for entry in values for t in entry.values() if isinstance(t, Tensor)]
    assert len(tensors) > 6
    assert not any(t.is_inference() for t in tensors)


def test_a_learning_rate_loaded_in_inference_mode_can_be_changed() -> None:
    source = build_optimizer("adam", parameters(), lr=torch.tensor(0.1))
    optimizer = build_optimizer("adam", parameters())
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.05)


def test_state_that_a_graph_may_have_recorded_stays_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optfactory.group_config._backend_problem", lambda *_: "")

    def build(seed: int) -> Optimizer2State:
        lr = torch.tensor(0.1 * (seed + 1))
        return build_optimizer("adam8bit", parameters(seed), lr=lr, capturable=True)

    source, optimizer = build(1), build(0)
    source.init_states()
    optimizer.init_states()
    for entry in source.state.values():
        for value in entry.values():
            value.fill_(3)
    live = [t for entry in optimizer.state.values() for t in entry.values()]
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(source.state_dict())
    after = [t for entry in optimizer.state.values() for t in entry.values()]
    assert all(one is other for one, other in zip(live, after, strict=True))
    assert all(bool((value == 3).all()) for value in after)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.2)


def test_loaded_paged_state_is_in_files_of_its_own() -> None:
    optimizer = trained("paged_adam8bit")
    saved = optimizer.state_dict()
    before = {t.data_ptr() for entry in optimizer.state.values() for t in entry.values()}
    optimizer.load_state_dict(saved)
    paged = [t for entry in optimizer.state.values() for t in entry.values() if t.numel() >= 1000]
    mapped = [t for t in paged if t.dtype == torch.uint8 or t.numel() == 4200]
    assert len(mapped) == 8
    assert all(is_file_mapped(t) and t.data_ptr() not in before for t in mapped)
