"""A width for each state: what is stored, what is refused, groups, checkpoints, shards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, resolve
from optfactory.errors import ConfigError
from tests.families import FAMILIES, states_of
from tests.numerics.harness import array
from tests.options.tools import assert_refused

WIDTHS: list[dict[str, Any]] = [
    {"optim_bits": 4},
    {"optim_bits": 8},
    {"optim_bits": 8, "state_format": "fp8"},
    {"optim_bits": 16},
    {"optim_bits": 32},
]
PAIRS = list(itertools.permutations(range(len(WIDTHS)), 2))
KEYS = {4: ("_q4", "_scale"), 8: ("_q8", "_absmax"), 16: ("",), 32: ("",)}
MIXED = [
    dict(zip(("exp_avg", "exp_avg_sq"), pair, strict=True))
    for pair in itertools.permutations((4, 8, 16, 32), 2)
]


def steps(optimizer: torch.optim.Optimizer, p: Tensor, count: int = 3) -> None:
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p.device)
        optimizer.step()


def started(name: str, shape: tuple[int, ...] = (64, 256), **asked: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    p = torch.randn(shape).requires_grad_()
    return build_optimizer(name, [p], seed=asked.pop("seed", None), **asked), p


@pytest.mark.parametrize("bits", MIXED, ids=str)
def test_each_state_is_stored_as_told(bits: dict[str, int], backend: str) -> None:
    """A state has what it would have if all were as wide, as the rule's states do not meet."""
    draws = {"state_rounding": "nearest"} if 8 in bits.values() else {}
    optimizer, p = started("adamw", state_bits=bits, **draws)
    steps(optimizer, p, 1)
    state = optimizer.state[p]
    expected = {f"{name}{end}" for name, width in bits.items() for end in KEYS[width]}
    assert state.keys() == expected | {"step"}
    for name, width in bits.items():
        alone, q = started("adamw", optim_bits=width)
        if 4 in bits.values() and width == 8:
            alone, q = started("adamw", optim_bits=width, block_size=128)
        steps(alone, q, 1)
        for end in KEYS[width]:
            assert (array(state[f"{name}{end}"]) == array(alone.state[q][f"{name}{end}"])).all()


def test_the_default_is_optim_bits(backend: str) -> None:
    optimizer, p = started("ademamix", optim_bits=8, state_bits={"exp_avg_slow": 32})
    steps(optimizer, p)
    assert optimizer.state[p]["exp_avg_slow"].dtype == torch.float32
    assert {"exp_avg_q8", "exp_avg_sq_q8"} <= optimizer.state[p].keys()
    row = optimizer.memory_report().rows[0]
    assert row.bits == "8/32"
    assert row.nbytes == p.numel() * (4 + 2) + 2 * 64 * 4 + 8


def test_groups_have_their_own() -> None:
    params = [torch.randn(64, 256).requires_grad_() for _ in range(3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "state_bits": {"exp_avg": 16}},
        {"params": params[2:], "optim_bits": 32},
    ]
    optimizer = build_optimizer("adamw", groups, optim_bits=8, state_bits={"exp_avg_sq": 32})
    assert [row.bits for row in optimizer.memory_report().rows] == ["8/32", "16/8", 32]


def test_command_lines_may_write_them() -> None:
    assert resolve("adamw", state_bits="{exp_avg: 8}").state_bits == {"exp_avg": 8}
    assert resolve("adamw", state_bits={"exp_avg": "8"}).state_bits == {"exp_avg": 8}


def test_refused() -> None:
    assert_refused("has the states exp_avg, exp_avg_sq", "adamw", state_bits={"exp_avgs": 8})
    assert_refused("keeps no state", "sgd", momentum=0.0, state_bits={"momentum_buffer": 32})
    assert_refused("contradicts the name", "adamw8bit", state_bits={"exp_avg": 16})
    assert_refused("should be 4, 8, 16 or 32", "adamw", state_bits={"exp_avg": 12})
    assert_refused("valid dictionary", "adamw", state_bits="8")
    assert_refused("state_bits", "adamw", state_bits={})
    assert_refused("amsgrad", "adamw", amsgrad=True, state_bits={"exp_avg": 16})
    assert_refused("bitsandbytes", "adamw", compat="bitsandbytes", state_bits={"exp_avg": 8})
    assert_refused("fp8 is a format of 8-bit", "adamw", state_format="fp8", optim_bits=16)
    assert_refused("contradicts the name", "adamw8bit", state_format="fp8")
    assert_refused("signed_map", "adamwfp8", signed_map="symmetric")
    assert_refused("state_rounding", "adamw4bit", state_rounding="stochastic")
    assert_refused("too coarse", "lion", optim_bits=4)
    assert_refused("too coarse", "lion", state_bits={"exp_avg": 4})
    with pytest.raises(ConfigError, match="lion8bit"):
        resolve("lion4bit")


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_checkpoints_of_all_widths_load_into_all(one: int, other: int) -> None:
    """And back: what both can hold stays, the rest is off by what the coarser one's steps are."""
    family = sorted(f for f in FAMILIES if states_of(f) and "lion" not in f and "muon" not in f)
    name = family[(5 * one + other) % len(family)]
    bound = {4: 0.26, 8: 0.07, 16: 0.01, 32: 0.0}
    first, p = started(name, **WIDTHS[one])
    steps(first, p)
    second = build_optimizer(name, [p], **WIDTHS[other])
    second.load_state_dict(first.state_dict())
    back = build_optimizer(name, [p], **WIDTHS[one])
    back.load_state_dict(second.state_dict())
    decoded = []
    for optimizer in (first, back):
        wide = build_optimizer(name, [p], optim_bits=32)
        wide.load_state_dict(optimizer.state_dict())
        decoded.append(wide.state[p])
    allowed = bound[WIDTHS[one]["optim_bits"]] + bound[WIDTHS[other]["optim_bits"]]
    for state in states_of(first.config):
        before, after = (item[state.name] for item in decoded)
        blocks = before.abs().view(64, 2, 128).amax(dim=2, keepdim=True).expand(-1, -1, 128)
        assert ((after - before).abs() <= allowed * blocks.reshape(before.shape) + 1e-30).all()
        if WIDTHS[other]["optim_bits"] == 32 and WIDTHS[one]["optim_bits"] != 8:
            assert torch.equal(before, after)
    assert back.state[p]["step"] == 3


def test_the_same_widths_load_bit_for_bit() -> None:
    bits = {"exp_avg": 4, "exp_avg_sq": 8}
    first, p = started("adamw", state_bits=bits)
    steps(first, p)
    second = build_optimizer("adamw", [p], state_bits=bits)
    second.load_state_dict(first.state_dict())
    for key, value in first.state[p].items():
        assert torch.equal(value, second.state[p][key]), key
