"""NumPy's and other libraries' numbers and texts become plain Python in groups and checkpoints."""

from __future__ import annotations

import enum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer
from optfactory.optimizers.adam import AdamConfig
from tests.torch_api.harness import through_file, weight


class Text(str):
    """As a configuration library may have it."""


class Real(float):
    """As a units library may have it."""


class Rounding(str, enum.Enum):
    KAHAN = "kahan"


class Width(enum.IntEnum):
    EIGHT = 8


VALUES: list[dict[str, Any]] = [
    {"lr": np.float64(0.1)},
    {"lr": np.float32(0.1)},
    {"lr": np.array(0.1)},
    {"lr": Real(0.1)},
    {"lr": Fraction(1, 10)},
    {"betas": (np.float64(0.9), np.float16(0.9))},
    {"betas": np.array([0.9, 0.99])},
    {"eps": np.longdouble(1e-8)},
    {"maximize": np.bool_(True)},
    {"optim_bits": np.int64(8), "block_size": np.int32(64)},
    {"optim_bits": Width.EIGHT},
    {"param_rounding": Rounding.KAHAN},
    {"param_rounding": np.str_("stochastic"), "seed": np.uint8(3)},
    {"compat": Text("none"), "percentile_clipping": np.int64(5)},
    {"is_paged": True, "page_dir": Text("/tmp")},
]
LABELS: dict[str, Any] = {
    "name": np.str_("group"),
    "initial_lr": np.float64(0.5),
    "param_names": [np.str_("w")],
}


def bf16() -> Tensor:
    return torch.ones(300, dtype=torch.bfloat16).requires_grad_()


def assert_plain(value: Any, place: str = "") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) is str, place
            assert_plain(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        assert type(value) in (list, tuple), place
        for item in value:
            assert_plain(item, place)
    elif not isinstance(value, Tensor):
        assert type(value) in (int, float, str, bool, type(None)), (place, type(value))


def assert_all_plain(optimizer: Optimizer2State) -> None:
    for group in optimizer.param_groups:
        assert_plain({key: value for key, value in group.items() if key != "params"})
    through_file(optimizer.state_dict())


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_what_reaches_the_groups_is_plain_python(values: dict[str, Any]) -> None:
    assert_all_plain(build_optimizer("adam", [bf16()], **values))
    optimizer = build_optimizer("adam", [{"params": [bf16()], **LABELS, **values}])
    optimizer.add_param_group({"params": [bf16()], **LABELS, **values})
    assert_all_plain(optimizer)
    assert_all_plain(Optimizer2State([bf16()], AdamConfig(name=Text("adam"), **values)))


def test_rules_make_plain_groups() -> None:
    rules: Any = {Text("head"): {"ndim": np.int64(1), "lr_scale": np.float64(0.5)}}
    rules["rest"] = {"match": [np.str_("*")], "weight_decay": np.float32(0.5)}
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer("adamw", model, lr=np.float64(0.1), param_groups=rules)
    assert [group["name"] for group in optimizer.param_groups] == ["rest", "head+rest"]
    assert_all_plain(optimizer)


def test_what_a_schedule_puts_into_a_group_is_plain_in_the_checkpoint() -> None:
    optimizer = build_optimizer("adam", [weight()])
    schedule = np.linspace(0.1, 0.2, 3)
    optimizer.param_groups[0].update(lr=schedule[1], betas=schedule[:2], note=[Text("a"), {1: 2}])
    saved = optimizer.state_dict()["param_groups"][0]
    assert through_file(saved) == saved
    assert type(saved["lr"]) is float
    assert saved["lr"] == schedule[1]
    assert saved["betas"] == (0.1, schedule[1])
    assert saved["note"] == ["a", {1: 2}]


def test_a_checkpoint_with_numpys_numbers_loads_as_plain_python() -> None:
    optimizer = build_optimizer("adam", [weight()])
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(lr=np.float64(0.25), initial_lr=np.float32(0.5), note=Text("a"))
    optimizer.load_state_dict(saved)
    assert_all_plain(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25
