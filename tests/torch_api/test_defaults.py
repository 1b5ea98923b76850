"""A default dtype or device for tensors that name none: programs set one while models are built."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import optfactory
from optfactory import Optimizer2State, build_optimizer
from tests.defaults import DEFAULTS, default
from tests.torch_api.harness import assert_same_training, bits, held, parameters, through_file

pytestmark = pytest.mark.usefixtures("small_tensors")

OPTIONS = [
    ("adam", {}),
    ("adam8bit", {"capturable": True}),
    ("paged_lamb8bit", {}),
    ("adam8bit", {"block_wise": False}),
    ("lamb", {"percentile_clipping": 5}),
    ("adamw8bit", {"param_rounding": "stochastic", "seed": 0}),
]


def grads_of(optimizer: Optimizer2State) -> list[torch.Tensor]:
    """Gradients that are not contiguous where they can be, so that kernels read strides too."""
    torch.manual_seed(0)
    flipped = [torch.randn(p.shape[::-1]).to(p.dtype) for p in held(optimizer)]
    return [grad.permute(tuple(range(grad.ndim))[::-1]) for grad in flipped]


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_the_default_changes_nothing(name: str, options: dict, chosen: str, backend: str) -> None:
    if options.get("capturable") and backend not in ("emulated", "cuda"):
        pytest.skip("capturable is for CUDA kernels")

    def run(chosen: str) -> Optimizer2State:
        optimizer = build_optimizer(name, parameters(), **options)
        grads = grads_of(optimizer)
        with default(chosen):
            for _ in range(2):
                for p, grad in zip(held(optimizer), grads, strict=True):
                    p.grad = grad
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        return optimizer

    assert_same_training(run(chosen), run("float32"))


@pytest.mark.parametrize("chosen", DEFAULTS)
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("lamb", {}, 300),
        ("adam8bit", {"block_wise": False}, 10),
        ("adam", {"percentile_clipping": 5}, 10),
    ],
    ids=str,
)
def test_tables_of_many_tensors_hold_what_kernels_write(
    name: str, options: dict, count: int, chosen: str, backend: str
) -> None:
    results = []
    for current in ("float32", chosen):
        params = [torch.full((64, 70), 1.0 + i).requires_grad_() for i in range(count)]
        optimizer = build_optimizer(name, params, **options)
        for p in params:
            p.grad = p.detach().clone()
        with default(current):
            optimizer.step()
        results.append(b"".join(map(bits, params)))
    assert results[0] == results[1]


@pytest.mark.parametrize("chosen", DEFAULTS)
def test_a_checkpoint_converts_to_the_same_bits(chosen: str, backend: str) -> None:
    wide = build_optimizer("adam", parameters(), lr=0.1)
    for p, grad in zip(held(wide), grads_of(wide), strict=True):
        p.grad = grad
    wide.step()
    saved = through_file(wide.state_dict())
    narrow, expected = (build_optimizer("adam8bit", parameters(), lr=0.1) for _ in range(2))
    expected.load_state_dict(saved)
    exported = expected.export_state_dict("bitsandbytes")
    with default(chosen):
        narrow.load_state_dict(saved)
        again = narrow.export_state_dict("bitsandbytes")
    assert_same_training(narrow, expected)
    for index, entries in exported["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert bits(again["state"][index][key]) == bits(value), (index, key)


# What makes a tensor from numbers or of no other tensor's kind.
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "from_file", "full", "linspace", "new_empty"),
    *("new_full", "new_ones", "new_tensor", "new_zeros", "ones", "rand", "randint", "randn"),
    *("scalar_tensor", "tensor", "zeros"),
}
PACKAGE = Path(optfactory.__file__).parent


def test_every_tensor_that_the_package_makes_states_its_dtype_and_device() -> None:
    silent = [
        f"{path.relative_to(PACKAGE)}:{line}: {call}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, call in silent_factories(path)
    ]
    assert not silent


def silent_factories(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
        if name in FACTORIES and (of_torch or name.startswith("new_")):
            stated = {keyword.arg for keyword in node.keywords}
            wanted = {"dtype"} if name.startswith(("new_", "as_", "from_")) else {"dtype", "device"}
            # A name of None stands for **keywords, which state both.
            if None not in stated and not wanted <= stated:
                yield node.lineno, name
