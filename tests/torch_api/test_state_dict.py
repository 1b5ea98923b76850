"""Checkpoints: going on is bit for bit as never having stopped."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from optfactory.errors import ConfigError
from tests.families import NAMES_OF_FIRST, is_of_matrices, known_to, names_with, rule_of, states_of
from tests.reference import reference_of
from tests.torch_api.harness import (
    assert_same_training,
    bits,
    clones,
    held,
    is_file_mapped,
    own_parameters,
    parameters,
    snapshot,
    through_file,
    train,
    trained,
)

NAMES = list_optimizers()
NARROW = ("4bit", "8bit", "fp8", "16bit")
StateDict = dict[str, Any]

pytestmark = pytest.mark.usefixtures("small_tensors")


# ---- going on -------------------------------------------------------------------------------


def others_of(name: str) -> dict[str, Any]:
    """Other numbers than the defaults, with the same rule: those of a checkpoint count."""
    flips = reference_of(get_optimizer_info(name).family).facts.flips
    found = {key: changes[0].value for key, changes in flips.items() if changes}
    numbers = {key: value for key, value in found.items() if isinstance(value, float | tuple)}
    found = {}
    for key, value in known_to(name, {"betas": (0.1, 0.2)} | numbers).items():
        with suppress(ConfigError):  # it needs another rule, or another field
            if rule_of(name, **{key: value}) == rule_of(name):
                found[key] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_going_on_is_bit_identical_to_never_having_stopped(name: str, backend: str) -> None:
    optimizer = trained(name, lr=0.01)
    saved = through_file(optimizer.state_dict())
    resumed = build_optimizer(name, clones(held(optimizer)), lr=0.5, **others_of(name))
    resumed.load_state_dict(saved)
    assert_same_training(resumed, optimizer)
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_same_training(resumed, optimizer)
    assert resumed.param_groups[0]["lr"] == 0.01
    fresh = build_optimizer(name, clones(held(optimizer)), lr=0.01)
    train(fresh, range(6, 7))
    train(optimizer, range(6, 7))
    assert bits(held(fresh)[0]) != bits(held(optimizer)[0])  # the state mattered


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {"amsgrad": True}),
        ("adam", {"optim_bits": 8, "block_size": 64, "min_8bit_size": 200}),
        ("paged_lamb", {"weight_decay": 0.1, "trust_ratio": "clip", "bias_correction": False}),
    ],
)
def test_going_on_keeps_every_option(name: str, options: dict[str, Any], backend: str) -> None:
    optimizer = trained(name, **options)
    resumed = build_optimizer(name, clones(held(optimizer)), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, range(3, 5))
    train(resumed, range(3, 5))
    assert_same_training(resumed, optimizer)


def test_groups_of_unlike_widths_go_on(backend: str) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        first = {"params": params[:2], "optim_bits": 8, "lr": 0.1}
        return [first, {"params": params[2:], "amsgrad": True}]

    optimizer = build_optimizer("adam", groups(parameters()))
    train(optimizer, range(3))
    resumed = build_optimizer("adam", groups(clones(held(optimizer))))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, range(3, 5))
    train(resumed, range(3, 5))
    assert_same_training(resumed, optimizer)


@pytest.mark.parametrize("name", ["adam8bit", "paged_adam"])
def test_a_running_optimizer_goes_back_to_its_checkpoint(name: str, backend: str) -> None:
    optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    start = clones(held(optimizer))
    train(optimizer, range(3, 5))
    wanted = [bits(p) for p in held(optimizer)]
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, old in zip(held(optimizer), start, strict=True):
            p.copy_(old)
    train(optimizer, range(3, 5))
    assert [bits(p) for p in held(optimizer)] == wanted


def test_parameters_without_state_start_afresh() -> None:
    optimizer = build_optimizer("adam8bit", parameters())
    held(optimizer)[0].grad = torch.ones(20, 300)
    optimizer.step()
    resumed = build_optimizer("adam8bit", parameters())
    train(resumed, range(2))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert [resumed.state[p].get("step", 0) for p in held(resumed)] == [1, 0, 0, 0, 0, 0]
    train(resumed, range(1))
    assert [resumed.state[p]["step"] for p in held(resumed)] == [2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["lamb", "paged_lamb8bit"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_dict_loads_into_its_own_optimizer(name: str, steps: int) -> None:
    optimizer = trained(name, steps=steps)
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    after = snapshot(optimizer)
    assert [state.keys() for state in after["states"]] == [s.keys() for s in before["states"]]
    assert after["groups"] == before["groups"]
    train(optimizer, range(steps, 2))
    other = trained(name, steps=2)
    assert_same_training(optimizer, other)


def test_a_loaded_checkpoint_is_copied_and_stays_as_it_was() -> None:
    source = trained("adam8bit")
    saved = source.state_dict()
    before = [{key: bits(t) for key, t in entry.items()} for entry in saved["state"].values()]
    groups = copy.deepcopy(saved["param_groups"])
    resumed = build_optimizer("adam8bit", clones(held(source)))
    resumed.load_state_dict(saved)
    resumed.param_groups[0]["lr"] = 0.5
    train(resumed, range(3, 5))
    after = [{key: bits(t) for key, t in entry.items()} for entry in saved["state"].values()]
    assert after == before
    assert saved["param_groups"] == groups


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "options"),
    [
        ("adam8bit", "paged_adam8bit", {}),
        ("paged_lamb", "lamb", {}),
        ("adamw", "adamw32bit", {}),
        ("paged_adam8bit", "adam", {"optim_bits": 8}),
    ],
)
def test_a_name_of_the_same_family_and_width_goes_on(
    saved_by: str, loaded_by: str, options: dict[str, Any]
) -> None:
    optimizer = trained(saved_by)
    resumed = build_optimizer(loaded_by, clones(held(optimizer)), **options)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, range(3, 5))
    train(resumed, range(3, 5))
    assert_same_training(resumed, optimizer)
    paged = get_optimizer_info(loaded_by).is_paged
    assert resumed.param_groups[0]["is_paged"] == paged
    assert resumed.param_groups[0]["optimizer"] == loaded_by
    large = resumed.state[held(resumed)[0]]
    assert is_file_mapped(large["exp_avg_q8" if "exp_avg_q8" in large else "exp_avg"]) == paged


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paged_")])
def test_loaded_state_is_paged(name: str, initialised: bool) -> None:
    optimizer = trained(name)
    resumed = build_optimizer(name, clones(held(optimizer)))
    if initialised:
        resumed.init_states()
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    mapped = 0
    for index, p in enumerate(held(resumed)):
        for key, tensor in resumed.state[p].items():
            if tensor.numel() >= 1000 and not key.endswith("_absmax"):
                assert is_file_mapped(tensor), (index, key)
                mapped += 1
    large = [p for p in held(resumed) if p.numel() >= 1000]
    assert len(large) >= 3
    assert mapped == len(large) * len(states_of(name))
    assert_same_training(resumed, optimizer)


# ---- what a checkpoint holds ----------------------------------------------------------------


def test_the_states_of_the_first_families_are_torchs() -> None:
    for name in NAMES_OF_FIRST:
        states = ["exp_avg", "exp_avg_sq"]
        assert [state.name for state in states_of(name)] == states
        if not name.endswith(NARROW):
            states.append("max_exp_avg_sq")
            assert [state.name for state in states_of(name, amsgrad=True)] == states


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES]
    + [(name, {"amsgrad": True}) for name in names_with("amsgrad") if not name.endswith(NARROW)],
)
def test_states_have_flat_keys_and_stated_dtypes_and_shapes(
    name: str, options: dict[str, Any]
) -> None:
    states = [state.name for state in states_of(name, **options)]
    optimizer = build_optimizer(name, own_parameters(name), **options)
    optimizer.init_states()
    # Of the 8-bit ones.
    scales: dict[tuple[int, ...], Any] = {(20, 300): (20, 2), (4097,): (17,), (64, 70): (64, 1)}
    entries = optimizer.state_dict()["state"]
    assert list(entries) == list(range(len(held(optimizer))))
    for index, p in enumerate(held(optimizer)):
        expected: dict[str, tuple[torch.dtype, Any]] = {"step": (torch.float64, ())}
        for state in states:
            if name.endswith(("4bit", "fp8")) and f"{state}_scale" in entries[index]:
                continue  # tests/options/test_small_floats.py
            if name.endswith("8bit") and tuple(p.shape) in scales:
                expected[f"{state}_q8"] = (torch.uint8, p.shape)
                expected[f"{state}_absmax"] = (torch.float32, scales[tuple(p.shape)])
            else:
                kind = torch.bfloat16 if name.endswith("16bit") else torch.float32
                expected[state] = (kind, p.shape)
        found = entries[index]
        found = {key: t for key, t in found.items() if not key.endswith(("_fp8", "_q4", "_scale"))}
        assert {key: (t.dtype, t.shape) for key, t in found.items()} == expected
        assert list(found) == list(expected)
        assert all(t.device.type == "cpu" and t.is_contiguous() for t in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_states_and_settings_and_nothing_else(name: str) -> None:
    optimizer = trained(name, steps=1)
    saved = through_file(optimizer.state_dict())
    assert set(saved) == {"state", "param_groups"}
    (group,) = saved["param_groups"]
    assert group["format_version"] == 1
    assert group["optimizer"] == name
    settings = {"params", "optimizer", "format_version", *get_optimizer_info(name).defaults}
    label = {"name"} if is_of_matrices(name) else set()  # of the groups that `others` make
    assert set(group) == settings | label
    for key in settings - {"params"}:
        assert type(group[key]) in (bool, int, float, str, tuple, type(None)), key
    tensors = [t for entry in saved["state"].values() for t in entry.values()]
    stored = sum(t.untyped_storage().nbytes() for t in tensors)
    assert stored == optimizer.memory_report().state_bytes


@pytest.mark.parametrize("name", NAMES)
def test_all_trainable_parameters_have_state_and_a_null_step_changes_no_bit(
    name: str, backend: str
) -> None:
    params = own_parameters(name)
    params[-1].requires_grad_(False)
    with torch.no_grad():
        params[0][0, :4] = torch.tensor([0.0, -0.0, 1e-45, 1e38])
        params[1].view(-1)[:3] = torch.tensor([-0.0, 1e-40, -3e38])
    optimizer = build_optimizer(name, params, lr=0.0)
    optimizer.init_states()
    assert all((p in optimizer.state) == p.requires_grad for p in params)
    before = [bits(p) for p in params]
    for p in params:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(2):
        optimizer.step()
    assert [bits(p) for p in params] == before
    assert all(optimizer.state[p]["step"] == 2 for p in params if p.requires_grad)


def test_init_states_keeps_what_is_there() -> None:
    optimizer = trained("adam8bit")
    before = snapshot(optimizer)
    optimizer.init_states()
    assert snapshot(optimizer) == before
