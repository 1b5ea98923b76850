"""What happens around steps: scalers, bad gradients, copies, checkpoints, and sudden changes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.conftest import on_cpus
from tests.muon.harness import all_bits, built, give, matrices, named, train
from tests.param_groups.harness import Net, give_gradients

SHAPES = [(64, 96), (96, 64), (64, 96), (3, 40, 48)]
widths = pytest.mark.parametrize("name", ["muon", "muon8bit"])


# ---- steps that are skipped, and numbers that are not finite -----------------------------------


@on_cpus
@widths
def test_a_scaler_that_found_infinities_leaves_all_as_it_was(name: str, backend: str) -> None:
    params = matrices(SHAPES)
    optimizer = built(params, name, weight_decay=0.5, lr=0.1)
    train(optimizer, params, range(2))
    before = all_bits(optimizer)
    give(params, 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(64.0), torch.tensor(1.0)
    optimizer.step()
    assert all_bits(optimizer) == before
    optimizer.found_inf = torch.tensor(0.0)
    for p in params:
        assert p.grad is not None
        p.grad *= 64
    optimizer.step()
    other = matrices(SHAPES)
    plain = built(other, name, weight_decay=0.5, lr=0.1)
    train(plain, other, range(3))
    assert all_bits(optimizer) == all_bits(plain)


@on_cpus
@widths
def test_skip_step_skips_both_halves(name: str, backend: str) -> None:
    net = Net(width=16)
    optimizer = build_optimizer(name, net, nonfinite="skip_step", others={"lr": 0.1})
    give_gradients(net, 0)
    optimizer.step()
    before = all_bits(optimizer)
    for bad in (net.blocks[0].mix.weight, net.embed.weight):
        give_gradients(net, 1)
        bad.grad.view(-1)[3] = torch.inf  # type: ignore[union-attr]
        optimizer.step()
        assert all_bits(optimizer) == before


@on_cpus
@widths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_bad_element_stays_in_its_matrix(bad: float, name: str, backend: str) -> None:
    """Also in a stack: the others get the bits that they get without it."""
    one, other = matrices(SHAPES), matrices(SHAPES)
    optimizers = built(one, name, min_8bit_size=1), built(other, name, min_8bit_size=1)
    for step in range(3):
        give(one, step)
        give(other, step)
        if step == 1:
            one[0].grad[3, 4] = bad  # type: ignore[index]
            one[3].grad[1, 3, 4] = bad  # type: ignore[index]
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(one[n], other[n]) for n in (1, 2))
    assert torch.equal(one[3][[0, 2]], other[3][[0, 2]])
    assert torch.isnan(one[0]).all() == (bad != 3e38)
    assert one[3][1].isfinite().all() == (bad == 3e38)


@on_cpus
def test_zero_gradients_decay_and_nothing_else(backend: str) -> None:
    params = matrices(SHAPES)
    starts = [p.detach().clone() for p in params]
    optimizer = built(params, lr=0.5, weight_decay=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start in zip(params, starts, strict=True):
        assert torch.equal(p, start * 0.75)


# ---- memory of parameters, gradients and states ------------------------------------------------


@on_cpus
@widths
def test_strides_change_no_bit(name: str, backend: str) -> None:
    plain, strided = matrices(SHAPES), matrices(SHAPES)
    strided = [p.detach().mT.contiguous().mT.requires_grad_() for p in strided]
    optimizers = built(plain, name), built(strided, name)
    for step in range(3):
        give(plain, step)
        for p, q in zip(plain, strided, strict=True):
            assert p.grad is not None
            q.grad = p.grad.mT.contiguous().mT if step else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, strided, strict=True))


@on_cpus
@widths
def test_other_memory_under_the_same_parameters(name: str, backend: str) -> None:
    one, other = matrices(SHAPES), matrices(SHAPES)
    moved, plain = built(one, name, lr=0.1), built(other, name, lr=0.1)
    for step in range(4):
        train(moved, one, range(step, step + 1))
        train(plain, other, range(step, step + 1))
        for p in one:
            p.data = p.data.clone()
            entries = moved.state[p]
            moved.state[p] = {key: value.clone() for key, value in entries.items()}
    assert all_bits(moved) == all_bits(plain)


@on_cpus
def test_gradients_that_come_and_go(backend: str) -> None:
    params = matrices(SHAPES)
    optimizer = built(params, lr=0.1)
    for step in range(4):
        give(params, step)
        params[step].grad = None
        before = params[step].detach().clone()
        optimizer.step()
        assert torch.equal(params[step], before)
    counts = [float(optimizer.state[p]["step"]) for p in params]
    assert counts == [3.0] * 4


def test_shared_memory_is_stepped_in_turns() -> None:
    whole = torch.zeros(64, 64)
    params = [whole.view(64, 64).requires_grad_(), whole.detach().view(32, 128).requires_grad_()]
    optimizer = built(params, lr=1.0, weight_decay=0.0)
    give(params, 0)
    optimizer.step()
    alone = [torch.zeros(64, 64).requires_grad_(), torch.zeros(32, 128).requires_grad_()]
    other = built(alone, lr=1.0, weight_decay=0.0)
    give(alone, 0)
    other.step()
    both = alone[0].detach() + alone[1].detach().view(64, 64)
    torch.testing.assert_close(whole.detach(), both, rtol=0, atol=1e-6)


# ---- copies and checkpoints --------------------------------------------------------------------


@widths
def test_copies_and_pickles_go_on(name: str) -> None:
    params = matrices(SHAPES)
    optimizer = built(params, name, lr=0.1)
    train(optimizer, params, range(2))
    pairs = [pickle.loads(pickle.dumps((params, optimizer))), copy.deepcopy((params, optimizer))]
    train(optimizer, params, range(2, 4))
    for copied, its in pairs:
        train(its, copied, range(2, 4))
        assert all_bits(its) == all_bits(optimizer)


@on_cpus
@widths
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"master_weights": "split"},
        {"param_rounding": "kahan"},
        {"param_rounding": "stochastic", "seed": 1},
        {"split": 2},
    ],
    ids=str,
)
def test_going_on_is_bit_identical(asked: dict[str, Any], name: str, backend: str) -> None:
    asked = {"lr": 0.1, "percentile_clipping": 50, **asked}
    params = matrices(SHAPES, torch.bfloat16)
    optimizer = built(params, name, **asked)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    other = built(resumed, name, **asked)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, range(3, 5))
    train(other, resumed, range(3, 5))
    assert all_bits(other) == all_bits(optimizer)


def test_a_checkpoint_says_nothing_of_memory_and_shapes() -> None:
    """What products are computed in, and which matrices there are, is this run's."""
    saved = built(matrices(SHAPES), ns_memory=5, ns_dtype="bfloat16", split=2).state_dict()
    other = built(matrices(SHAPES), momentum=0.5)
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert (group["ns_memory"], group["ns_dtype"], group["split"]) == (None, "auto", 1)
    assert group["momentum"] == 0.95


# ---- groups ------------------------------------------------------------------------------------


@on_cpus
def test_groups_have_iterations_of_their_own(backend: str) -> None:
    own: list[dict[str, Any]] = [
        {"ns_steps": 3},
        {"ns_coefficients": "polar_express", "adjust_lr": "original"},
        {"eps": 1e3, "momentum": 0.5},
        {},
    ]
    shapes = [(64, 96)] * 4
    params, alone = matrices(shapes), matrices(shapes)
    pairs = zip(named(params), own, strict=True)
    optimizer = build_optimizer("muon", [{"params": [pair], **asked} for pair, asked in pairs])
    train(optimizer, params, range(2))
    for number, asked in enumerate(own):
        single = build_optimizer("muon", named(alone)[number : number + 1], **asked)
        for step in range(2):
            give(alone, step)
            single.step()
        assert torch.equal(params[number], alone[number])


def test_a_schedule_scales_both_halves() -> None:
    net = Net(width=8)
    optimizer = build_optimizer("muon", net, lr=0.5, others={"lr": 0.125})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    give_gradients(net, 0)
    optimizer.step()
    schedule.step()
    rates = {group["optimizer"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"muon": 0.25, "adamw": 0.0625}


def test_groups_that_are_added_and_edited_are_checked() -> None:
    optimizer = built(matrices([(64, 96)]))
    (late,) = matrices([(96, 64)])
    optimizer.add_param_group({"params": [("late", late)], "adjust_lr": "original"})
    vector = torch.zeros(5, requires_grad=True)
    with pytest.raises(ConfigError, match=r"params: 'muon' trains matrices.*bias \(5,\)"):
        optimizer.add_param_group({"params": [("bias", vector)]})
    optimizer.add_param_group({"params": [("bias", vector)], "optimizer": "adamw"})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    train(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    for key, value in (("adjust_lr", "orignal"), ("split", 5), ("ns_coefficients", "moun")):
        was = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        give(params, 2)
        with pytest.raises(ConfigError, match=key):
            optimizer.step()
        optimizer.param_groups[0][key] = was
    optimizer.param_groups[0]["params"].append(torch.zeros(7, requires_grad=True))
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(7)
    with pytest.raises(ConfigError, match="trains matrices"):
        optimizer.step()
    del optimizer.param_groups[0]["params"][-1]
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["ns_steps"] = 3
    optimizer.step()


def test_states_are_there_before_the_first_step_and_not_of_captured_graphs() -> None:
    params = matrices(SHAPES)
    optimizer = built(params)
    optimizer.init_states()
    assert {frozenset(optimizer.state[p]) for p in params} == {
        frozenset({"step", "momentum_buffer"})
    }
    with pytest.raises(ConfigError, match="capturable: needs parameters on a CUDA device"):
        built(params, capturable=True)
