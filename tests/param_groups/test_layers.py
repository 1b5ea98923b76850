"""Which layer each parameter is in, and what `layer_decay` makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from optfactory.groups.layers import LayerNumbers
from tests.param_groups.harness import Net, Rules, built, got, problems


def numbers(names: Sequence[str | tuple[str, int]], blocks: str | None = None) -> list[int]:
    sized = [(item, 1) if isinstance(item, str) else item for item in names]
    found = LayerNumbers(sized, blocks)
    return found.layers


NAMES = [
    # What comes before, in and behind the blocks, under the names that libraries give.
    (["embed.w", "blocks.0.a.w", "blocks.1.a.w", "blocks.2.w", "head.w"], [0, 1, 2, 3, 4]),
    (
        [
            *("transformer.wte.weight", "transformer.wpe.weight"),
            *("transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.weight"),
            *("transformer.h.1.ln_1.weight", "transformer.ln_f.weight", "lm_head.weight"),
        ],
        [0, 0, 1, 1, 2, 3, 3],
    ),
    (
        [
            *("bert.embeddings.w", "bert.encoder.layer.0.w", "bert.encoder.layer.1.w"),
            *("bert.encoder.layer.2.output.dense.w", "bert.pooler.w", "classifier.w"),
        ],
        [0, 1, 2, 3, 4, 4],
    ),
    # nn.Sequential at the root; modules without parameters are no layers.
    (["0.weight", "0.bias", "2.weight", "4.weight"], [1, 1, 2, 3]),
    (["0.weight"], [1]),
    # No list behind, none before.
    (["layers.0.w", "layers.1.w"], [1, 2]),
    (["layers.0.w", "layers.1.w", "norm.w"], [1, 2, 3]),
    # Between blocks: as the block before it.
    (["e.w", "a.0.w", "mid.w", "a.1.w", "mid2", "a.2.w", "h.w"], [0, 1, 1, 2, 2, 3, 4]),
    # A list of parameters has no blocks.
    (["tokens.0", "tokens.1", "blocks.0.w", "blocks.1.w"], [0, 0, 1, 2]),
    # Numbers need not begin at 0 or be dense, and need not have one digit.
    (["b.3.w", "b.7.w", "b.10.w", "b.11.w"], [1, 2, 3, 4]),
    # Numbers inside words are none.
    (["stem.x.w", "h2o.0.w", "h2o.1.w", "conv2d.w"], [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_layers_are_read_off_names(names: list[str], expected: list[int]) -> None:
    assert numbers(names) == expected


def test_of_lists_side_by_side_the_largest_counts() -> None:
    names = [("stem.0.w", 1), ("stem.1.w", 1), ("body.0.w", 9), ("body.1.w", 9), ("top.0.w", 5)]
    assert numbers(names) == [0, 0, 1, 2, 3]
    assert LayerNumbers(names).lists == ["body"]
    assert numbers(names, "stem") == [1, 2, 3, 3, 3]


def test_of_nested_lists_the_outermost_counts() -> None:
    names = [
        *(("stages.0.blocks.0.w", 5), ("stages.0.blocks.1.w", 50)),
        *(("stages.1.blocks.0.w", 5), ("stages.1.down.w", 5), ("head.w", 1)),
    ]
    assert numbers(names) == [1, 1, 2, 2, 3]
    assert LayerNumbers(names).lists == ["stages"]


@pytest.mark.parametrize("glob", ["layers.*.blocks", "*blocks", "layers.?.bl*"])
def test_blocks_of_several_lists_are_numbered_on(glob: str) -> None:
    names = [
        *("patch_embed.w", "layers.0.blocks.0.w", "layers.0.blocks.1.w", "layers.0.down.w"),
        *("layers.1.blocks.0.a.w", "layers.1.blocks.0.b.w", "layers.1.blocks.1.w", "norm.w"),
    ]
    assert numbers(names, glob) == [0, 1, 2, 2, 3, 3, 4, 5]
    found = LayerNumbers([(name, 1) for name in names], glob)
    assert found.lists == ["layers.0.blocks", "layers.1.blocks"]
    assert found.last == 5


def test_blocks_may_name_an_inner_list_of_one_block() -> None:
    names = ["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w"]
    assert numbers(names, "a") == [1, 1, 2]
    assert numbers(names, "a.0.b") == [1, 2, 3]
    assert numbers(names, "a.1.b") == [0, 0, 1]


def test_blocks_may_name_the_root() -> None:
    assert numbers(["0.a.0.w", "0.a.1.w", "1.w"], "") == [1, 1, 2]


def test_a_glob_that_means_no_list_finds_none() -> None:
    found = LayerNumbers([("blocks.0.w", 1), ("head.w", 1)], "layers")
    assert (found.lists, found.last) == ([], 1)


# ---- built -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_layer_i_of_n_learns_with_decay_to_the_power_of_n_plus_1_minus_i(depth: int) -> None:
    rates = got(built(Net(depth), {"layers": {"layer_decay": "0.8"}}, lr=2.0), "lr")
    for name, rate in rates.items():
        layer = depth + 1
        if name.startswith("embed"):
            layer = 0
        elif name.startswith("blocks"):
            layer = 1 + int(name.split(".")[1])
        assert rate == pytest.approx(2.0 * 0.8 ** (depth + 1 - layer), rel=1e-15), name


def test_groups_are_labelled_by_layer() -> None:
    optimizer = built(Net(1), {"layers": {"layer_decay": 0.5}, "one": {"ndim": 1, "eps": 0.1}})
    assert list(dict.fromkeys(got(optimizer, "name").values())) == [
        *("layers[0]", "layers[1]+one", "layers[1]", "layers[2]+one", "layers[2]")
    ]


def test_a_matcher_limits_the_decay_but_not_the_numbers() -> None:
    rules: Rules = {"layers": {"match": "blocks.*", "ndim": 2, "layer_decay": 0.5}}
    rates = got(built(Net(2), rules, lr=1.0), "lr")
    assert {name: rate for name, rate in rates.items() if rate != 1.0} == {
        "blocks.0.mix.weight": 0.25,
        "blocks.1.mix.weight": 0.5,
    }


def test_frozen_blocks_count() -> None:
    model = Net(3)
    model.embed.requires_grad_(False)
    model.blocks[:2].requires_grad_(False)
    rates = got(built(model, {"layers": {"layer_decay": 0.5}}, lr=1.0), "lr")
    assert rates["blocks.2.mix.weight"] == 0.5
    assert rates["head.weight"] == 1.0


def test_a_tied_weight_is_in_the_layer_of_its_first_name() -> None:
    rates = got(built(Net(1, tied=True), {"layers": {"layer_decay": 0.5}}, lr=1.0), "lr")
    assert rates["embed.weight"] == 0.25
    assert rates["head.bias"] == 1.0


def test_a_sequential_model_has_its_children_as_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    rates = got(built(model, {"layers": {"layer_decay": 0.5}}, lr=1.0), "lr")
    assert [rates[f"{i}.weight"] for i in (0, 2, 3)] == [0.125, 0.25, 0.5]


def test_encoder_and_decoder_may_be_numbered_on() -> None:
    model = nn.ModuleDict({"encoder": Net(2), "decoder": Net(2)})
    rules: Rules = {"layers": {"layer_decay": 0.5, "blocks": "*coder.blocks"}}
    rates = got(built(model, rules, lr=1.0), "lr")
    assert rates["encoder.embed.weight"] == 1 / 32
    assert rates["encoder.blocks.1.mix.weight"] == 1 / 8
    assert rates["encoder.head.weight"] == rates["decoder.embed.weight"] == 1 / 8
    assert rates["decoder.blocks.0.mix.weight"] == 1 / 4
    assert rates["decoder.head.weight"] == 1.0


@pytest.mark.parametrize("blocks", [None, "layers"])
def test_a_model_without_such_blocks_is_told_so(blocks: str | None) -> None:
    model = Net() if blocks else nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    rule = {"layer_decay": 0.5} | ({"blocks": blocks} if blocks else {})
    (problem,) = problems(model, {"layers": rule})
    assert problem.startswith("param_groups.layers.layer_decay: ")
    assert "blocks" in problem


def test_blocks_are_counted_in_the_whole_model_not_in_what_is_trained() -> None:
    model = Net(2)
    model.head.requires_grad_(False)
    optimizer = built(model, {"layers": {"layer_decay": 0.5}}, lr=torch.tensor(1.0))
    assert got(optimizer, "lr")["blocks.1.mix.weight"] == 0.5
