"""Groups and states that other tools and users edit in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.torch_api.harness import bits, held, train, trained, weight


def named(**tensors: Tensor) -> list[tuple[str, Tensor]]:
    return list(tensors.items())


def test_keys_of_other_tools_in_the_state_are_left_alone(backend: str) -> None:
    optimizer, expected = trained("adam8bit"), trained("adam8bit")
    for p in held(optimizer):
        optimizer.state[p]["lookahead_slow_buff"] = p.detach().clone()
        optimizer.state[p]["note"] = "kept"
    train(optimizer, range(3, 5))
    train(expected, range(3, 5))
    for p, q in zip(held(optimizer), held(expected), strict=True):
        assert bits(p) == bits(q)
        assert optimizer.state[p]["note"] == "kept"
        assert optimizer.state[p]["lookahead_slow_buff"].dtype == p.dtype


def test_keys_that_are_there_before_the_first_step_do_not_stand_for_state(backend: str) -> None:
    p = weight()
    optimizer = build_optimizer("adam", [p])
    optimizer.state[p]["ema"] = p.detach().clone()
    train(optimizer, range(1))
    assert {"ema", "step", "exp_avg", "exp_avg_sq"} == optimizer.state[p].keys()


def test_an_empty_entry_of_a_frozen_parameter_is_no_state(backend: str) -> None:
    p, frozen = weight(), weight().requires_grad_(False)
    optimizer = build_optimizer("adam", [p, frozen])
    assert optimizer.state[frozen] == {}  # a defaultdict makes one
    train(optimizer, range(1))
    optimizer.state[frozen].clear()
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_parameter_appended_to_a_named_group_is_trained(backend: str) -> None:
    p, q = weight(), weight()
    optimizer = build_optimizer("adam", named(p=p))
    train(optimizer, range(1))
    optimizer.param_groups[0]["params"].append(q)
    train(optimizer, range(1, 2))
    assert optimizer.state[q]["step"] == 1
    assert [row.name for row in optimizer.memory_report().rows] == [
        "p",
        "param_groups[0].params[1]",
    ]
    names = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert names == ["p", "param_groups[0].params[1]"]


def test_names_follow_their_tensors_when_one_is_removed(backend: str) -> None:
    tensors = {name: weight() for name in ("a", "b", "c")}
    optimizer = build_optimizer("adam", named(**tensors))
    train(optimizer, range(1))
    del optimizer.param_groups[0]["params"][1]
    train(optimizer, range(1, 2))
    assert [row.name for row in optimizer.memory_report().rows] == ["a", "c"]
    assert optimizer.state[tensors["b"]]["step"] == 1
    with pytest.raises(StateError, match=r"in no param group.*delete optimizer\.state"):
        optimizer.state_dict()
    del optimizer.state[tensors["b"]]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["a", "c"]


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (lambda p: p, "is listed twice"),
        (lambda p: torch.zeros(3, dtype=torch.float64).requires_grad_(), "float64"),
        (lambda p: "text", "must be a tensor"),
    ],
    ids=["twice", "dtype", "text"],
)
def test_what_is_appended_and_cannot_be_trained_is_named(
    made: Any, problem: str, backend: str
) -> None:
    p = weight()
    optimizer = build_optimizer("adam", named(p=p))
    train(optimizer, range(1))
    params = optimizer.param_groups[0]["params"]
    params.append(made(p))
    with pytest.raises(ConfigError, match=rf"param_groups\[0\]\.params\[1\]: .*{problem}"):
        optimizer.step()
    params.pop()
    train(optimizer, range(1, 2))
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.int64])
def test_frozen_parameters_may_be_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    frozen = nn.Parameter(torch.zeros(64, 64, dtype=dtype), requires_grad=False)
    p = weight()
    for params in ([frozen, p], [{"params": [frozen, p], "lr": 0.1}], named(f=frozen, p=p)):
        optimizer = build_optimizer("adam8bit", params)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert frozen not in optimizer.state
        assert len(optimizer.memory_report().rows) == 1
    optimizer.add_param_group({"params": [nn.Parameter(frozen.clone(), requires_grad=False)]})


def test_a_frozen_parameter_of_another_dtype_is_refused_once_it_is_trained(backend: str) -> None:
    p = nn.Parameter(torch.zeros(64, dtype=torch.float64), requires_grad=False)
    optimizer = build_optimizer("adam", named(p=p, q=weight()))
    p.requires_grad_()
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match=r"\bp\b.*float64"):
        optimizer.step()
    assert not optimizer.state.get(p)


# ---- parameters with other rows ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "adam8bit", "lamb8bit", "adamw"])
@pytest.mark.parametrize("rows", [90, 60, 80])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_resized_parameter_takes_its_state_along(
    name: str, rows: int, in_place: bool, backend: str
) -> None:
    p, q = weight(80, 300), weight()
    optimizer = build_optimizer(name, named(table=p, q=q), percentile_clipping=50)
    train(optimizer, range(2))
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    grown = torch.ones(rows, 300)
    grown[: min(rows, 80)] = p.detach()[: min(rows, 80)]
    new = p if in_place else nn.Parameter(grown)
    if in_place:
        p.grad = None
        p.data = grown
    optimizer.replace_parameter(p, new)
    kept = min(rows, 80)
    for key, value in optimizer.state[new].items():
        if before[key].ndim == 2:
            assert torch.equal(value[:kept], before[key][:kept]), key
            rest = value[kept:]
            assert rest.unique().numel() <= 1, key  # as fresh state
        else:
            assert torch.equal(value, before[key]), key
    train(optimizer, range(2, 4))
    assert optimizer.state[new]["step"] == 4
    assert optimizer.param_groups[0]["param_names"] == ["table", "q"]


def test_rows_that_cross_the_limit_of_8_bits_are_converted(backend: str) -> None:
    p = weight(40, 80)
    optimizer = build_optimizer("adam8bit", [p])
    train(optimizer, range(2))
    assert "exp_avg" in optimizer.state[p]
    small = optimizer.state[p]["exp_avg"].clone()
    new = nn.Parameter(torch.cat([p.detach(), torch.zeros(40, 80)]))
    optimizer.replace_parameter(p, new)
    assert "exp_avg_q8" in optimizer.state[new]
    new_again = nn.Parameter(new.detach()[:40].clone())
    optimizer.replace_parameter(new, new_again)
    assert torch.allclose(optimizer.state[new_again]["exp_avg"], small, atol=0.02)


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        (torch.ones(80, 80), "first dimension only"),
        (torch.ones(5600), "first dimension only"),
        (torch.ones(80, 70, dtype=torch.float64), "float64"),
    ],
    ids=["columns", "flat", "dtype"],
)
def test_a_replacement_that_does_not_fit_changes_nothing(
    new: Tensor, problem: str, backend: str
) -> None:
    p = weight(80, 70)
    optimizer = build_optimizer("adam", named(p=p))
    train(optimizer, range(1))
    with pytest.raises(ConfigError, match=problem):
        optimizer.replace_parameter(p, new.requires_grad_())
    with pytest.raises(ConfigError, match="is no parameter of this optimizer"):
        optimizer.replace_parameter(weight(), weight())
    train(optimizer, range(1, 2))
    assert optimizer.state[p]["step"] == 2


def test_a_model_whose_parameter_was_replaced_is_told_at_the_first_step(backend: str) -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    optimizer = build_optimizer("adam", model)
    model[0] = nn.Embedding(120, 8)
    with pytest.warns(UserWarning, match=r"parameters 0\.weight were replaced"):
        optimizer.step()
    optimizer.step()


def test_a_model_that_is_gone_or_as_it_was_is_not_told(backend: str) -> None:
    model = nn.Linear(8, 8)
    optimizer = build_optimizer("adam", model)
    parameters = list(model.parameters())
    train(optimizer, range(1))
    optimizer = build_optimizer("adam", model)
    del model
    train(optimizer, range(1))
    assert held(optimizer)[0] is parameters[0]
