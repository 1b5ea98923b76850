"""What a plan says of other names is what building them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfactory import build_optimizer, list_optimizers, plan
from optfactory.errors import ConfigError
from tests.families import has, names_with
from tests.planning.harness import (
    CASES,
    NAMES,
    RULES,
    SETTINGS,
    Odd,
    dtype_of,
    on_meta,
    state_shares,
)
from tests.sampling import spread

OWN = ("optim_bits", "is_paged", "page_dir")  # what another name decides for itself


def overrides_for(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key not in OWN}


@pytest.mark.parametrize(
    ("name", "setting"), [case for case in CASES if case[0] in ("adam", "paged_adamw8bit", "lamb")]
)
def test_every_alternative_is_what_building_it_gives(name: str, setting: str) -> None:
    overrides, dtype = SETTINGS[setting], dtype_of(setting)
    model = Odd().to(dtype)
    planned = plan(name, on_meta(Odd, dtype), **overrides)
    assert [other.name for other in planned.alternatives] == list_optimizers()
    for other in planned.alternatives:
        if other.name == name:
            assert (other.shares, other.problem) == (state_shares(planned), "")
            continue
        # What an optimizer has no field for, it does without.
        wanted = {k: v for k, v in overrides_for(overrides).items() if has(other.name, k)}
        problem, nbytes = outcome(other.name, model, wanted)
        assert (other.problem, other.state_bytes) == (problem, nbytes)


def outcome(name: str, model: nn.Module, overrides: dict[str, Any]) -> tuple[str, int]:
    """Why an optimizer cannot be built, or the bytes of its state."""
    try:
        return "", build_optimizer(name, model, **overrides).memory_report().state_bytes
    except ConfigError as error:
        return error.problems[0], 0


def test_names_that_cannot_have_the_config_say_why() -> None:
    planned = plan("adam", on_meta(Odd), amsgrad=True)
    problems = {other.name: other.problem for other in planned.alternatives}
    narrow = set(list_optimizers(["*4bit", "*8bit", "*fp8", "*16bit"])) & set(names_with("amsgrad"))
    assert {name for name, problem in problems.items() if problem} == narrow
    assert all("amsgrad needs 32-bit state" in problems[name] for name in narrow)
    listed = {row["name"]: row for row in planned.as_dict()["alternatives"]}
    assert listed["lamb8bit"]["state_bytes"] is None
    assert listed["lamb8bit"]["problem"] == problems["lamb8bit"]
    assert listed["lamb"]["state_bytes"] == planned.state_bytes


def test_the_own_name_keeps_what_other_names_decide_for_themselves() -> None:
    planned = plan("adam", on_meta(Odd), optim_bits=8, is_paged=True)
    sizes = {other.name: other for other in planned.alternatives}
    assert sizes["adam"].shares == sizes["paged_adam8bit"].shares == state_shares(planned)
    assert sizes["adamw"].shares == sizes["adam32bit"].shares
    assert {share.place for share in sizes["adamw"].shares} == {"resident"}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules_hold_for_every_name(rules: dict[str, Any]) -> None:
    planned = plan("paged_adam8bit", on_meta(Odd), param_groups=rules)
    assert not [other.problem for other in planned.alternatives if other.problem]
    for other in spread(planned.alternatives, 16):
        alone = plan(other.name, on_meta(Odd), param_groups=rules)
        assert other.shares == state_shares(alone), other.name


def test_param_groups_hold_for_every_name_also_from_generators() -> None:
    def groups() -> Any:
        model = on_meta(Odd)
        yield {"params": (p for p in model.wide.parameters()), "optim_bits": 32}
        yield {"params": model.embed.named_parameters(), "optim_bits": 8, "block_size": 64}
        yield {"params": iter([model.flat])}

    planned = plan("adamw8bit", groups())
    sizes = {other.name: other.state_bytes for other in planned.alternatives}
    for name in spread(NAMES, 16):
        assert sizes[name] == plan(name, groups()).state_bytes
    assert len(set(sizes.values())) > 1


@pytest.mark.parametrize("name", ["paged_adamw8bit", "rmsprop", "ademamix8bit"])
def test_a_config_with_all_keys_stated_has_the_same_alternatives(name: str) -> None:
    # As Hydra gives it: the shipped YAML states every key.
    stated = build_optimizer(name, Odd()).config.model_dump(mode="json")
    model = on_meta(Odd, torch.bfloat16)
    full, bare = plan(stated, model), plan(name, model)
    assert full.alternatives == bare.alternatives
    assert not [other.problem for other in full.alternatives if other.problem]


def test_a_folder_for_pages_does_not_rule_out_names_without_pages(tmp_path: Any) -> None:
    planned = plan("paged_adam8bit", on_meta(Odd), page_dir=str(tmp_path))
    assert not [other for other in planned.alternatives if other.problem]
