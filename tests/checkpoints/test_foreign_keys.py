"""Wrappers keep keys of their own in `optimizer.state`: they are saved and loaded back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import StateError
from tests.torch_api.harness import assert_same_training, bits, snapshot, through_file, train

BUFFER = "lookahead_slow_buff"  # of timm's Lookahead


def build(name: str = "adamw8bit") -> Optimizer2State:
    params = [torch.ones(20, 300).requires_grad_(), torch.ones(7).requires_grad_()]
    return build_optimizer(name, params, lr=0.01)


def first(optimizer: Any) -> Any:
    return optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize("backend", ["cpu", "reference"], indirect=True)
def test_a_wrappers_keys_are_saved_and_loaded_back(backend: str) -> None:
    optimizer = build()
    train(optimizer, range(1))
    slow = torch.full((20, 300), 0.5, dtype=torch.float64)
    own = {BUFFER: slow, "ema": {"decay": 0.9, "mean": [torch.ones(3)]}, 5: "five"}
    optimizer.state[first(optimizer)].update(own)
    saved = through_file(optimizer.state_dict())
    resumed = build()
    for p, q in zip(*(o.param_groups[0]["params"] for o in (resumed, optimizer)), strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(saved)
    entries = resumed.state[first(resumed)]
    assert entries[BUFFER].dtype == torch.float64
    assert bits(entries[BUFFER]) == bits(slow)
    assert entries["ema"]["decay"] == 0.9
    assert entries[5] == "five"
    entries[BUFFER].zero_()
    entries["ema"]["mean"][0].zero_()
    assert saved["state"][0][BUFFER].sum() == slow.sum()  # copied deeply
    assert saved["state"][0]["ema"]["mean"][0].sum() == 3
    train(optimizer, range(1, 3))
    train(resumed, range(1, 3))
    for o in (optimizer, resumed):
        for key in own:
            del o.state[first(o)][key]
    assert_same_training(resumed, optimizer)


def test_a_frozen_parameter_may_have_foreign_keys_only() -> None:
    optimizer = build()
    first(optimizer).requires_grad_(False)
    optimizer.state[first(optimizer)]["ema"] = torch.ones(2)
    optimizer.init_states()
    saved = through_file(optimizer.state_dict())
    assert list(saved["state"][0]) == ["ema"]
    resumed = build()
    resumed.load_state_dict(saved)
    assert list(resumed.state[first(resumed)]) == ["ema"]
    assert "exp_avg" in resumed.state[resumed.param_groups[0]["params"][1]]
    assert list(optimizer.export_state_dict("torch")["state"]) == [1]
    assert optimizer.memory_report().state_bytes > 0


def test_a_wrappers_key_beside_the_parameters_is_kept() -> None:
    optimizer = build()
    optimizer.state["sync"] = {"period": 5, "buffer": torch.ones(2)}  # type: ignore[index]
    saved = through_file(optimizer.state_dict())
    resumed = build()
    resumed.load_state_dict(saved)
    found: Any = dict(resumed.state)
    assert found["sync"]["period"] == 5
    assert found["sync"]["buffer"].data_ptr() != saved["state"]["sync"]["buffer"].data_ptr()
    resumed.load_state_dict(resumed.state_dict())


@pytest.mark.parametrize("steps", [0, 1])
def test_torchs_checkpoints_may_have_foreign_keys(steps: int) -> None:
    params = [torch.ones(20, 300).requires_grad_(), torch.ones(7).requires_grad_()]
    source = torch.optim.AdamW(params)
    train(source, range(steps))
    source.state[params[0]][BUFFER] = torch.full((20, 300), 0.5, dtype=torch.bfloat16)
    optimizer = build()
    optimizer.load_state_dict(source.state_dict())
    entries = optimizer.state[first(optimizer)]
    assert entries[BUFFER].dtype == torch.bfloat16
    assert ("step" in entries) == bool(steps)
    back = optimizer.export_state_dict("torch")["state"]
    assert (BUFFER in back[0]) if steps else back == {}


@pytest.mark.parametrize(
    "key",
    [
        *("max_exp_avg_sq", "state1", "qmap1", "momentum_buffer", "exp_avg_sq_row", "exp_avg_slow"),
        *("exp_avg_q9", "absmax2", "sum", "__bnb_optimizer_quant_state__"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_key_that_means_a_state_elsewhere_is_refused(key: str, steps: int) -> None:
    optimizer = build()
    train(optimizer, range(steps))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"].setdefault(0, {})[key] = torch.ones(20, 300)
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=key):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_a_foreign_key_that_cannot_be_copied_is_named() -> None:
    optimizer = build()
    train(optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["mask"] = torch.ones(3, device="meta")
    before = snapshot(optimizer)
    with pytest.raises(StateError, match=r"params\[0\]\.mask: cannot be copied to cpu"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


# ---- empty entries ----------------------------------------------------------------------------


def test_a_look_at_a_parameters_state_does_not_make_the_checkpoint_unloadable() -> None:
    optimizer = build()
    assert not optimizer.state[first(optimizer)]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] == {}
    saved["state"][0] = {}  # as releases before this one, and torch, write it
    build().load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    assert not optimizer.state[first(optimizer)]
    assert optimizer.export_state_dict("torch")["state"] == {}


def test_a_look_at_the_state_of_a_tensor_of_no_group_does_not_break_saving() -> None:
    optimizer = build()
    assert not optimizer.state[torch.ones(3)]
    assert optimizer.state_dict()["state"] == {}


def test_state_of_a_tensor_of_no_group_is_named() -> None:
    optimizer = build()
    optimizer.state[torch.ones(3)]["ema"] = torch.ones(3)
    with pytest.raises(StateError, match=r"ema of a tensor of shape \(3,\).*in no param group"):
        optimizer.state_dict()


def test_torchs_checkpoint_with_an_empty_entry_loads() -> None:
    params: list[Tensor] = [torch.ones(20, 300).requires_grad_(), torch.ones(7).requires_grad_()]
    source = torch.optim.Adam(params)
    params[1].grad = torch.ones(7)
    source.step()
    assert not source.state[params[0]]
    optimizer = build("adam8bit")
    optimizer.load_state_dict(source.state_dict())
    assert [len(optimizer.state.get(p, {})) for p in optimizer.param_groups[0]["params"]] == [0, 3]
