"""What a configuration is refused for, one by one, and what its error says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from optfactory import build_optimizer, get_optimizer_info, resolve
from optfactory.errors import ConfigError, UnknownOptimizerError
from tests.families import names_with
from tests.unit.harness import NAMES, NUMBERS, refusal


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [
        ("adamm", "adam"),
        ("lamb18bit", "lamb8bit"),
        ("page_adam8bit", "paged_adam8bit"),
        ("adamw_8bits", "adamw8bit"),
        ("paged_lmab", "paged_lamb"),
        ("adamw8bits", "adamw8bit"),
        ("adamw8", "adamw8bit"),
        ("padged_lion_8bit", "paged_lion8bit"),
        ("ademmix8bit", "ademamix8bit"),
        ("rmsporp", "rmsprop"),
    ],
)
def test_an_unknown_name_names_the_closest_one(given_name: str, meant: str) -> None:
    with pytest.raises(UnknownOptimizerError, match=f"Did you mean '{meant}'") as caught:
        resolve(given_name)
    assert f"'{given_name}'" in str(caught.value)
    assert "[paged_]<family>[4bit|8bit|fp8|16bit|32bit]" in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_an_unknown_name_in_a_node_is_reported_with_its_place() -> None:
    root = OmegaConf.create({"model": {"optimizer": {"name": "adamm"}}})
    assert "model.optimizer.name" in str(refusal(root.model.optimizer))


@pytest.mark.parametrize("bits", ["", "8bit", "_32bit"])
@pytest.mark.parametrize(
    "name",
    [
        *("qqqqqq", "nlars", "larc", "adamp", "adamax", "adamod", "adamc", "adadelta", "adafactor"),
        *("sgdw", "sgdp", "asgd", "lambc", "nadamw", "radamw", "adanw", "adoptw", "clion", "padam"),
        *("adamuon", "soap", "tiger", "came", "rprop", "madgrad", "mars", "lomo", "signum", "amos"),
        *("adamw_torch", "stable_adamw", "fused_adam", "galore_adamw", "rmsprop_tf", "paged"),
    ],
)
def test_another_algorithm_gets_no_hint(name: str, bits: str) -> None:
    assert "Did you mean" not in str(refusal(f"{name}{bits}"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate_", None),
        ("lrs", "lr"),
        ("beta", "betas"),
        ("weight_deacy", "weight_decay"),
        ("amsgrads", "amsgrad"),
        ("min_8bit_sizes", "min_8bit_size"),
        ("blocksize", "block_size"),
        ("ispaged", "is_paged"),
    ],
)
def test_an_unknown_key_says_what_was_meant_and_where_all_are_listed(
    key: str, meant: str | None
) -> None:
    message = str(refusal("adam", **{key: 1}))
    assert f"optimizer.{key}: unknown key" in message
    assert message.endswith("`optfactory show adam` lists all")
    assert len(message) < 200
    assert (f"did you mean '{meant}'?" in message) if meant else ("did you mean" not in message)


@pytest.mark.parametrize("key", ["fused", "foreach", "momentum"])
def test_keys_of_other_optimizers_get_a_message_of_their_own(key: str) -> None:
    message = str(refusal("adamw8bit", **{key: True}))
    assert f"optimizer.{key}: unknown key; " in message
    assert "lists all" not in message


@pytest.mark.parametrize("key", ["max_unorm", "trust_ratio"])
@pytest.mark.parametrize("name", ["adam", "adamw", "paged_adam8bit"])
def test_fields_of_lamb_are_unknown_to_the_others(name: str, key: str) -> None:
    assert f"optimizer.{key}: unknown key" in str(refusal(name, **{key: None}))


@pytest.mark.parametrize(
    "name", [name for name in names_with("amsgrad") if name.endswith(("8bit", "16bit"))]
)
def test_amsgrad_is_refused_for_every_narrow_name(name: str) -> None:
    message = str(refusal(name, amsgrad=True))
    assert "optimizer.amsgrad: " in message
    assert "32-bit" in message


@pytest.mark.parametrize("name", ["adam", "paged_adamw", "lamb"])
def test_amsgrad_is_refused_for_8_bits_chosen_by_the_config(name: str) -> None:
    message = str(refusal(name, optim_bits=8, amsgrad=True))
    assert "optimizer.amsgrad: " in message
    assert resolve(name, amsgrad=True).amsgrad


def test_amsgrad_is_refused_in_8bit_param_groups() -> None:
    p, q = torch.ones(4096).requires_grad_(), torch.ones(4096).requires_grad_()
    groups = [{"params": [p]}, {"params": [q], "optim_bits": 8}]
    with pytest.raises(ConfigError, match=r"param_groups\[1\]\.amsgrad"):
        build_optimizer("adam", groups, amsgrad=True)
    groups = [{"params": [p]}, {"params": [q], "amsgrad": True}]
    with pytest.raises(ConfigError, match=r"param_groups\[1\]\.amsgrad"):
        build_optimizer("adam8bit", groups)


@pytest.mark.parametrize("bits", [0, 1, 2, 12, 64, -8, 8.5, math.nan, "sixteen", None, [8], True])
def test_other_widths_are_refused(bits: Any) -> None:
    message = str(refusal("adam", optim_bits=bits))
    assert "optimizer.optim_bits: " in message
    assert f"got {bits!r}" in message
    assert "8, 16 or 32" in message or "boolean" in message


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_a_width_that_contradicts_the_name_is_refused(name: str, bits: int) -> None:
    stated = next((width for width in (4, 8, 16, 32) if name.endswith(f"{width}bit")), None)
    stated = 8 if name.endswith("fp8") else stated
    if bits == 4 and stated is None and get_optimizer_info(name).base.too_coarse:
        assert "too coarse" in str(refusal(name, optim_bits=bits))
        return
    if stated in (None, bits):
        assert resolve(name, optim_bits=bits).optim_bits == bits
        return
    message = str(refusal(name, optim_bits=bits))
    assert f"optimizer.optim_bits: {bits} contradicts the name '{name}'" in message


@pytest.mark.parametrize("name", NAMES)
def test_is_paged_false_is_refused_for_paged_names_only(name: str) -> None:
    if not name.startswith("paged_"):
        assert not resolve(name, is_paged=False).is_paged
        return
    assert resolve(name).is_paged
    message = str(refusal(name, is_paged=False))
    assert f"optimizer.is_paged: False contradicts the name '{name}'" in message


@pytest.mark.parametrize("name", ["adam", "adamw8bit", "paged_lamb32bit"])
@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", [-1, -1e-30, math.nan, math.inf, -math.inf, "nan", "inf", "-1e-8", ".inf", ".nan"]
)
def test_numbers_must_be_finite_and_not_negative(name: str, key: str, value: Any) -> None:
    message = str(refusal(name, **{key: value}))
    assert f"optimizer.{key}: " in message
    assert f"(got {value!r})" in message


@pytest.mark.parametrize("key", [*NUMBERS, "optim_bits", "min_8bit_size", "block_size"])
@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_not_numbers(key: str, value: bool) -> None:
    message = str(refusal("lamb", **{key: value}))
    assert f"optimizer.{key}: " in message
    assert "not a boolean" in message
    assert f"got {value}" in message


def test_a_boolean_max_unorm_is_refused() -> None:
    assert "boolean" in str(refusal("lamb", trust_ratio="clip", max_unorm=True))


def test_a_boolean_tensor_is_not_a_number() -> None:
    assert "boolean" in str(refusal("adam", lr=torch.tensor(True)))


@pytest.mark.parametrize("key", [*NUMBERS, "min_8bit_size", "block_size", "optim_bits", "betas"])
@pytest.mark.parametrize("value", [None, [], {}, "many", object, 1j])
def test_other_things_are_not_numbers(key: str, value: Any) -> None:
    assert f"optimizer.{key}: " in str(refusal("adam", **{key: value}))


@pytest.mark.parametrize(
    "pair",
    [(-0.1, 0.9), (0.9, 1.0), (1, 0.9), (0.9, 2), (math.nan, 0.9), (0.9, math.inf), ("1.0", 0.9)],
)
def test_betas_outside_of_0_to_1_are_refused_by_index(pair: tuple[Any, Any]) -> None:
    index = 0 if not 0 <= float(pair[0]) < 1 else 1
    message = str(refusal("adam", betas=pair))
    assert f"optimizer.betas.{index}: " in message
    assert f"got {pair[index]!r}" in message


@pytest.mark.parametrize(
    "value",
    [(), (0.9,), (0.9, 0.99, 0.999), 0.9, "0.9", "(0.9,)", "(0.9, 0.99, 1)", "x, y", None, {1, 2}],
)
def test_betas_must_be_two(value: Any) -> None:
    message = str(refusal("adam", betas=value))
    assert "optimizer.betas: " in message
    assert "two numbers" in message


@pytest.mark.parametrize("pair", [(True, 0.9), (0.9, False), "(True, 0.9)"])
def test_betas_are_not_booleans(pair: Any) -> None:
    assert "boolean" in str(refusal("adam", betas=pair))


@pytest.mark.parametrize("text", ["__import__('os').getcwd(), 1", "(" * 500, "\0", "[" * 200])
def test_betas_as_text_are_never_evaluated_and_never_crash(text: str) -> None:
    assert "optimizer.betas: " in str(refusal("adam", betas=text))


@pytest.mark.parametrize("value", [-1, -4096, 1.5, "x", math.inf, math.nan])
def test_min_8bit_size_must_be_a_count(value: Any) -> None:
    message = str(refusal("adam8bit", min_8bit_size=value))
    assert "optimizer.min_8bit_size: " in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("value", [-256, 0, 1, 32, 100, 255, 8192, 256.5])
def test_block_size_must_be_one_that_kernels_exist_for(value: Any) -> None:
    message = str(refusal("adam8bit", block_size=value))
    assert "optimizer.block_size: " in message
    assert "64, 128, 256" in message
    assert f"got {value!r}" in message


EIGHT_BIT = {"block_size": 64, "block_wise": False, "signed_map": "symmetric",
             "second_moment_floor": False, "state_rounding": "stochastic"}  # fmt: skip


@pytest.mark.parametrize("key", EIGHT_BIT)
@pytest.mark.parametrize("name", ["adam", "adamw32bit", "paged_lamb"])
def test_fields_of_8_bits_are_refused_at_32_bits(name: str, key: str) -> None:
    message = str(refusal(name, **{key: EIGHT_BIT[key]}))
    assert f"optimizer.{key}: {key} is for 8-bit state; drop it at 32 bits" in message
    assert "say it in the rule or group that has optim_bits: 8" in message
    default = getattr(resolve(name), key)
    assert resolve(name, **{key: default}) == resolve(name)  # as every shipped node states it


@pytest.mark.parametrize("key", EIGHT_BIT)
def test_fields_of_8_bits_are_said_in_the_rule_or_group_of_8_bits(key: str) -> None:
    wide = {"optim_bits": 8, key: EIGHT_BIT[key]}
    p, q = torch.ones(64, 64).requires_grad_(), torch.ones(8).requires_grad_()
    by_group = build_optimizer("adam", [{"params": [p], **wide}, {"params": [q]}])
    rules = {"wide": {"ndim": 2, **wide}}
    by_rule = build_optimizer("adam", [("p", p), ("q", q)], param_groups=rules)
    for optimizer in (by_group, by_rule):
        values = {group["optim_bits"]: group[key] for group in optimizer.param_groups}
        assert values == {8: EIGHT_BIT[key], 32: getattr(resolve("adam"), key)}
    message = str(refusal("adam8bit", param_groups={"a": {"optim_bits": 32, key: EIGHT_BIT[key]}}))
    assert f"param_groups.a.{key}: " in message


@pytest.mark.parametrize("key", EIGHT_BIT)
def test_a_group_of_32_bits_does_without_what_its_optimizer_says_of_8(key: str) -> None:
    groups = [{"params": [torch.ones(64, 64).requires_grad_()], "optim_bits": 32}]
    optimizer = build_optimizer("adam8bit", groups, **{key: EIGHT_BIT[key]})
    assert optimizer.param_groups[0][key] == getattr(resolve("adam"), key)
    assert optimizer.config.model_dump()[key] == EIGHT_BIT[key]


@pytest.mark.parametrize("value", ["paper", "", None, 1])
def test_trust_ratio_must_be_one_of_two(value: Any) -> None:
    message = str(refusal("lamb", trust_ratio=value))
    assert "optimizer.trust_ratio: " in message
    assert "'lamb' or 'clip'" in message


@pytest.mark.parametrize("key", ["bias_correction", "adam_w_mode", "amsgrad", "is_paged"])
@pytest.mark.parametrize("value", [None, 2, "perhaps", [], 0.5])
def test_switches_are_booleans(key: str, value: Any) -> None:
    message = str(refusal("adam", **{key: value}))
    assert f"optimizer.{key}: " in message
    assert "boolean" in message


def test_page_dir_is_text() -> None:
    assert "optimizer.page_dir: " in str(refusal("paged_adam", page_dir=3))


def test_page_dir_where_nothing_is_paged_is_refused(tmp_path: Path) -> None:
    assert "optimizer.page_dir: " in str(refusal("adam", page_dir=str(tmp_path)))
    assert resolve("adam", is_paged=True, page_dir=str(tmp_path)).page_dir == str(tmp_path)


def test_max_unorm_without_clip_is_refused() -> None:
    assert "optimizer.max_unorm: " in str(refusal("lamb", max_unorm=1.0))
    assert resolve("lamb", trust_ratio="clip", max_unorm=0).max_unorm == 0


def test_all_problems_are_reported_at_once() -> None:
    error = refusal(
        "paged_adam8bit",
        lr=-1, betas=(1.5, 2), eps="x", weight_decay=math.nan, optim_bits=32, is_paged=False,
        block_size=3, min_8bit_size=-1, lrr=1, amsgrad="maybe",
    )  # fmt: skip
    places = {problem.partition(":")[0].removeprefix("optimizer.") for problem in error.problems}
    assert places == {
        "lr", "betas.0", "betas.1", "eps", "weight_decay", "optim_bits", "is_paged", "block_size",
        "min_8bit_size", "lrr", "amsgrad",
    }  # fmt: skip
    assert f"{len(places)} problem(s)" in str(error)
    assert len(error.problems) == len(places)


def test_nothing_is_allocated_for_a_refused_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("allocated state")

    monkeypatch.setattr("optfactory.memory.placement.allocate", fail)
    with pytest.raises(ConfigError):
        build_optimizer("adam8bit", [torch.ones(4096).requires_grad_()], amsgrad=True)
