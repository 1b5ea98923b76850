"""Names are those of the plain model, whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.param_groups.harness import (
    Net,
    Rules,
    built,
    copy_of,
    give_gradients,
    got,
    labels,
    marked,
    names_of,
)


class DistributedDataParallel(nn.Module):
    """Holds a model as torch's class of this name does, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)


def compiled(model: nn.Module) -> nn.Module:
    # Only wrapped: the default backend would be imported, for a second, and used by nothing.
    return torch.compile(model, backend="eager")


def checkpointed(model: nn.Module) -> nn.Module:
    model.blocks = nn.ModuleList([checkpoint_wrapper(block) for block in model.blocks])
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    model.blocks[1] = compiled(model.blocks[1])
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "checkpointed": checkpointed,
    "wrapped root": checkpoint_wrapper,
    "compiled checkpointed": lambda model: compiled(checkpointed(model)),
    "parallel compiled": lambda model: DistributedDataParallel(compiled(model)),
    "parallel checkpointed": lambda model: nn.DataParallel(checkpointed(model)),
}
RULES: Rules = {
    "head": {"match": "head.*", "lr_scale": 10.0},
    "norms": {"modules": "LayerNorm", "weight_decay": 0.0},
    "last": {"regex": r"^blocks\.1\.", "eps": 1e-3},
    "layers": {"layer_decay": 0.5, "blocks": "blocks"},
}


class Listing(Net):
    """Lists some of its parameters, and so do its blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.no_weight_decay = lambda: ["norm.weight"]

    def no_weight_decay(self) -> set[str]:
        return {"embed.weight"}


wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@wrappers
def test_rules_and_groups_see_plain_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = built(Net(), RULES), built(wrap(Net()), RULES)
    for key in ("lr", "weight_decay", "eps", "name"):
        assert got(wrapped, key) == got(plain, key)
    assert sorted(got(wrapped, "lr")) == sorted(names_of(Net()))


@wrappers
def test_without_rules_too(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert built(wrap(Net()), {}).param_groups[0]["param_names"] == names_of(Net())


@wrappers
def test_lists_of_the_model_are_matched_in_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    listed = {"embed.weight", "blocks.0.norm.weight", "blocks.1.norm.weight"}
    assert marked(wrap(Listing()), {"listed_by": "no_weight_decay"}) == listed


@pytest.mark.parametrize("rules", [{}, RULES], ids=["no rules", "rules"])
def test_a_checkpoint_of_a_wrapped_model_loads_in_the_plain_one(rules: Rules) -> None:
    model = Net()
    other = copy_of(model)
    optimizer = built(compiled(model), rules)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    saved = optimizer.state_dict()
    plain = built(other, rules)
    plain.load_state_dict(saved)
    other.load_state_dict(model.state_dict())
    assert labels(plain) == labels(optimizer) if rules else True
    for one, opt in ((model, optimizer), (other, plain)):
        give_gradients(one, 7)
        opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_parameter_of_the_users_own_may_be_called_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "rest": nn.Linear(2, 2)})
    names = got(built(model, {"all": {"match": "module.*", "lr": 0.5}}), "lr")
    assert {name for name, lr in names.items() if lr == 0.5} == {"module.weight", "module.bias"}
    wrapped = got(built(nn.DataParallel(model), {"a": {"match": "module.*", "lr": 0.5}}), "lr")
    assert wrapped == names
