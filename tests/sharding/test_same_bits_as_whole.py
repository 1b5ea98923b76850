"""Shards, however tensors are cut, are updated to the bits of the whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sharding.shards import Shards, Spread

STEPS = 3
LR = {"lr": 0.01, "weight_decay": 0.1}

# Where shards end inside blocks: vectors, columns, the last dimension, several dimensions.
CUT = {
    "vector in 2": Spread((5000,), (2,), (0,)),
    "vector in 3": Spread((5000,), (3,), (0,)),
    "vector in 4": Spread((5000,), (4,), (0,)),
    "vector in 2x2": Spread((5003,), (2, 2), (0, 0)),
    "columns in 2": Spread((7, 600), (2,), (1,)),
    "columns in 3": Spread((7, 600), (3,), (1,)),
    "rows and columns": Spread((9, 600), (2, 2), (0, 1)),
    "last of three": Spread((3, 8, 100), (2,), (2,)),
    "middle of three": Spread((3, 9, 100), (2,), (1,)),
    "middle and last": Spread((3, 8, 100), (2, 2), (1, 2)),
    "few columns": Spread((70, 70), (4,), (1,)),
    "vector in 16, one empty": Spread((100,), (16,), (0,)),
}
# Where they do not.
UNCUT = {
    "rows in 2": Spread((7, 600), (2,), (0,)),
    "rows in 4, one empty": Spread((5, 900), (4,), (0,)),
    "whole blocks": Spread((5, 1024), (2,), (1,)),
    "vector of whole blocks": Spread((4096,), (2,), (0,)),
    "middle of whole blocks": Spread((3, 8, 256), (2,), (1,)),
}
ALL = CUT | UNCUT


def check(
    name: str, spreads: list[Spread], dtype: torch.dtype = torch.float32, **asked: Any
) -> Shards:
    shards = Shards(name, spreads, dtype, **LR | {"min_8bit_size": 1} | asked)
    for step in range(STEPS):
        shards.give_gradients(step, strided=step == 1)  # in one step as views
        shards.step()
        shards.assert_same()
    return shards


@pytest.mark.parametrize("label", ALL)
def test_8_bit_state_of_all_spreads(label: str, backend: str) -> None:
    shards = check("adamw8bit", [ALL[label]])
    slots = shards.slots(0)
    assert all(slot.layout.quantized for slot in slots)
    assert [slot.layout.options.cuts_blocks for slot in slots] == [label in CUT] * len(slots)
    assert (min(slot.parameter.numel() for slot in slots) == 0) == ("empty" in label)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lamb8bit"])
@pytest.mark.parametrize("label", ["vector in 3", "columns in 2", "rows in 4, one empty"])
def test_other_widths_and_norms(label: str, name: str, backend: str) -> None:
    check(name, [ALL[label]])


def test_several_tensors_in_a_bucket(backend: str) -> None:
    spreads = [CUT[label] for label in ("vector in 2", "columns in 2", "last of three")]
    spreads += [Spread((1, 300), (2,), (0,))]  # one process has none of it
    check("lamb8bit", spreads, percentile_clipping=5)


@pytest.mark.parametrize(
    ("spread", "cuts"),
    [
        (Spread((7, 600), (2,), (0,)), True),
        (Spread((5000,), (3,), (0,)), True),
        (Spread((4, 1024), (2,), (1,)), True),
        (Spread((8, 640), (2,), (0,)), False),  # 10 blocks each
    ],
    ids=str,
)
def test_blocks_of_bitsandbytes_run_through_rows(spread: Spread, cuts: bool, backend: str) -> None:
    shards = check("adamw8bit", [spread], compat="bitsandbytes")
    assert shards.slots(0)[0].layout.options.cuts_blocks == cuts


@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
@pytest.mark.parametrize("label", ["vector in 3", "columns in 2", "rows in 4, one empty"])
def test_one_scale_for_a_whole_tensor(label: str, name: str, backend: str) -> None:
    check(name, [ALL[label]], block_wise=False)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lamb8bit"])
@pytest.mark.parametrize("label", ["vector in 3", "columns in 2", "rows in 4, one empty"])
def test_percentile_clipping(label: str, name: str, backend: str) -> None:
    check(name, [ALL[label]], percentile_clipping=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw16bit"])
@pytest.mark.parametrize("label", ALL)
def test_random_bits_are_those_of_the_whole_tensor(
    label: str, name: str, dtype: torch.dtype, backend: str
) -> None:
    if label == "middle and last":
        pytest.skip("refused: elements are at unequal distances")
    check(name, [ALL[label]], dtype, param_rounding="stochastic")


@pytest.mark.parametrize(
    "asked",
    [
        {"param_rounding": "kahan"},
        {"master_weights": "split"},
        {"master_weights": "fp32", "block_wise": False},
        {"signed_map": "symmetric"},
        {"state_rounding": "stochastic"},
        {"second_moment_floor": False},
        {"block_size": 64},
        {"block_size": 4096},
        {"skip_zeros": True},
        {"maximize": True},
        {"cautious": True},
        {"cautious": True, "cautious_weight_decay": True, "block_wise": False, "skip_zeros": True},
        {"block_wise": False, "param_rounding": "stochastic"},
        {"percentile_clipping": 5, "param_rounding": "stochastic", "nonfinite": "skip_element"},
    ],
    ids=str,
)
@pytest.mark.parametrize("label", ["vector in 3", "columns in 2", "last of three"])
def test_other_options(label: str, asked: dict[str, Any], backend: str) -> None:
    check("adamw8bit", [ALL[label]], torch.bfloat16, **asked)


def test_elements_that_are_not_finite_do_not_enter_scales(backend: str) -> None:
    shards = Shards("adamw8bit", [CUT["columns in 2"]], torch.float32, **LR, min_8bit_size=1)
    for step in range(STEPS):
        shards.give_gradients(step)
        if step == 1:
            whole = shards.whole[0].grad
            assert whole is not None
            whole[2, 290], whole[5, 310] = float("inf"), float("nan")
            for slot in shards.slots(0):
                assert slot.layout.piece is not None
                slot.parameter.grad = whole[slot.layout.piece.box.slices].clone()
        shards.step()
        shards.assert_same()
