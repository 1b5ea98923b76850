"""How sizes are read, and whether a plan fits, at the exact byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from optfactory import plan
from optfactory.errors import ConfigError
from optfactory.planning.memory_plan import MemoryPlan, read_size
from tests.planning.harness import NAMES, Odd, on_meta, sized
from tests.sampling import spread

SIZES = {
    "24GiB": 24 * 1024**3,
    "80GB": 80 * 1000**3,
    "80G": 80 * 1000**3,
    "80Gi": 80 * 1024**3,
    "1.5 TiB": 3 * 1024**4 // 2,
    "512 MiB": 512 * 1024**2,
    "  2KB ": 2000,
    "7 KiB": 7 * 1024,
    "1024": 1024,
    "1024B": 1024,
    "1024 B": 1024,
    "0.5GiB": 1024**3 // 2,
    "1T": 10**12,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items(), ids=SIZES)
def test_a_size_is_a_number_with_a_decimal_or_a_binary_unit(text: str, size: int) -> None:
    assert read_size(text) == size


def test_a_number_is_bytes_and_nothing_is_nothing() -> None:
    assert read_size(1024) == 1024
    assert read_size(10**15 + 1) == 10**15 + 1
    assert read_size(None) is None


@pytest.mark.parametrize(
    "text",
    [
        *("0", "0GiB", "0.0", "-1", "-1GiB", "+1", "abc", "12XB", "", " ", "GiB", "1.", ".5"),
        *("1,5GiB", "1e3", "24 G iB", "24GiBs", "24iB", "24BB", "1/2", "0x10", "inf", "nan"),
        *("1 2", "1\n2"),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    for call in (lambda: read_size(text), lambda: plan("adam", on_meta(Odd), memory=text)):
        with pytest.raises(ConfigError, match="24GiB") as caught:
            call()
        assert repr(text) in str(caught.value)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_bytes_is_above_0(number: int) -> None:
    with pytest.raises(ConfigError, match="memory is a size"):
        plan("adam", on_meta(Odd), memory=number)


def test_without_a_size_there_is_no_verdict() -> None:
    planned = plan("adam", on_meta(Odd))
    assert (planned.memory, planned.verdict()) == (None, "")
    assert planned.verdict(planned.alternatives[0].shares) == ""
    assert "It fits" not in str(planned)
    assert "not fit" not in str(planned)


def sized_plan(name: str, memory: int | None = None) -> MemoryPlan:
    return plan(name, on_meta(Odd), memory=memory)


def test_what_is_needed_is_a_sum_that_one_can_do_by_hand() -> None:
    model = Odd()
    tensors = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    planned = sized_plan("adam")
    elements = sum(p.numel() for p in model.parameters())
    state = 8 * elements + 8 * len(list(model.parameters()))
    assert planned.needed() == (2 * tensors + buffers + state, 0)
    large = sum(p.numel() for p in model.parameters() if p.numel() >= 100_000)
    assert sized_plan("paged_adam").needed() == (
        2 * tensors + buffers + state - 8 * large,
        8 * large,
    )
    assert large == 513 * 400 + 120_001 + 100_000


@pytest.mark.parametrize("name", ["adam", "adamw8bit"])
def test_the_last_byte_decides_what_fits(name: str) -> None:
    stay, leave = sized_plan(name).needed()
    assert leave == 0
    assert sized_plan(name, stay).verdict() == "fits"
    assert sized_plan(name, stay + 1).verdict() == "fits"
    assert sized_plan(name, stay - 1).verdict() == "no"


def test_paged_state_may_leave() -> None:
    stay, leave = sized_plan("paged_adam").needed()
    assert leave > 0
    verdicts = {
        stay + leave: "fits",
        stay + leave - 1: "fits paged",
        stay: "fits paged",
        stay - 1: "no",
    }
    for memory, verdict in verdicts.items():
        planned = sized_plan("paged_adam", memory)
        assert planned.verdict() == verdict
        assert planned.as_dict()["verdict"] == verdict


def test_the_verdict_on_other_names_is_that_of_their_own_plan() -> None:
    some = {*spread(NAMES, 10), "paged_adam8bit", "adam8bit", "lamb32bit"}
    own = {name: sized_plan(name) for name in some}
    stay, leave = own["paged_adam8bit"].needed()
    seen = set()
    for memory in (stay, stay + leave, own["adam8bit"].needed()[0], 2 * (stay + leave)):
        planned = replace(own["lamb32bit"], memory=memory)
        listed = {row["name"]: row["verdict"] for row in planned.as_dict()["alternatives"]}
        for other in (other for other in planned.alternatives if other.name in own):
            expected = replace(own[other.name], memory=memory)
            assert planned.needed(other.shares) == expected.needed()
            assert planned.verdict(other.shares) == listed[other.name] == expected.verdict()
            seen.add(expected.verdict())
    assert seen == {"fits", "fits paged", "no"}


def test_state_that_lives_elsewhere_does_not_count_on_the_device() -> None:
    # The step counters of parameters on a GPU are on the CPU.
    planned = plan("adam", on_meta(Odd), device="cuda", memory=10**9)
    steps = sum(share.nbytes for share in planned.shares if share.device == "cpu")
    assert steps == 8 * len(planned.report.rows)
    total = sum(share.nbytes for share in planned.shares)
    assert planned.needed() == (total - steps, 0)


def test_a_model_of_16_bits_needs_half_for_parameters_and_gradients() -> None:
    def model(dtype: torch.dtype) -> nn.Module:
        return on_meta(lambda: nn.Linear(300, 200, bias=False), dtype)

    wide, narrow = plan("adam", model(torch.float32)), plan("adam", model(torch.bfloat16))
    assert wide.needed()[0] - narrow.needed()[0] == 2 * 2 * 300 * 200
    assert sized(narrow, "parameters") == sized(narrow, "gradients") == {16: 2 * 300 * 200}
