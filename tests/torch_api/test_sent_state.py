"""Paged state goes through the queues of torch.multiprocessing, and stays paged here."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import multiprocessing as mp

from optfactory import Optimizer2State
from tests.torch_api.harness import (
    assert_same_training,
    bits,
    held,
    is_file_mapped,
    mapping_of,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("small_tensors")

NAME = "paged_adamw8bit"


def large(optimizer: Optimizer2State) -> list[Tensor]:
    states = [t for entry in optimizer.state.values() for t in entry.values()]
    return [t for t in states if t.numel() >= 1000]


def answer(received: Any, answers: Any) -> None:
    """Runs in another process: what it finds in the optimizer and in the state dict it is sent."""
    optimizer, saved = received.get()
    entries = [optimizer.state[p] for p in held(optimizer)], saved["state"].values()
    answers.put([[int(entry["exp_avg_sq_q8"].sum()) for entry in list(e)[:3]] for e in entries])


def test_an_optimizer_and_its_state_dict_go_to_another_process() -> None:
    optimizer = trained(NAME)
    wanted = [int(optimizer.state[p]["exp_avg_sq_q8"].sum()) for p in held(optimizer)[:3]]
    context = mp.get_context("spawn")
    there, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=answer, args=(there, back), daemon=True)
    process.start()
    there.put((optimizer, optimizer.state_dict()))
    process.join()
    assert process.exitcode == 0
    assert back.get() == [wanted, wanted]
    assert all(is_file_mapped(t) for t in large(optimizer) if t.dtype == torch.uint8)


@pytest.mark.parametrize("what", ["state dict", "optimizer"])
def test_sending_paged_state_leaves_it_in_its_file(what: str) -> None:
    optimizer = trained(NAME)
    places = [mapping_of(t) for t in large(optimizer) if t.dtype == torch.uint8]
    value: Any = optimizer.state_dict() if what == "state dict" else optimizer
    ForkingPickler.dumps(value)
    assert [mapping_of(t) for t in large(optimizer) if t.dtype == torch.uint8] == places


def test_a_state_dict_of_paged_state_is_live_and_outlives_its_optimizer() -> None:
    optimizer = trained(NAME)
    saved = optimizer.state_dict()["state"][0]["exp_avg_q8"]
    before = bits(saved)
    train(optimizer, range(3, 4))
    live = optimizer.state[held(optimizer)[0]]["exp_avg_q8"]
    assert bits(saved) == bits(live) != before
    assert saved.data_ptr() == live.data_ptr()
    assert saved.untyped_storage().nbytes() == live.untyped_storage().nbytes()
    after = bits(live)
    del live, optimizer
    assert bits(saved) == after


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_what_wrappers_keep(way: Any) -> None:
    optimizer = trained(NAME)
    first, frozen = held(optimizer)[:2]
    optimizer.state[first]["ema"] = torch.ones(2)
    optimizer.state[frozen] = {"ema": 5}
    other = way(optimizer)
    assert torch.equal(other.state[held(other)[0]]["ema"], torch.ones(2))
    assert other.state[held(other)[1]] == {"ema": 5}
    assert is_file_mapped(other.state[held(other)[0]]["exp_avg_q8"])
    for o in (optimizer, other):
        del o.state[held(o)[0]]["ema"], o.state[held(o)[1]]
    train(optimizer, range(3, 4))
    train(other, range(3, 4))
    assert_same_training(other, optimizer)
