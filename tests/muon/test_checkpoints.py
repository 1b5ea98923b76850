"""Checkpoints of torch.optim.Muon: read, gone on from, and written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.muon.harness import MUON, built, give, matrices, named, train
from tests.numerics.harness import bits
from tests.param_groups.harness import Net, give_gradients

SHAPES = [(64, 96), (96, 64), (20, 300)]
CASES: list[dict[str, Any]] = [
    {},
    {"adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.8},
    {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 3, "eps": 1e-5, "weight_decay": 0.0},
]


def torchs(steps: int = 3, dtype: torch.dtype = torch.float32, **asked: Any) -> Any:
    params = matrices(SHAPES, dtype)
    optimizer = torch.optim.Muon(params, **{"lr": 0.02, **asked})
    train(optimizer, params, range(steps))
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def clones(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params_of(optimizer)]


def loaded(theirs: Any, name: str = "muon", **asked: Any) -> Optimizer2State:
    ours = build_optimizer(name, named(clones(theirs)), **asked)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return ours


@pytest.mark.parametrize("asked", CASES, ids=str)
def test_a_state_of_torch_is_gone_on_with(asked: dict[str, Any]) -> None:
    theirs = torchs(**asked)
    starts = [p.detach().clone() for p in params_of(theirs)]
    ours = loaded(theirs, momentum=0.5, lr=9.0)
    (group,), (their_group,) = ours.param_groups, theirs.param_groups
    for key in ("lr", "momentum", "nesterov", "eps", "ns_steps", "weight_decay"):
        assert group[key] == their_group[key]
    assert group["adjust_lr"] == (asked.get("adjust_lr_fn") or "original")
    assert group["ns_coefficients"] == (asked.get("ns_coefficients", MUON),)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        buffers = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
        assert torch.equal(*buffers)
    train(ours, params_of(ours), range(3, 6))
    train(theirs, params_of(theirs), range(3, 6))
    for p, q, start in zip(params_of(ours), params_of(theirs), starts, strict=True):
        assert float((p - q).detach().norm() / (q - start).detach().norm()) < 0.06


@pytest.mark.parametrize("asked", CASES, ids=str)
@pytest.mark.parametrize("name", ["muon", "paged_muon32bit"])
def test_an_export_is_what_torch_had_written(name: str, asked: dict[str, Any]) -> None:
    theirs = torchs(**asked)
    exported = loaded(theirs, name).export_state_dict("torch")
    wanted = theirs.state_dict()
    for one, other in zip(exported["param_groups"], wanted["param_groups"], strict=True):
        names = [f"layers.{n}.weight" for n in range(3)]
        assert one == {**other, "param_names": names, "name": "default"}  # labels stay
    assert exported["state"].keys() == wanted["state"].keys()
    for key, entries in wanted["state"].items():
        assert exported["state"][key].keys() == entries.keys()
        assert torch.equal(exported["state"][key]["momentum_buffer"], entries["momentum_buffer"])
    back = torch.optim.Muon(clones(theirs))
    back.load_state_dict(exported)
    train(back, params_of(back), range(3, 5))
    train(theirs, params_of(theirs), range(3, 5))
    for p, q in zip(params_of(back), params_of(theirs), strict=True):
        assert (bits(p) == bits(q)).all()


def test_buffers_of_16_bits_are_read() -> None:
    """torch keeps them in the gradient's dtype; ours are float32 or codes."""
    theirs = torchs(dtype=torch.bfloat16)
    ours, codes = loaded(theirs), loaded(theirs, "muon8bit")
    for p, c, q in zip(params_of(ours), params_of(codes), params_of(theirs), strict=True):
        wanted = theirs.state[q]["momentum_buffer"]
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(ours.state[p]["momentum_buffer"], wanted.float())
        assert "momentum_buffer_q8" in codes.state[c]


def test_momentum_of_8_bits_is_exported_decoded() -> None:
    params = matrices(SHAPES)
    ours = built(params, "muon8bit", adjust_lr="original")
    train(ours, params, range(2))
    theirs = torch.optim.Muon(clones(ours))
    theirs.load_state_dict(ours.export_state_dict("torch"))
    exact = matrices(SHAPES)
    other = built(exact, adjust_lr="original")
    train(other, exact, range(2))
    for p, q in zip(params_of(theirs), exact, strict=True):
        mine, wanted = theirs.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert float((mine - wanted).norm() / wanted.norm()) < 0.05


def test_an_export_before_the_first_step_begins_with_zeros() -> None:
    """torch.optim.Muon takes a buffer that is None for one."""
    ours = built(matrices(SHAPES))
    ours.init_states()
    theirs = torch.optim.Muon(clones(ours))
    theirs.load_state_dict(ours.export_state_dict("torch"))
    train(theirs, params_of(theirs), range(1))
    assert theirs.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    assert theirs.param_groups[0]["ns_coefficients"] == MUON


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"split": 2}, "split: 2 has no counterpart there"),
        ({"maximize": True}, "maximize: True has no counterpart there"),
        ({"ns_coefficients": "polar_express"}, "ns_coefficients: 'polar_express' has a polynomial"),
        ({"percentile_clipping": 5}, "percentile_clipping: 5 has no counterpart"),
    ],
    ids=str,
)
def test_what_torch_would_do_otherwise_is_not_exported(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        built(matrices(SHAPES), **asked).export_state_dict("torch")


def test_stacks_and_kernels_are_not_exported() -> None:
    stack = built(matrices([(64, 96), (3, 40, 48)]))
    with pytest.raises(ConfigError, match=r"params: torch\.optim\.Muon takes .* 2 dimensions.* 3"):
        stack.export_state_dict("torch")
    kernels = built(matrices([(16, 8, 3, 3)]), flatten=True)
    with pytest.raises(ConfigError, match="flatten: True has no counterpart") as caught:
        kernels.export_state_dict("torch")
    assert any("some here have 4" in problem for problem in caught.value.problems)


def test_memory_and_products_are_no_reason_not_to() -> None:
    built(matrices(SHAPES), ns_memory=5, ns_dtype="float32").export_state_dict("torch")


def test_the_hybrid_has_no_counterpart() -> None:
    net = Net(width=16)
    optimizer = build_optimizer("muon", net)
    give_gradients(net, 0)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"optimizer: torch\.optim\.Muon has no adamw"):
        optimizer.export_state_dict("torch")
    with pytest.raises(ConfigError, match=r"has no muon"):
        optimizer.export_state_dict("bitsandbytes")


def test_other_algorithms_and_bad_settings_are_refused() -> None:
    theirs = torchs()
    saved = theirs.state_dict()
    for name in ("sgd", "adamw"):
        with pytest.raises(StateError, match="optimizer: the checkpoint is of family 'muon'"):
            build_optimizer(name, clones(theirs)).load_state_dict(saved)
    sgd = torch.optim.SGD(clones(theirs), lr=0.1, momentum=0.9)
    give(params_of(sgd), 0)
    sgd.step()
    with pytest.raises(StateError, match="optimizer: the checkpoint is of family 'sgd'"):
        built(clones(theirs)).load_state_dict(sgd.state_dict())
    saved["param_groups"][0]["adjust_lr_fn"] = "orignal"  # which torch takes for a factor of 1
    ours = built(clones(theirs))
    with pytest.raises(StateError, match=r"adjust_lr: .*'orignal'"):
        ours.load_state_dict(saved)
    assert not ours.state
