"""Other parameters have gradients at every step, as with mixtures of experts or tasks in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from optfactory.optimizer import Optimizer2State
from optfactory.state.layout import StateLayout

SHAPES = [(7,), (64, 64), (33,), (16, 300), (1,), (4096,)]
CONFIG = {"min_8bit_size": 4096, "lr": 0.01, "weight_decay": 0.1}


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in SHAPES]


def sets(steps: int) -> Iterator[list[int]]:
    """Which parameters have gradients, step by step."""
    choose = random.Random(1)
    for _ in range(steps):
        yield [n for n in range(len(SHAPES)) if choose.random() < 0.5]


def step(optimizers: list[Optimizer2State], params: list[Tensor], members: list[int]) -> None:
    for number, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        p.grad = gradient if number in members else None
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit", "adam"])
def test_sets_do_not_matter_to_a_parameter(name: str, backend: str) -> None:
    """Each parameter becomes what an optimizer of its own makes of it."""
    together, alone = parameters(), parameters()
    one = build_optimizer(name, together, **CONFIG)
    many = [build_optimizer(name, [p], **CONFIG) for p in alone]
    for members in sets(20):
        step([one], together, members)
        step(many, alone, members)
    for p, own, optimizer in zip(together, alone, many, strict=True):
        assert torch.equal(p, own)
        for key, value in optimizer.state[own].items():
            assert torch.equal(one.state[p][key], value), key


def test_state_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a parameter stays known while others come and go."""
    looks: list[str] = []
    check = StateLayout.check

    def counted(self: StateLayout, name: str, *rest: object) -> None:
        looks.append(name)
        check(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StateLayout, "check", counted)
    params = parameters()
    optimizer = build_optimizer("adamw8bit", params, **CONFIG)
    for members in sets(20):
        step([optimizer], params, members)
    assert sorted(looks) == sorted(set(looks))


CHANGES: dict[str, Callable[[Optimizer2State, Tensor], object]] = {
    "its state is replaced": lambda o, p: o.state[p].update(
        {key: value.clone() for key, value in o.state[p].items()}
    ),
    "its state's memory is replaced": lambda o, p: [
        value.set_(value.clone()) for value in o.state[p].values()
    ],
    "it moves": lambda o, p: setattr(p, "data", p.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_parameter_that_has_no_gradient_are_noticed(change: str) -> None:
    """It is updated where it is when it comes back; nothing is written to where it was."""
    params, undisturbed = parameters(), parameters()
    optimizers = [build_optimizer("adamw8bit", p, **CONFIG) for p in (params, undisturbed)]
    for members in ([0, 1, 2], [0, 3, 4], [1, 2, 5]):
        step(optimizers[:1], params, members)
        step(optimizers[1:], undisturbed, members)
        for p in params:
            if p in optimizers[0].state:
                CHANGES[change](optimizers[0], p)
    for p, other in zip(params, undisturbed, strict=True):
        assert torch.equal(p, other)


def test_a_gradient_that_cannot_be_used_is_noticed_when_it_comes() -> None:
    params = parameters()
    optimizer = build_optimizer("adamw8bit", params, **CONFIG)
    for members in ([0, 1], [2, 3], [0, 1]):
        step([optimizer], params, members)
    params[2].grad = torch.randn(SHAPES[2]).to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    params[2].grad = torch.randn(SHAPES[2])
    optimizer.step()
    assert not torch.equal(params[2], before[2])
