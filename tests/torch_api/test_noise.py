"""The random bits of stochastic rounding: none twice, and the same ones after a resume."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from tests.torch_api.harness import bits, through_file

ROUNDED = {"param_rounding": "stochastic", "lr": 1e-4, "eps": 0.0, "betas": (0.0, 0.0)}


def half(value: float = 1.0) -> Tensor:
    return torch.full((64, 256), value, dtype=torch.bfloat16).requires_grad_()


def step(optimizer: Optimizer2State, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def test_optimizers_of_one_parameter_each_round_differently(backend: str) -> None:
    params = [half() for _ in range(3)]
    for p in params:
        step(build_optimizer("adam", [p], **ROUNDED))
    assert len({bits(p) for p in params}) == 3


def test_torchs_seed_and_the_config_s_seed_repeat_a_run(backend: str) -> None:
    def run(manual: int, **seed: int) -> bytes:
        torch.manual_seed(manual)
        p = half()
        step(build_optimizer("adam", [p], **ROUNDED, **seed), 3)
        return bits(p)

    assert run(1) == run(1) != run(2)
    assert run(1, seed=5) == run(2, seed=5) != run(1, seed=6)


def test_other_random_numbers_are_drawn_only_where_noise_is_needed(backend: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_optimizer("adam", [half()])
    build_optimizer("adam", [half()], **ROUNDED, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [{}, {"seed": 7}])
def test_a_state_that_is_emptied_each_round_gets_other_noise(
    seed: dict[str, int], backend: str
) -> None:
    p = half()
    optimizer = build_optimizer("adam", [p], **ROUNDED, **seed)
    rounds = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
        step(optimizer)
        rounds.append(bits(p))
        optimizer.state = defaultdict(dict)
    assert len(set(rounds)) == 3


@pytest.mark.parametrize("seed", [{}, {"seed": 7}])
def test_a_resumed_run_goes_on_with_the_same_bits(seed: dict[str, int], backend: str) -> None:
    p = half()
    optimizer = build_optimizer("adam8bit", [p], **ROUNDED, **seed)
    step(optimizer, 2)
    optimizer.state.clear()
    step(optimizer, 2)
    q, saved = copy.deepcopy(p), through_file(optimizer.state_dict())
    torch.manual_seed(99)
    resumed = build_optimizer("adam8bit", [q], **ROUNDED, **seed)
    resumed.load_state_dict(saved)
    step(optimizer, 2)
    step(resumed, 2)
    assert bits(p) == bits(q)


def test_a_run_that_states_another_seed_keeps_it(backend: str) -> None:
    optimizer = build_optimizer("adam", [half()], **ROUNDED, seed=1)
    step(optimizer)
    other = build_optimizer("adam", [half()], **ROUNDED, seed=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["noise"] == 2


def test_checkpoints_of_release_0_1_go_on_with_their_seed(backend: str) -> None:
    optimizer = build_optimizer("adam", [half()], **ROUNDED, seed=0)
    step(optimizer)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["noise"]
    other = build_optimizer("adam", [half()], **ROUNDED)
    other.load_state_dict(saved)
    assert other.param_groups[0]["noise"] == 0


@pytest.mark.parametrize("start", [2**24 - 1, 2**24, 2**24 + 1, 2**29])
@pytest.mark.parametrize("capturable", [False, True])
def test_steps_count_on_and_noise_changes_beyond_float32(
    start: int, capturable: bool, backend: str
) -> None:
    if capturable and backend not in ("emulated", "cuda"):
        pytest.skip("capturable is for CUDA kernels")
    p = half()
    optimizer = build_optimizer("adam", [p], **ROUNDED, seed=1, capturable=capturable)
    step(optimizer)
    optimizer.state[p]["step"].fill_(start)
    rounds = []
    for count in range(1, 5):
        with torch.no_grad():
            p.fill_(1.0)
        step(optimizer)
        assert optimizer.state[p]["step"] == start + count
        rounds.append(bits(p))
    assert len(set(rounds)) == 4
