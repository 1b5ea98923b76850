"""What param groups may state, groups added later, and gradients that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import build_optimizer, get_optimizer_info
from optfactory.errors import ConfigError
from tests.unit.harness import give_gradients, refused, trainable, trained

# ---- hyperparameters of groups --------------------------------------------------------------

HYPERPARAMETERS = [
    ("adam", {"lr": 0.05}),
    ("adam", {"lr": "5e-2"}),
    ("adam", {"betas": (0.5, 0.6)}),
    ("adam", {"betas": [0.5, "0.6"]}),
    ("adam", {"eps": 0.1}),
    ("adamw", {"weight_decay": 0.9}),
    ("adam", {"weight_decay": 0.9}),
    ("adam", {"amsgrad": True}),
    ("adam", {"bias_correction": False}),
    ("adam", {"adam_w_mode": True, "weight_decay": 0.5}),
    ("adam", {"optim_bits": 8}),
    ("adamw8bit", {"optim_bits": 32}),
    ("adam8bit", {"optim_bits": 32, "amsgrad": True}),
    ("adam8bit", {"min_8bit_size": 1_000_000}),
    ("adam8bit", {"block_size": 64}),
    ("lamb", {"trust_ratio": "clip"}),
    ("lamb", {"trust_ratio": "clip", "max_unorm": 0.01}),
    ("lamb8bit", {"weight_decay": 0.5}),
]


@pytest.mark.parametrize(("name", "stated"), HYPERPARAMETERS)
def test_what_a_group_states_acts_on_that_group_alone(
    name: str, stated: dict[str, Any], backend: str
) -> None:
    def pair() -> tuple[Tensor, Tensor]:
        return trainable(32, 160), trainable(32, 160, seed=1)

    p, q = pair()
    options = {"lr": 0.01}
    got = trained(build_optimizer(name, [{"params": [p]}, {"params": [q], **stated}], **options))
    plain = trained(build_optimizer(name, list(pair()), **options))
    # A group may state what the name locks; the family's own name takes any of it.
    info = get_optimizer_info(name)
    whole = {"optim_bits": info.optim_bits or 32, **options, **stated}
    changed = trained(build_optimizer(info.family, list(pair()), **whole))
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], changed[1])
    assert not torch.equal(plain[1], changed[1])


def test_a_group_may_be_paged_or_not(tmp_path: Path) -> None:
    p, q = trainable(400, 300), trainable(400, 300)
    groups = [{"params": [p]}, {"params": [q], "is_paged": True, "page_dir": str(tmp_path)}]
    rows = build_optimizer("adam8bit", groups).memory_report().rows
    assert [row.where for row in rows] == ["resident", "file-mapped"]
    groups = [{"params": [p]}, {"params": [q], "is_paged": False}]
    rows = build_optimizer("paged_adam8bit", groups).memory_report().rows
    assert [row.where for row in rows] == ["file-mapped", "resident"]


def test_a_group_may_opt_out_of_paging_though_the_optimizer_names_a_folder(tmp_path: Path) -> None:
    p, q = trainable(400, 300), trainable(400, 300)
    groups = [{"params": [p]}, {"params": [q], "is_paged": False}]
    rows = build_optimizer("paged_adam", groups, page_dir=str(tmp_path)).memory_report().rows
    assert [row.where for row in rows] == ["file-mapped", "resident"]


def test_groups_hold_plain_values_of_every_hyperparameter() -> None:
    optimizer = build_optimizer("paged_lamb8bit", [{"params": [trainable(3)], "lr": "1e-2"}])
    group = optimizer.param_groups[0]
    for key, value in get_optimizer_info("paged_lamb8bit").defaults.items():
        assert type(group[key]) in (bool, int, float, str, tuple, type(None)), key
        assert group[key] == (0.01 if key == "lr" else value)
    assert group["optimizer"] == "paged_lamb8bit"
    assert group["format_version"] == 1
    assert "name" not in group


def test_labels_of_groups_are_free() -> None:
    groups = [{"params": [trainable(3)], "name": "decay", "initial_lr": 0.5}]
    group = build_optimizer("adam", groups).param_groups[0]
    assert group["name"] == "decay"
    assert group["initial_lr"] == 0.5


@pytest.mark.parametrize(
    ("stated", "where"),
    [
        ({"lr": -1}, "lr"),
        ({"lr": True}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas.1"),
        ({"betas": (0.9,)}, "betas"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"optim_bits": 12}, "optim_bits"),
        ({"amsgrad": True, "optim_bits": 8}, "amsgrad"),
        ({"momentum": 0.9}, "momentum"),
        ({"wieght_decay": 0.1}, "wieght_decay"),
        ({"max_unorm": 1.0}, "max_unorm"),
    ],
)
def test_a_groups_bad_hyperparameters_are_refused_by_place(
    stated: dict[str, Any], where: str
) -> None:
    p, q = trainable(3), trainable(4)
    assert f"param_groups[1].{where}: " in refused([{"params": [p]}, {"params": [q], **stated}])
    optimizer = build_optimizer("adam", [p])
    with pytest.raises(ConfigError, match=rf"param_groups\[1\]\.{where}: "):
        optimizer.add_param_group({"params": [q], **stated})
    assert len(optimizer.param_groups) == 1
    assert len(trained(optimizer)) == 1


def test_problems_of_all_groups_are_reported_at_once() -> None:
    groups = [
        {"params": [trainable(3)], "lr": -1, "wd": 3},
        {"params": [trainable(3)]},
        {"params": [trainable(3)], "eps": -1},
    ]
    message = refused(groups)
    for place in ("param_groups[0].lr: ", "param_groups[0].wd: ", "param_groups[2].eps: "):
        assert place in message
    assert "did you mean" not in message or "'betas'" not in message


# ---- add_param_group ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lamb8bit"])
def test_an_added_group_trains_as_if_it_had_been_there(name: str, backend: str) -> None:
    p, q = trainable(32, 160), trainable(32, 160, seed=1)
    optimizer = build_optimizer(name, [p])
    optimizer.add_param_group({"params": [q], "lr": 0.1})
    got = trained(optimizer)
    groups = [
        {"params": [trainable(32, 160)]},
        {"params": [trainable(32, 160, seed=1)], "lr": 0.1},
    ]
    for one, other in zip(got, trained(build_optimizer(name, groups)), strict=True):
        assert torch.equal(one, other)


def test_a_group_added_in_the_middle_starts_at_its_own_step_one(backend: str) -> None:
    p, q = trainable(300), trainable(300, seed=1)
    optimizer = build_optimizer("adam", [p])
    trained(optimizer, steps=2)
    optimizer.add_param_group({"params": q})
    trained(optimizer, steps=1)
    assert optimizer.state[p]["step"] == 3
    assert optimizer.state[q]["step"] == 1
    assert len(optimizer.memory_report().rows) == 2


@pytest.mark.parametrize(
    "group",
    [
        lambda p: {"params": [p]},
        lambda p: {"params": [trainable(3), p]},
        lambda p: {"params": {trainable(3)}},
        lambda p: {"parameters": [trainable(3)]},
        lambda p: [trainable(3)],
        lambda p: {"params": [("named", trainable(3)), trainable(4)]},
        lambda p: {"params": [trainable(3)], "page_dir": 3},
    ],
)
def test_a_bad_added_group_changes_nothing(group: Callable[[Tensor], Any]) -> None:
    p = trainable(300)
    optimizer = build_optimizer("adam", [p])
    trained(optimizer, steps=1)
    before = (p.detach().clone(), dict(optimizer.param_groups[0]))
    with pytest.raises(ConfigError):
        optimizer.add_param_group(group(p))
    assert len(optimizer.param_groups) == 1
    assert dict(optimizer.param_groups[0]) == before[1]
    assert torch.equal(p, before[0])
    assert set(optimizer.state) == {p}
    trained(optimizer, steps=1)
    assert optimizer.state[p]["step"] == 2


def test_an_added_group_may_not_share_a_tensor_with_itself() -> None:
    optimizer = build_optimizer("adam", [trainable(3)])
    q = trainable(4)
    with pytest.raises(ConfigError, match="same tensor"):
        optimizer.add_param_group({"params": [q, q]})


# ---- gradients that cannot be used ----------------------------------------------------------


@pytest.mark.parametrize("first_step", [True, False])
def test_a_step_with_a_bad_gradient_changes_nothing(first_step: bool, backend: str) -> None:
    names = [f"layer{i}" for i in range(3)]
    params = [trainable(70, 80, seed=i) for i in range(3)]
    optimizer = build_optimizer("adam8bit", zip(names, params, strict=True))
    if not first_step:
        trained(optimizer, steps=1)
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    give_gradients(params, seed=7)
    params[1].grad = None
    params[1].grad = torch.eye(70, 80).to_sparse()
    with pytest.raises(ConfigError, match=r"layer1.*sparse"):
        optimizer.step()
    for p, old, state in zip(params, before, states, strict=True):
        assert torch.equal(p, old)
        for key, value in state.items():
            assert torch.equal(optimizer.state[p][key], value), key
        assert optimizer.state[p].get("step", 0) == (0 if first_step else 1)
    give_gradients(params, seed=7)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == (1 if first_step else 2) for p in params)


def test_an_embedding_with_sparse_gradients_is_told_what_to_do() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = build_optimizer("adam", embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"weight.*sparse=False"):
        optimizer.step()
