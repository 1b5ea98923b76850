"""What `--model` may name, and how the command refuses what it may not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from optfactory.errors import ConfigError
from optfactory.planning.model import load_model
from tests.planning.conftest import Factory, Run

WORKING = {
    "function": "def make():\n    return nn.Linear(30, 40)",
    "class": "class make(nn.Linear):\n    def __init__(self):\n        super().__init__(30, 40)",
    "partial": "import functools\nmake = functools.partial(nn.Linear, 30, 40)",
    "lambda": "make = lambda: nn.Linear(30, 40)",
    "defaults": "def make(a=30, b=40, *rest, c=None):\n    return nn.Linear(a, b)",
    "callable": "class F:\n    def __call__(self):\n        return nn.Linear(30, 40)\nmake = F()",
    "module": "make = nn.Linear(30, 40)",
    "meta": "with torch.device('meta'):\n    make = nn.Linear(30, 40)",
}


@pytest.mark.parametrize("text", WORKING.values(), ids=WORKING)
def test_whatever_gives_a_module_is_a_factory(text: str, run: Run, factory: Factory) -> None:
    code, out, err = run("adam", "--model", factory(text), "--json")
    assert (code, err) == (0, "")
    (group,) = json.loads(out)["groups"]
    assert (group["parameters"], group["elements"]) == (["weight", "bias"], 1240)


def test_a_nested_attribute_and_a_module_in_a_package(
    run: Run, factory: Factory, tmp_path: Path
) -> None:
    text = "class A:\n    @staticmethod\n    def b():\n        return nn.Linear(30, 40)"
    assert run("adam", "--model", factory(text, "A.b"))[0] == 0
    package = factory().partition(":")[0] + "_package"
    (tmp_path / package).mkdir()
    (tmp_path / package / "inner.py").write_text("from torch import nn\nmake = nn.Linear(3, 4)\n")
    assert run("adam", "--model", f"{package}.inner:make")[0] == 0
    (tmp_path / package).rename(tmp_path / f"{package}_moved")
    del sys.modules[f"{package}.inner"], sys.modules[package]


# What the module holds, and what the message says beside the name that was given.
FAILING = {
    "nothing": ("", "has no attribute 'make'"),
    "number": ("make = 3", "is an int, not a function"),
    "none": ("make = None", "is a NoneType, not a function"),
    "arguments": ("def make(width): ...", "missing 1 required positional argument: 'width'"),
    "class": ("make = nn.Linear", "missing 2 required positional arguments"),
    "list": ("def make():\n    return [nn.Linear(3, 4)]", "returned a list, not a Module"),
    "returns_none": ("def make(): ...", "returned a NoneType, not a Module"),
    "returns_class": ("def make():\n    return nn.Linear", "returned a type, not a Module"),
    "raises": ("def make():\n    raise ValueError('no weights here')", "ValueError: no weights"),
    "asserts": ("def make():\n    assert False, 'no'", "AssertionError: no"),
    "data": ("def make():\n    torch.ones(3).sum().item()", "cannot be called on meta tensors"),
    "file": ("def make():\n    open('weights.pt')", "FileNotFoundError"),
    "import": ("import no_such_module", "No module named 'no_such_module'"),
    "import_name": ("from torch import no_such_name", "cannot import name 'no_such_name'"),
    "attribute": ("torch.no_such_name", "has no attribute 'no_such_name'"),
}


@pytest.mark.parametrize(("text", "message"), FAILING.values(), ids=FAILING)
def test_whatever_does_not_is_one_line(text: str, message: str, run: Run, factory: Factory) -> None:
    model = factory(text)
    code, out, err = run("adam", "--model", model)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: --model '{model}' ")
    assert message in err
    assert len(err.splitlines()) == 1
    with pytest.raises(ConfigError):
        load_model(model)


def test_what_fails_without_data_is_pointed_to_python(run: Run, factory: Factory) -> None:
    model = factory("def make():\n    return nn.Linear(int(torch.ones(3).sum()), 4)")
    err = run("adam", "--model", model)[2]
    assert "failed on the meta device, where tensors have no data: RuntimeError" in err
    assert "optfactory.plan(cfg, model) or optfactory.explain(cfg, model) from Python" in err


@pytest.mark.parametrize("text", ["torch.nn.ReLU", "torch.nn:", ":ReLU", "", ":", "make"])
def test_a_text_that_is_no_module_and_factory(text: str, run: Run) -> None:
    code, out, err = run("adam", f"--model={text}")
    assert (code, out) == (1, "")
    assert err == f"error: --model is package.module:factory, got {text!r}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_package.models:make", "No module named 'no_such_package'"),
        ("torch.no_such:make", "No module named 'torch.no_such'"),
        ("torch.nn:NoSuch", "has no attribute 'NoSuch'"),
        ("torch.nn:Linear.no_such", "has no attribute 'no_such'"),
        ("torch.nn:ReLU:x", "has no attribute 'ReLU:x'"),
        ("torch/nn:ReLU", "No module named 'torch/nn'"),
        ("torch.nn:ReLU()", "has no attribute"),
    ],
)
def test_a_module_or_attribute_that_does_not_exist(text: str, message: str, run: Run) -> None:
    code, out, err = run("adam", "--model", text)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: --model '{text}' cannot be loaded: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_without_parameters_has_nothing_to_optimize(run: Run) -> None:
    code, _, err = run("adam", "--model", "torch.nn:ReLU")
    assert (code, err.startswith("error: nothing to optimize")) == (1, True)


def test_the_factory_runs_on_the_meta_device_and_leaves_torch_as_it_was(factory: Factory) -> None:
    text = """
def make():
    model = nn.Linear(30, 40)
    nn.init.normal_(model.weight)
    nn.init.trunc_normal_(model.bias.unsqueeze(0))
    model.real = nn.Parameter(torch.zeros(3, device="cpu").normal_())
    return model
"""
    state = torch.get_rng_state()
    model = load_model(factory(text))
    devices = {name: p.device.type for name, p in model.named_parameters()}
    assert devices == {"weight": "meta", "bias": "meta", "real": "cpu"}
    assert model.real.any()  # what has data is filled
    assert torch.zeros(2).device.type == "cpu"
    assert not torch.equal(torch.zeros(9).normal_(), torch.zeros(9))
    assert not torch.equal(state, torch.get_rng_state())


def test_only_floating_point_tensors_change_their_dtype(factory: Factory) -> None:
    text = "def make():\n    model = nn.BatchNorm1d(8)\n    return model"
    model = load_model(factory(text), "bfloat16")
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds.pop("num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}
