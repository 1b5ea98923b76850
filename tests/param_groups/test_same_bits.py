"""Rules only sort: training is what torch's own param groups would give, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from optfactory import Optimizer2State, build_optimizer, get_optimizer_info
from tests.param_groups.harness import Net, Rules, built, give_gradients, labels

WIDTH = 64  # rows and tensors of this size have 8-bit state
LR = 0.0078125
NAMES = ["adamw", "adamw8bit", "lamb8bit"]
RULES: Rules = {
    "no_decay": {"ndim": "<=1", "weight_decay": 0.0},
    "embeddings": {"modules": "Embedding", "optim_bits": 32, "betas": [0.8, 0.9]},
    "inner": {"regex": r"blocks\.1\.mix", "lr_scale": 4.0, "eps": "1e-4"},
    "layers": {"match": ["blocks.*", "embed.*"], "layer_decay": 0.5},
}


def model() -> Net:
    torch.manual_seed(3)
    return Net(width=WIDTH)


def by_hand(net: Net) -> list[dict[str, Any]]:
    """The param groups that someone would write who means what the rules say."""
    one, two = net.blocks
    thin, eps = {"weight_decay": 0.0}, {"eps": 1e-4}
    return [
        {"params": [net.embed.weight], "optim_bits": 32, "betas": (0.8, 0.9), "lr": LR / 8},
        {"params": [one.norm.weight, one.norm.bias, one.mix.bias], **thin, "lr": LR / 4},
        {"params": [one.mix.weight], "lr": LR / 4},
        {"params": [two.norm.weight, two.norm.bias], **thin, "lr": LR / 2},
        {"params": [two.mix.weight], **eps, "lr": LR * 2},
        {"params": [two.mix.bias], **eps, **thin, "lr": LR * 2},
        {"params": [net.norm.weight, net.norm.bias, net.head.bias], **thin},
        {"params": [net.head.weight]},
    ]


def train(net: nn.Module, optimizer: Optimizer2State, start: int, steps: int) -> None:
    for step in range(start, start + steps):
        give_gradients(net, step)
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", NAMES)
def test_rules_train_as_groups_written_by_hand(name: str) -> None:
    net, other = model(), model()
    optimizer = built(net, RULES, name, lr=LR)
    hand = build_optimizer(name, by_hand(other), lr=LR)
    assert len(optimizer.param_groups) == len(hand.param_groups)
    train(net, optimizer, 0, 4)
    train(other, hand, 0, 4)
    assert_same(net, other)
    plain = model()
    train(plain, build_optimizer(name, plain, lr=LR), 0, 4)
    moved = [
        not torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True)
    ]
    assert sum(moved) == 12  # all but the head's weight, of which no rule speaks
    bits = {row.name: row.bits for row in optimizer.memory_report().rows}
    assert bits["embed.weight"] == 32
    assert bits["blocks.0.mix.weight"] == (get_optimizer_info(name).optim_bits or 32)


def test_rules_train_as_torchs_own_optimizer() -> None:
    net, other = model(), model()
    rules: Rules = {key: {**rule} for key, rule in RULES.items()}
    del rules["embeddings"]["optim_bits"]
    optimizer = built(net, rules, lr=LR)
    groups = [{k: v for k, v in g.items() if k != "optim_bits"} for g in by_hand(other)]
    peer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.01)
    for step in range(3):
        give_gradients(net, step)
        give_gradients(other, step)
        optimizer.step()
        peer.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["state dict", "file", "copy", "pickle"])
def test_resuming_is_going_on(name: str, way: str) -> None:
    net, other = model(), model()
    optimizer = built(net, RULES, name, lr=LR)
    train(net, optimizer, 0, 2)
    resumed: Any
    if way in ("state dict", "file"):
        saved = copy.deepcopy({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved["model"])
        resumed = built(other, RULES, name, lr=LR)
        resumed.load_state_dict(saved["optimizer"])
    elif way == "copy":
        other, resumed = copy.deepcopy((net, optimizer))
    else:
        other, resumed = pickle.loads(pickle.dumps((net, optimizer)))
    assert labels(resumed) == labels(optimizer)
    train(net, optimizer, 2, 2)
    train(other, resumed, 2, 2)
    assert_same(net, other)
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_a_checkpoint_of_groups_by_hand_loads_into_rules() -> None:
    net, other = model(), model()
    hand = build_optimizer("adamw8bit", by_hand(net), lr=LR)
    train(net, hand, 0, 2)
    other.load_state_dict(net.state_dict())
    optimizer = built(other, RULES, "adamw8bit", lr=LR)
    expected = labels(optimizer)
    optimizer.load_state_dict(hand.state_dict())
    assert labels(optimizer) == expected
    train(net, hand, 2, 2)
    train(other, optimizer, 2, 2)
    assert_same(net, other)


def test_labels_and_names_are_in_the_state_dict() -> None:
    optimizer = built(model(), RULES, lr=LR)
    groups = optimizer.state_dict()["param_groups"]
    assert [group["name"] for group in groups] == [
        *("embeddings+layers[0]", "no_decay+layers[1]", "layers[1]", "no_decay+layers[2]"),
        *("inner+layers[2]", "no_decay+inner+layers[2]", "no_decay", "default"),
    ]
    assert groups[-1]["param_names"] == ["head.weight"]
    assert groups[4]["lr"] == LR * 2
    for group in groups:
        assert not {"match", "modules", "lr_scale", "layer_decay", "param_groups"} & set(group)


def test_a_step_reads_what_groups_say_now() -> None:
    net, other = model(), model()
    optimizer, twin = built(net, RULES, lr=LR), built(other, RULES, lr=LR * 2)
    for group in optimizer.param_groups:
        group["lr"] *= 2
    train(net, optimizer, 0, 2)
    train(other, twin, 0, 2)
    assert_same(net, other)
