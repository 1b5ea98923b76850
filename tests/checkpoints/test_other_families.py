"""Checkpoints of other optimizers into a family with one state: refused for what they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from optfactory import build_optimizer, families
from optfactory.errors import ConfigError, StateError
from optfactory.extend import OptimizerConfig, StateSpec, UpdateRule, register
from tests.checkpoints.harness import nested, peer, weights
from tests.torch_api.harness import train


class HeavyConfig(OptimizerConfig):
    """Momentum, without Adam's fields."""

    family: ClassVar[str] = "heavy"

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        text = "exp_avg = fma(beta, exp_avg, g); u = exp_avg;"
        return UpdateRule("heavy", (StateSpec("exp_avg", signed=True),), ("beta",), text=text)

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        return {"decay": 1.0, "step_size": group["lr"], "beta": 0.9}


@pytest.fixture(autouse=True)
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})
    register(HeavyConfig)


def refused(saved: dict[str, Any], name: str = "heavy8bit") -> str:
    """Why a checkpoint is not loaded; nothing is changed."""
    optimizer = build_optimizer(name, weights())
    with pytest.raises(StateError) as caught:
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize("form", [lambda saved: saved, nested], ids=["flat", "nested"])
@pytest.mark.parametrize("kind", ["Lion", "Lion8bit"])
def test_one_state_of_bitsandbytes_is_named(kind: str, form: Any) -> None:
    theirs = getattr(peer("bitsandbytes").optim, kind)(weights())
    train(theirs, range(1))
    message = refused(form(theirs.state_dict()))
    assert "of family 'lion', the config's name is 'heavy8bit'; take a name of that" in message
    assert "amsgrad" not in message


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "LAMB"])
def test_two_states_of_bitsandbytes_are_of_their_family(kind: str) -> None:
    theirs = getattr(peer("bitsandbytes").optim, kind)(weights())
    fresh = refused(theirs.state_dict())
    assert "family 'adam' or 'adamw' or 'lamb', the config's name is 'heavy8bit'; take" in fresh
    train(theirs, range(1))
    family = "lamb" if kind == "LAMB" else "adamw"
    assert f"family '{family}', the config's name is 'heavy8bit'; take" in refused(
        theirs.state_dict()
    )


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("name", ["heavy", "lamb"])
def test_states_of_torch_are_of_adam(name: str, says: bool) -> None:
    theirs = torch.optim.Adam(weights())
    train(theirs, range(1))
    saved = theirs.state_dict()
    if not says:  # as older releases
        saved["param_groups"][0].pop("decoupled_weight_decay", None)
    message = refused(saved, name)
    assert re.search(rf"family 'adam'( or 'adamw')?, the config's name is '{name}'", message)
    assert "amsgrad" not in message


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("adam", "heavy"), ("heavy", "adam8bit")])
def test_our_own_are_refused_by_family_before_their_fields(saved_by: str, loaded_by: str) -> None:
    ours = build_optimizer(saved_by, weights())
    train(ours, range(1))
    message = refused(ours.state_dict(), loaded_by)
    assert f"optimizer: the checkpoint is of family '{saved_by}'" in message
    assert "amsgrad" not in message
    assert "eps" not in message


@pytest.mark.parametrize("layout", ["torch", "bitsandbytes"])
def test_other_libraries_have_no_such_family(layout: str) -> None:
    ours = build_optimizer("heavy", weights())
    train(ours, range(1))
    with pytest.raises(ConfigError, match=r"optimizer: .* has no heavy"):
        ours.export_state_dict(layout)
