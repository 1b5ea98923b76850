"""Any rules on any model: each parameter has what a brute-force reading of the rules says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import nn

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.param_groups.oracle import BASE, Unclear, expected, lists_around, places
from tests.robustness.harness import examples

KEYS = ("embed", "body", "layers", "blocks", "norm", "head", "fc1", "emb2")


class Gains(nn.Module):
    """Parameters of its own, of every number of dimensions, some in a list."""

    def __init__(self, ndim: int, count: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((1, 2, 3)[:ndim]))
        self.more = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])


class ListingGains(Gains):
    def no_decay(self) -> set[str]:
        return {"gain", "more.0"}


class WideLinear(nn.Linear):
    pass


LEAVES: dict[str, Any] = {
    "linear": lambda: nn.Linear(2, 2),
    "wide": lambda: WideLinear(2, 2, bias=False),
    "embedding": lambda: nn.Embedding(3, 2),
    "norm": lambda: nn.LayerNorm(2),
    "nothing": nn.ReLU,
    "gains": lambda: Gains(3, 1),
    "listing": lambda: ListingGains(2, 2),
    "scalar": lambda: Gains(0, 0),
}


@st.composite
def modules(draw: st.DrawFn, depth: int, made: list[nn.Module]) -> nn.Module:
    kinds = ["leaf", "leaf"] + (["dict", "dict", "dict"] if depth else [])
    kinds += ["list", "list", "sequential"] if depth else []
    kinds += ["shared"] if made else []
    kind = draw(st.sampled_from(kinds))
    module: nn.Module
    if kind == "shared":
        return draw(st.sampled_from(made))
    if kind == "leaf":
        module = LEAVES[draw(st.sampled_from(sorted(LEAVES)))]()
    elif kind == "dict":
        keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
        module = nn.ModuleDict({key: draw(modules(depth - 1, made)) for key in keys})
    else:
        count = draw(st.integers(1, 3))
        children = [draw(modules(depth - 1, made)) for _ in range(count)]
        module = nn.ModuleList(children) if kind == "list" else nn.Sequential(*children)
    made.append(module)
    return module


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=2, max_size=5, unique=True))
    made: list[nn.Module] = []
    root: nn.Module = nn.ModuleDict({key: draw(modules(3, made)) for key in keys})
    if draw(st.integers(0, 4)) == 4:
        root = nn.Sequential(*(draw(modules(2, made)) for _ in keys))
    tables = [m for m in root.modules() if isinstance(m, nn.Embedding | nn.Linear)]
    if len(tables) > 1 and draw(st.booleans()):
        one, other = draw(st.tuples(st.sampled_from(tables), st.sampled_from(tables)))
        one.weight = other.weight
    for p in root.parameters():
        p.requires_grad_(draw(st.integers(0, 5)) > 0)
    return root


@st.composite
def globs(draw: st.DrawFn, names: list[str]) -> str:
    parts = draw(st.sampled_from(names)).split(".")
    way = draw(st.integers(0, 4))
    if way == 0:
        return "*." + parts[-1]
    if way == 1:
        return ".".join(parts[: draw(st.integers(1, len(parts)))]) + "*"
    if way == 2:
        parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(["*", "?", "[ehb]*"]))
    return ".".join(parts) if way < 4 else draw(st.sampled_from(["*", "*e*", "nowhere.*"]))


EXPRESSIONS = st.sampled_from(
    [r"bias$", r"^(head|embed)", r"\.0\.", r"\d", "gain|norm", r"^\d\.", r"(.)\1", "x^", "weight"]
)
CLASSES = st.sampled_from(
    ["Linear", "*Linear", "Embedding", "*Norm", "Module", "Gains", "ParameterList", "Conv*", "Re*"]
)
DIMENSIONS = st.sampled_from([0, 1, 2, "<=1", ">=2", "< 1", ">1", "==3", "<=7"])


def one_or_more(values: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return values | st.lists(values, min_size=1, max_size=3)


@st.composite
def rule_of(draw: st.DrawFn, names: list[str], layered: bool) -> dict[str, Any]:
    matchers = {
        "match": one_or_more(globs(names)),
        "regex": one_or_more(EXPRESSIONS),
        "modules": one_or_more(CLASSES),
        "ndim": DIMENSIONS,
        "listed_by": st.just("no_decay"),
    }
    keys = draw(st.lists(st.sampled_from(sorted(matchers)), max_size=2, unique=True))
    rule = {key: draw(matchers[key]) for key in keys or ([] if layered else ["match"])}
    overrides = {
        "weight_decay": st.sampled_from([0.0, 0.5]),
        "eps": st.sampled_from([1e-3, 1e-4]),
        "optim_bits": st.sampled_from([8, 32]),
        "lr": st.sampled_from([0.5, 0.125]),
        "lr_scale": st.sampled_from([0.5, 3.0]),
    }
    stated = draw(st.lists(st.sampled_from(sorted(overrides)), min_size=1, max_size=3, unique=True))
    if {"lr", "lr_scale"} <= set(stated):
        stated.remove("lr")
    rule |= {key: draw(overrides[key]) for key in stated}
    if layered:
        rule["layer_decay"] = draw(st.sampled_from([0.5, 0.75, 1.0]))
        lists = sorted({one for name in names for one, _ in lists_around(name)})
        choices = [None, *lists, *(f"*{one.rpartition('.')[2]}" for one in lists), "none"]
        blocks = draw(st.sampled_from(choices))
        rule |= {} if blocks is None else {"blocks": blocks}
    if draw(st.integers(0, 2)):
        rule["optional"] = True
    return rule


@given(st.data())
@examples(100)
def test_every_parameter_has_what_a_brute_force_reading_says(data: st.DataObject) -> None:
    model = data.draw(models())
    assume(any(p.requires_grad for p in model.parameters()))
    names = [name for place in places(model) for name, _ in place.found]
    count = data.draw(st.integers(1, 4))
    layered = data.draw(st.integers(0, 2 * count))
    rules = {f"r{i}": data.draw(rule_of(names, layered == i)) for i in range(count)}
    try:
        refused, wanted = expected(model, rules)
    except Unclear:
        assume(False)
    event("refused" if refused else f"{len({str(v) for v in wanted.values()})} groups")
    if refused:
        with pytest.raises(ConfigError) as caught:
            build_optimizer("adamw", model, lr=BASE["lr"], param_groups=rules)
        found = {problem.split(".")[1].split(":")[0] for problem in caught.value.problems}
        assert found
        assert found <= refused
        return
    optimizer = build_optimizer("adamw", model, lr=BASE["lr"], param_groups=rules)
    got: dict[str, dict[str, Any]] = {}
    by_id = {id(place.tensor): place.first_name for place in places(model)}
    for group in optimizer.param_groups:
        assert group["params"]
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert name == by_id[id(p)]
            assert name not in got
            got[name] = {key: group[key] for key in BASE}
    assert set(got) == set(wanted)
    for name, values in wanted.items():
        assert got[name].pop("lr") == pytest.approx(values.pop("lr"), rel=1e-12), name
        assert got[name] == values, name
