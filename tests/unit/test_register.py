"""What `register` accepts, what it refuses, and entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from optfactory import get_optimizer_info, list_optimizers, registry, resolve
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.extend import OptimizerConfig, StateSpec, UpdateRule, register

SCALARS = ("beta",)
STATES = (StateSpec("exp_avg", signed=True),)
TEXT = "exp_avg = fma(beta, exp_avg, g); u = exp_avg;"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    registry._families.cache_clear()
    registry._table.cache_clear()


def made(
    family: str = "heavyball", text: str = TEXT, values: Mapping[str, Any] | None = None
) -> type[OptimizerConfig]:
    own_family = family

    class HeavyBallConfig(OptimizerConfig):
        """Momentum."""

        family: ClassVar[str] = own_family

        @classmethod
        def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
            return UpdateRule(own_family, STATES, SCALARS, text=text)

        @classmethod
        def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
            return dict(values or {"decay": 1.0, "step_size": group["lr"], "beta": 0.9})

    return HeavyBallConfig


def test_names_aliases_and_configs_of_a_registered_family() -> None:
    assert register(made()).family == "heavyball"
    assert len(list_optimizers("*heavyball*")) == 6
    assert resolve("PagedHeavyBall8bit", lr=0.5).optim_bits == 8
    assert get_optimizer_info("heavyball").description == "Momentum."


def test_registering_again_replaces() -> None:
    register(made())
    newer = register(made())
    assert registry._families()["heavyball"] is newer


@pytest.mark.parametrize("family", ["", "Upper", "with space", "paged_x", "x8bit", "x32bit", "8x"])
def test_a_family_that_makes_no_names_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="lower case"):
        register(made(family))
    assert len(list_optimizers()) == 18


def test_a_family_that_exists_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'adam' exists, in optfactory\.optimizers\.adam"):
        register(made("adam"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("u = g;", "must assign exp_avg"),
        ("exp_avg = g; u = nothing;", "'nothing' is unknown"),
        ("exp_avg = g; u = log(g);", "no function 'log'"),
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


def entries(*classes: type[OptimizerConfig]) -> list[EntryPoint]:
    """Entry points that load these classes."""

    class Loaded(EntryPoint):
        def load(self) -> Any:
            return register(classes[int(self.name)])

    return [Loaded(str(i), f"a_package:{i}", registry.ENTRY_POINTS) for i in range(len(classes))]


def test_entry_points_register_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    found = entries(made())
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert "paged_heavyball8bit" in list_optimizers()


def test_two_packages_with_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    other = made()
    other.__module__ = "another"
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Entry(made()), _Entry(other)])
    with pytest.raises(ConfigError, match="uninstall one"):
        list_optimizers()


class _Entry:
    """An entry point whose class does not register itself."""

    value = "a_package:Config"

    def __init__(self, config_class: type[OptimizerConfig]) -> None:
        self._class = config_class

    def load(self) -> type[OptimizerConfig]:
        return self._class
