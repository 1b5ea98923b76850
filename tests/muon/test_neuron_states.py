"""The state of NorMuon: skipped steps, copies, checkpoints, groups."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, resolve
from optfactory.errors import ConfigError, StateError
from tests.conftest import on_cpus
from tests.muon.harness import all_bits, built, give, give_graded, matrices, moments, named, train
from tests.numerics.harness import bits

KEY = "neuron_second_moment"
ON: dict[str, Any] = {"neuron_norm": True, "lr": 0.1}
SHAPES = [(48, 80), (96, 64), (64, 64), (48, 80), (3, 24, 80)]
widths = pytest.mark.parametrize("name", ["muon", "muon8bit"])


# ---- steps that are skipped, copies --------------------------------------------------------------


@on_cpus
@widths
def test_a_skipped_step_leaves_every_bit(name: str, backend: str) -> None:
    params = matrices(SHAPES)
    optimizer = built(params, name, nonfinite="skip_step", **ON)
    train(optimizer, params, range(2))
    before = all_bits(optimizer)
    give(params, 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(1.0)
    optimizer.step()
    assert all_bits(optimizer) == before
    optimizer.grad_scale = optimizer.found_inf = None
    give(params, 2)
    params[1].grad[0, 0] = torch.inf  # type: ignore[index]
    optimizer.step()
    assert all_bits(optimizer) == before
    train(optimizer, params, range(2, 3))
    other = matrices(SHAPES)
    plain = built(other, name, **ON)
    train(plain, other, range(3))
    assert all_bits(optimizer) == all_bits(plain)


@widths
def test_copies_and_checkpoints_go_on_bit_by_bit(name: str) -> None:
    params = matrices(SHAPES, torch.bfloat16)
    optimizer = built(params, name, **ON)
    train(optimizer, params, range(2))
    pairs = [pickle.loads(pickle.dumps((params, optimizer))), copy.deepcopy((params, optimizer))]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    other = built(resumed, name, **ON)
    other.load_state_dict(torch.load(file, weights_only=True))
    pairs.append((resumed, other))
    train(optimizer, params, range(2, 4))
    for copied, its in pairs:
        train(its, copied, range(2, 4))
        assert all_bits(its) == all_bits(optimizer)


# ---- checkpoints of other settings ---------------------------------------------------------------


def saved(**asked: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """A state dict after two steps, and its moments."""
    params = matrices(SHAPES)
    optimizer = built(params, **{**ON, **asked})
    train(optimizer, params, range(2))
    return optimizer.state_dict(), moments(optimizer) if optimizer.param_groups[0][
        "neuron_norm"
    ] else []


def test_a_config_turns_it_on_and_off() -> None:
    """As percentile clipping: moments start from zero, or are left out."""
    without, _ = saved(neuron_norm=False)
    turned_on = built(matrices(SHAPES), **ON, neuron_beta=0.5)
    turned_on.load_state_dict(without)
    assert turned_on.param_groups[0]["neuron_norm"]
    assert turned_on.param_groups[0]["neuron_beta"] == 0.5
    assert not any(v.any() for v in moments(turned_on))
    there, wanted = saved(neuron_beta=0.8)
    params = matrices(SHAPES)
    turned_off = built(params)
    turned_off.load_state_dict(there)
    assert turned_off.param_groups[0]["neuron_beta"] == 0.95
    assert all(turned_off.state[p].keys() == {"step", "momentum_buffer"} for p in params)
    kept = built(matrices(SHAPES), "muon8bit", neuron_norm=True, neuron_beta=0.8, split=2)
    kept.load_state_dict(there)
    for v, other in zip(moments(kept), wanted, strict=True):
        assert torch.equal(v, other)


def test_checkpoints_of_torch_start_without_moments() -> None:
    params = matrices(SHAPES[:4])
    theirs = torch.optim.Muon(params, lr=0.02)
    train(theirs, params, range(2))
    ours = built([p.detach().clone().requires_grad_() for p in params], neuron_norm=True)
    ours.load_state_dict(theirs.state_dict())
    assert not any(v.any() for v in moments(ours))
    with pytest.raises(ConfigError, match="neuron_norm: True has no counterpart there"):
        ours.export_state_dict("torch")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(47), r"expected shape \(48,\)"),
        (-torch.ones(48), "has negative elements"),
        (torch.zeros(48).double(), "expected torch.float32"),
    ],
    ids=["shape", "sign", "dtype"],
)
def test_moments_that_cannot_be_are_refused(value: Tensor, problem: str) -> None:
    state, _ = saved()
    state["state"][0] = {**state["state"][0], KEY: value}
    ours = built(matrices(SHAPES), **ON)
    with pytest.raises(StateError, match=rf"layers\.0\.weight\.{KEY}: {problem}"):
        ours.load_state_dict(state)
    assert not ours.state


# ---- groups --------------------------------------------------------------------------------------


@on_cpus
def test_groups_have_settings_of_their_own(backend: str) -> None:
    """Parameters of one shape, dtype and rule."""
    own: list[dict[str, Any]] = [
        {},
        {"neuron_norm": True},
        {"neuron_norm": True, "neuron_beta": 0.5},
        {},
    ]
    params, alone = matrices([(48, 80)] * 4), matrices([(48, 80)] * 4)
    pairs = zip(named(params), own, strict=True)
    optimizer = build_optimizer("muon", [{"params": [pair], **asked} for pair, asked in pairs])
    train(optimizer, params, range(3))
    for number, asked in enumerate(own):
        single = build_optimizer("muon", named(alone)[number : number + 1], **asked)
        train(single, alone, range(3))
        assert torch.equal(params[number], alone[number])
        assert (KEY in optimizer.state[params[number]]) == bool(asked)


def test_it_is_switched_in_a_live_group() -> None:
    params = matrices([(48, 80), (6, 24, 80)])
    optimizer = built(params, lr=0.1)
    group = optimizer.param_groups[0]
    train(optimizer, params, range(1))
    group["neuron_norm"] = True
    give_graded(params, 1)
    optimizer.step()
    first = moments(optimizer)
    group["neuron_beta"] = 0.0
    optimizer.step()
    second = moments(optimizer)
    # All of a step's squares behind a 20th of those of much the same momentum.
    for v, after in zip(first, second, strict=True):
        assert float((after / v).median()) == pytest.approx(20, rel=0.2)
    group["flatten"] = True
    give(params, 3)
    with pytest.raises(ConfigError, match="flatten: was False when the state was made"):
        optimizer.step()
    group["flatten"] = False
    group["neuron_norm"] = False
    with pytest.raises(ConfigError, match="neuron_beta needs neuron_norm: true"):
        optimizer.step()
    group["neuron_beta"] = 0.95
    optimizer.step()
    assert all(KEY not in optimizer.state[p] for p in params)


def test_moments_that_were_replaced_are_looked_at_before_anything_is_written() -> None:
    params = matrices([(48, 80), (48, 80)])
    optimizer = built(params, **ON)
    train(optimizer, params, range(2))
    entries = optimizer.state[params[1]]
    good = entries[KEY]
    for bad in (torch.zeros(47), good.double(), torch.zeros(96)[::2], None):
        entries[KEY] = bad
        before = [bits(p).tobytes() for p in params]
        give(params, 2)
        with pytest.raises(StateError, match=KEY):
            optimizer.step()
        assert [bits(p).tobytes() for p in params] == before
    entries[KEY] = good.clone()
    train(optimizer, params, range(2, 3))
    other = matrices([(48, 80), (48, 80)])
    plain = built(other, **ON)
    train(plain, other, range(3))
    assert all_bits(optimizer) == all_bits(plain)


@widths
@pytest.mark.parametrize("rows", [130, 40, 3])
def test_moments_follow_a_change_of_rows(rows: int, name: str) -> None:
    """Also where fewer rows have no 8-bit state any more."""
    params = matrices([(96, 64)])
    optimizer = built(params, name, **ON)
    train(optimizer, params, range(2))
    (before,) = moments(optimizer)
    (new,) = matrices([(rows, 64)])
    optimizer.replace_parameter(params[0], new)
    after = optimizer.state[new][KEY]
    common = min(rows, 96)
    assert after.shape == (rows,)
    assert torch.equal(after[:common], before[:common])
    assert not after[common:].any()
    train(optimizer, [new], range(2, 3))


def test_a_beta_without_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.neuron_beta: .*needs neuron_norm: true"):
        resolve("muon", neuron_beta=0.9)
    with pytest.raises(ConfigError, match=r"param_groups\.all\.neuron_beta"):
        resolve("muon", param_groups={"all": {"match": "*", "neuron_beta": 0.9}})
    for beta in (1.0, -0.1):
        with pytest.raises(ConfigError, match="neuron_beta"):
            resolve("muon", neuron_norm=True, neuron_beta=beta)
    resolve("muon", neuron_norm=False, neuron_beta=0.95)  # as full configs say it
