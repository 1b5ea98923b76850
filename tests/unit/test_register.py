"""What `register` accepts and what it refuses; tests/unit/test_plugins.py has entry points."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from optfactory import families, get_optimizer_info, list_optimizers, resolve
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.extend import OptimizerConfig, StateSpec, UpdateRule, register
from tests.families import NAMES, PER_FAMILY

SCALARS = ("beta",)
STATES = (StateSpec("exp_avg", signed=True),)
TEXT = "exp_avg = fma(beta, exp_avg, g); u = exp_avg;"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})


def made(
    family: str = "heavyball",
    text: str = TEXT,
    values: Mapping[str, Any] | None = None,
    states: tuple[StateSpec, ...] = STATES,
) -> type[OptimizerConfig]:
    own_family = family

    class HeavyBallConfig(OptimizerConfig):
        """Momentum."""

        family: ClassVar[str] = own_family

        @classmethod
        def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
            return UpdateRule(own_family, states, SCALARS, text=text)

        @classmethod
        def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
            return dict(values or {"decay": 1.0, "step_size": group["lr"], "beta": 0.9})

    return HeavyBallConfig


def test_names_aliases_and_configs_of_a_registered_family() -> None:
    assert register(made()).family == "heavyball"
    assert len(list_optimizers("*heavyball*")) == PER_FAMILY
    assert resolve("PagedHeavyBall8bit", lr=0.5).optim_bits == 8
    assert get_optimizer_info("heavyball").description == "Momentum."


def test_registering_again_replaces() -> None:
    register(made())
    newer = register(made())
    assert families.families()["heavyball"] is newer


@pytest.mark.parametrize("family", ["", "Upper", "with space", "paged_x", "x8bit", "x32bit", "8x"])
def test_a_family_that_makes_no_names_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="lower case"):
        register(made(family))
    assert list_optimizers() == NAMES


def test_a_family_that_exists_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'adam' exists, in optfactory, as 'adam'; choose"):
        register(made("adam"))


@pytest.mark.parametrize("family", ["adam_w", "a_dam", "bnb_lamb", "bnbadam", "adamw_bnb"])
def test_a_family_that_spells_an_existing_name_is_refused(family: str) -> None:
    # Names are compared without "_", and with "bnb" before them: `AdamW` would have meant both.
    with pytest.raises(ConfigError, match="exists, in optfactory"):
        register(made(family))
    assert resolve("AdamW").name == "adamw"


def test_configs_made_before_another_family_came_are_pickled_still() -> None:
    config = resolve("adam8bit", lr=0.5)
    register(made())
    assert pickle.loads(pickle.dumps(config)) == config
    assert type(config) is get_optimizer_info("adam8bit").config_class


@pytest.mark.parametrize("given", [None, 3, made, dict])
def test_what_is_no_class_of_ours_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="subclass of OptimizerConfig, got"):
        register(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("u = g;", "must assign exp_avg"),
        ("exp_avg = g; u = nothing;", "'nothing' is unknown"),
        ("exp_avg = g; u = log(g);", "there is no function 'log'"),
        ("exp_avg = g;\nu = = g;", "<rule text of heavyball>:2"),
        ("double = g; exp_avg = double; u = g;", "'double' means something in kernels"),
    ],
)
def test_a_mistake_in_the_text_shows_at_once(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        register(made(text=text))
    with pytest.raises(UnknownOptimizerError):
        resolve("heavyball")


@pytest.mark.parametrize(
    "values", [{"decay": 1.0, "step_size": 1.0}, {"decay": 1, "step_size": 1, "beta": 1, "b": 2}]
)
def test_scalars_that_do_not_match_the_rule_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"scalars returns .* needs \['beta', 'decay'"):
        register(made(values=values))


@pytest.mark.parametrize(
    ("signed", "field", "value", "what"),
    [
        (True, "second_moment_floor", False, "second moment"),
        (False, "signed_map", "symmetric", "signed state"),
    ],
)
def test_a_field_of_states_that_a_family_does_not_keep_is_refused(
    signed: bool, field: str, value: Any, what: str
) -> None:
    register(made(states=(StateSpec("exp_avg", signed=signed),)))
    with pytest.raises(ConfigError, match=f"{field}: heavyball keeps no {what} .*; drop it"):
        resolve("heavyball8bit", **{field: value})
    resolve("heavyball8bit", **{field: resolve("adam8bit").model_dump()[field]})
