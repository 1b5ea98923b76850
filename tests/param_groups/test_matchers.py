"""Which parameters a rule means: globs, expressions, classes, dimensions, the model's own lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.param_groups.harness import Net, built, got, labels, marked, names_of

WEIGHTS = {name for name in names_of(Net()) if name.endswith("weight")}
BIASES = set(names_of(Net())) - WEIGHTS
NORMS = {name for name in names_of(Net()) if "norm" in name}
BLOCK_0 = {name for name in names_of(Net()) if name.startswith("blocks.0.")}


@pytest.mark.parametrize(
    ("matchers", "expected"),
    [
        ({"match": "head.*"}, {"head.weight", "head.bias"}),
        ({"match": "*.bias"}, BIASES),
        ({"match": "embed.weight"}, {"embed.weight"}),
        ({"match": ["head.*", "embed.*"]}, {"head.weight", "head.bias", "embed.weight"}),
        ({"match": "blocks.0.*"}, BLOCK_0),
        ({"match": "blocks.[!1].*"}, BLOCK_0),
        ({"match": "*"}, set(names_of(Net()))),
        ({"match": "????.bias"}, {"head.bias", "norm.bias"}),
        ({"regex": "norm"}, NORMS),
        ({"regex": r"^norm"}, {"norm.weight", "norm.bias"}),
        ({"regex": r"blocks\.0\."}, BLOCK_0),
        ({"regex": [r"^head", r"bias$"]}, BIASES | {"head.weight"}),
        ({"regex": r"^(head|embed)\.weight$"}, {"head.weight", "embed.weight"}),
        # Each expression stands alone: its flags, groups and references are its own.
        ({"regex": ["(?i)^HEAD", r"^norm\.b"]}, {"head.weight", "head.bias", "norm.bias"}),
        (
            {"regex": ["(?P<x>^head)", "(?P<x>^embed)"]},
            {n for n in WEIGHTS | BIASES if n[0] in "he"},
        ),
        (
            {"regex": [r"(z)\1", r"(.)i\1s|(b).*\.m.*\2i"]},
            {"blocks.0.mix.bias", "blocks.1.mix.bias"},
        ),
        ({"modules": "LayerNorm"}, NORMS),
        ({"modules": "*Norm"}, NORMS),
        ({"modules": ["Embedding", "LayerNorm"]}, NORMS | {"embed.weight"}),
        ({"modules": "Module"}, set(names_of(Net()))),
        ({"ndim": "<=1"}, NORMS | BIASES),
        ({"ndim": "< 2"}, NORMS | BIASES),
        ({"ndim": 1}, NORMS | BIASES),
        ({"ndim": "1"}, NORMS | BIASES),
        ({"ndim": "==1"}, NORMS | BIASES),
        ({"ndim": ">=2"}, WEIGHTS - NORMS),
        ({"ndim": ">1"}, WEIGHTS - NORMS),
        ({"ndim": 2}, WEIGHTS - NORMS),
        ({"match": "blocks.*", "modules": "LayerNorm"}, {n for n in NORMS if "blocks" in n}),
        ({"match": "*.weight", "ndim": 1}, NORMS & WEIGHTS),
        ({"regex": "weight", "match": ["head*", "norm*"]}, {"head.weight", "norm.weight"}),
        ({"match": "*.bias", "regex": "head", "modules": "Linear", "ndim": 1}, {"head.bias"}),
    ],
)
def test_what_matchers_match(matchers: dict[str, Any], expected: set[str]) -> None:
    assert marked(Net(), matchers) == expected


def test_globs_mean_the_whole_name_and_expressions_any_part() -> None:
    rules = {"glob": {"match": "norm", "lr": 0.5, "optional": True}}
    assert set(got(built(Net(), rules), "lr").values()) == {0.001}
    assert marked(Net(), {"regex": "norm"}) == NORMS


def test_names_are_matched_in_their_case() -> None:
    model = nn.ModuleDict({"Head": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert marked(model, {"match": "head.*"}) == {"head.weight", "head.bias"}
    assert marked(model, {"regex": "Head"}) == {"Head.weight", "Head.bias"}


def test_a_class_is_matched_by_the_names_of_its_bases() -> None:
    class Mine(nn.Linear):
        pass

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.inner = Mine(3, 3)

    model = nn.ModuleDict({"a": Scaled(), "b": nn.Linear(3, 3, bias=False)})
    assert marked(model, {"modules": "Mine"}) == {"a.inner.weight", "a.inner.bias"}
    linear = {"a.inner.weight", "a.inner.bias", "b.weight"}
    assert marked(model, {"modules": "Linear"}) == linear
    # The owner is the module that holds the parameter itself, not one around it.
    assert marked(model, {"modules": "Scaled"}) == {"a.gain"}


def test_attention_is_matched_by_its_own_class_and_by_that_of_its_projection() -> None:
    model = nn.MultiheadAttention(4, 2)
    own = {"in_proj_weight", "in_proj_bias"}
    assert marked(model, {"modules": "MultiheadAttention"}) == own
    assert marked(model, {"modules": "Linear"}) == {"out_proj.weight", "out_proj.bias"}


def test_scalars_have_no_dimension() -> None:
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(1.0)), "w": torch.ones(3)})
    assert marked(model, {"ndim": 0}) == {"scale"}
    assert marked(model, {"ndim": "<1"}) == {"scale"}
    assert marked(model, {"ndim": "<=1"}) == {"scale", "w"}


class Listing(nn.Module):
    """Lists parameters of its own, as timm's models do."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.ModuleList([ListingBlock() for _ in range(depth)])
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "head.bias", "not_there"}


class ListingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 2))
        self.mix = nn.Linear(4, 4)

    def no_weight_decay(self) -> list[str]:
        return ["table"]


def test_the_model_and_modules_inside_it_list_parameters() -> None:
    listed = {"cls_token", "head.bias", "blocks.0.table", "blocks.1.table"}
    assert marked(Listing(), {"listed_by": "no_weight_decay"}) == listed
    assert marked(Listing(), {"listed_by": "no_weight_decay", "ndim": "<=2"}) == listed - {
        "cls_token"
    }


def test_a_list_counts_where_its_module_is_inside_another() -> None:
    model = nn.ModuleDict({"encoder": Listing(1), "head": nn.Linear(4, 4)})
    listed = {"encoder.cls_token", "encoder.head.bias", "encoder.blocks.0.table"}
    assert marked(model, {"listed_by": "no_weight_decay"}) == listed


def test_an_optional_list_may_be_missing() -> None:
    assert marked(Net(), {"listed_by": "no_weight_decay", "optional": True}) == set()


# ---- tied and frozen parameters --------------------------------------------------------------


@pytest.mark.parametrize(
    "matchers",
    [
        {"match": "embed.weight"},
        {"match": "head.weight"},
        {"regex": "^head.weight"},
        {"modules": "Embedding"},
        {"match": "embed.*", "modules": "Embedding"},
        {"match": "head.weight", "modules": "Linear"},
    ],
)
def test_a_tied_weight_is_matched_by_any_of_its_names_and_appears_once(
    matchers: dict[str, Any],
) -> None:
    model = Net(tied=True)
    assert marked(model, matchers) == {"embed.weight"}
    optimizer = built(model, {"rule": {**matchers, "lr": 0.5}})
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, tensors)) == sorted(map(id, model.parameters()))


def test_parameters_of_a_shared_module_are_matched_by_each_of_its_places() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": nn.ModuleList([shared, nn.Linear(3, 3)])})
    assert marked(model, {"match": "second.0.*"}) == {"first.weight", "first.bias"}
    assert marked(model, {"match": "second.1.*"}) == {"second.1.weight", "second.1.bias"}
    assert len(got(built(model, {"rule": {"match": "*", "lr": 1}}), "lr")) == 4


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.embed.weight.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    optimizer = built(model, {"biases": {"match": "*.bias", "weight_decay": 0.0}})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(got(optimizer, "lr")) == trained
    assert labels(optimizer) == ["default", "biases"]


@pytest.mark.parametrize(
    "matchers", [{"match": "embed.*"}, {"modules": "Embedding"}, {"regex": "embed"}]
)
def test_a_rule_may_match_frozen_parameters_only(matchers: dict[str, Any]) -> None:
    model = Net()
    model.embed.requires_grad_(False)
    optimizer = built(model, {"embeddings": {**matchers, "lr": 0.5}})
    assert labels(optimizer) == ["default"]
    assert set(got(optimizer, "lr").values()) == {0.001}
