"""Our own checkpoints into every other name of the family, other blocks and other thresholds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from optfactory import Optimizer2State, build_optimizer, get_optimizer_info, list_optimizers
from optfactory.errors import StateError
from tests.checkpoints.harness import (
    SHAPES,
    array,
    assert_quantized,
    same,
    values_of,
    weights,
    width_of,
)
from tests.families import states_of, suited
from tests.numerics.harness import ENDS
from tests.torch_api.harness import (
    assert_same_training,
    clones,
    held,
    is_file_mapped,
    snapshot,
    through_file,
    train,
)

pytestmark = pytest.mark.usefixtures("small_tensors")

PAIRS = [
    (source, target)
    for source in list_optimizers()
    for target in list_optimizers()
    if get_optimizer_info(source).family == get_optimizer_info(target).family
]


def trained(name: str, **options: Any) -> Optimizer2State:
    own = suited(name, SHAPES)
    params = [p for p in weights() if tuple(p.shape) in own]
    optimizer = build_optimizer(name, params, **{"lr": 0.01, **options})
    train(optimizer, range(3))
    return optimizer


@cache
def source(name: str) -> Optimizer2State:
    """Shared by all tests of this name as a source, and changed by none."""
    return trained(name)


def assert_converted(
    old: Optimizer2State, new: Optimizer2State, old_block: int = 256, block: int = 256
) -> None:
    """Values are kept wherever they can be, and quantized by the specification elsewhere."""
    for p, q in zip(held(old), held(new), strict=True):
        assert same(array(new.state[q]["step"]), array(old.state[p]["step"]))
        for key in (state.name for state in states_of(old.config)):
            values = values_of(old.state[p], key, old_block)
            width = width_of(new.state[q], key)
            if key in new.state[q] and new.state[q][key].dtype == torch.bfloat16:
                values = array(torch.from_numpy(values).bfloat16())
            if not width or (width == width_of(old.state[p], key) and old_block == block):
                assert same(values_of(new.state[q], key, block), values)
            else:
                assert_quantized(new.state[q], values, key, block=block)


@pytest.mark.parametrize(("saved_by", "loaded_by"), PAIRS)
def test_every_name_goes_on_from_every_name_of_its_family(saved_by: str, loaded_by: str) -> None:
    old = source(saved_by)
    new = build_optimizer(loaded_by, clones(held(old)), lr=0.5)
    new.load_state_dict(through_file(old.state_dict()))
    assert_converted(old, new)
    info = get_optimizer_info(loaded_by)
    (group,) = new.param_groups
    assert (group["optimizer"], group["lr"]) == (loaded_by, 0.01)
    assert group["optim_bits"] == (info.optim_bits or 32)
    assert group["is_paged"] == info.is_paged
    large = new.state[held(new)[0]]
    for state in states_of(loaded_by):
        mapped = large[f"{state.name}{ENDS.get(width_of(large, state.name), '')}"]
        assert is_file_mapped(mapped) == info.is_paged
    exact = {"optim_bits": 32}
    if info.states not in ({}, exact) and get_optimizer_info(saved_by).states != info.states:
        return  # rounding changed the state
    # A step moves the parameters by moments that are not yet quantized anew.
    other = build_optimizer(saved_by, clones(held(old)), lr=0.5)
    other.load_state_dict(old.state_dict())
    train(other, range(3, 4))
    train(new, range(3, 4))
    for p, q in zip(held(other), held(new), strict=True):
        assert same(array(p), array(q))


@pytest.mark.parametrize("block", [64, 256, 2048])
@pytest.mark.parametrize("old_block", [64, 256, 4096])
def test_other_block_sizes_convert(old_block: int, block: int) -> None:
    old = trained("adam8bit", block_size=old_block)
    new = build_optimizer("adam8bit", clones(held(old)), block_size=block)
    new.load_state_dict(through_file(old.state_dict()))
    assert new.param_groups[0]["block_size"] == block
    if block <= old_block:  # inside a block that was, its scale stays
        for p, q in zip(held(old), held(new), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                values = values_of(old.state[p], key, old_block)
                assert same(values_of(new.state[q], key, block), values)
    else:
        # Rows of one block or less have the same blocks under both sizes.
        for index in (0, 2):
            p, q = held(old)[index], held(new)[index]
            values = values_of(old.state[p], "exp_avg", old_block)
            assert_quantized(new.state[q], values, "exp_avg", block=block)
    train(new, range(3, 5))


def test_another_threshold_changes_the_width_of_some_parameters() -> None:
    old = trained("adam8bit")
    new = build_optimizer("adam8bit", clones(held(old)), min_8bit_size=5000)
    new.load_state_dict(old.state_dict())
    assert_converted(old, new)
    assert ["exp_avg_q8" in new.state[p] for p in held(new)[:4]] == [True, True, False, False]
    assert new.param_groups[0]["min_8bit_size"] == 5000
    train(new, range(3, 5))


@pytest.mark.parametrize("initialised", [False, True])
def test_a_converted_checkpoint_is_a_checkpoint_like_any_other(initialised: bool) -> None:
    old = trained("adam")
    new = build_optimizer("paged_adam8bit", clones(held(old)))
    if initialised:
        new.init_states()
    new.load_state_dict(old.state_dict())
    again = build_optimizer("adam8bit", clones(held(new)))
    again.load_state_dict(through_file(new.state_dict()))
    train(new, range(3, 6))
    train(again, range(3, 6))
    assert_same_training(new, again)


def test_groups_convert_each_as_its_own_config_says() -> None:
    def groups(params: list[Any], first: int, second: int) -> list[dict[str, Any]]:
        return [
            {"params": params[:2], "optim_bits": first, "lr": 0.1},
            {"params": params[2:], "optim_bits": second},
        ]

    old = build_optimizer("adam", groups(weights(), 8, 32))
    train(old, range(3))
    new = build_optimizer("adam", groups(clones(held(old)), 32, 8))
    new.load_state_dict(through_file(old.state_dict()))
    assert_converted(old, new)
    assert [group["optim_bits"] for group in new.param_groups] == [32, 8]
    assert [group["lr"] for group in new.param_groups] == [0.1, 1e-3]
    train(new, range(3, 5))


def test_a_label_of_a_group_stays_a_label() -> None:
    def build() -> Optimizer2State:
        return build_optimizer("adam", [{"params": weights(), "name": "all of it"}])

    old, new = build(), build()
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["name"] == "all of it"


def test_hyperparameters_that_an_older_release_did_not_have_stay_as_configured() -> None:
    saved = trained("adam8bit").state_dict()
    for key in ("bias_correction", "capturable", "min_8bit_size", "page_memory"):
        del saved["param_groups"][0][key]
    new = build_optimizer("adam8bit", weights(), bias_correction=False)
    new.load_state_dict(saved)
    assert new.param_groups[0]["bias_correction"] is False


def test_the_mode_of_decay_follows_the_checkpoint_within_a_family() -> None:
    saved = trained("adam", adam_w_mode=True, weight_decay=0.1).state_dict()
    new = build_optimizer("adam8bit", weights())
    new.load_state_dict(saved)
    assert new.param_groups[0]["adam_w_mode"] is True
    other = build_optimizer("adamw", weights())  # the same mathematics by another name
    other.load_state_dict(saved)
    assert other.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("saved_by", "options", "loaded_by", "words"),
    [
        ("adamw", {}, "adam8bit", ["optimizer", "'adamw'", "'adam8bit'", "0.01", "adam_w_mode"]),
        ("adam", {"weight_decay": 0.5}, "paged_adamw", ["optimizer", "'adam'", "0.5"]),
        ("adam8bit", {}, "lamb8bit", ["optimizer", "'adam'", "'lamb8bit'"]),
        ("lamb", {}, "adamw", ["optimizer", "'lamb'", "'adamw'"]),
        ("adam", {"amsgrad": True}, "adam8bit", ["amsgrad", "True", "False", "32-bit"]),
    ],
)
def test_another_mathematics_is_refused(
    saved_by: str, options: dict[str, Any], loaded_by: str, words: list[str]
) -> None:
    saved = trained(saved_by, **options).state_dict()
    new = trained(loaded_by)
    before = snapshot(new)
    with pytest.raises(StateError) as caught:
        new.load_state_dict(saved)
    assert snapshot(new) == before
    for word in ["param_groups[0]", *words]:
        assert word in str(caught.value)


def test_infinite_state_goes_on_in_32_bits_as_it_was() -> None:
    old = trained("adam")
    old.state[held(old)[0]]["exp_avg"][0, 0] = torch.inf
    new = build_optimizer("paged_adam", clones(held(old)))
    new.load_state_dict(old.state_dict())
    assert_same_training(old, new)


def test_state_that_no_longer_fits_its_parameter_is_replaced() -> None:
    old, new = trained("adam"), trained("adam8bit")
    new.state[held(new)[5]]["exp_avg"] = torch.zeros(3)
    new.load_state_dict(old.state_dict())
    assert_converted(old, new)
    train(new, range(3, 5))
