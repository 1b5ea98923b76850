"""Every way to hand a config and parameters to `build_optimizer` and `optimizer_factory`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from optfactory import build_optimizer, list_optimizers, optimizer_factory, resolve
from optfactory.catalog.files import config_folder
from optfactory.errors import ConfigError, UnknownOptimizerError

# Hydra 1.4 advises every call of instantiate.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*_execution_whitelist_")

MODEL = torch.nn.Linear(80, 64)
RULES = {"no_decay": {"ndim": "<=1", "weight_decay": 0.0}}
VALUES = {"name": "adamw8bit", "lr": 0.5, "betas": [0.8, 0.9], "param_groups": RULES}


def assert_built(optimizer: Any) -> None:
    """It is the optimizer of `VALUES` for the tensors of `MODEL` themselves."""
    assert optimizer.config == resolve(VALUES)
    groups = [(group["name"], group["lr"], group["betas"]) for group in optimizer.param_groups]
    assert groups == [("default", 0.5, (0.8, 0.9)), ("no_decay", 0.5, (0.8, 0.9))]
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert params == {id(p) for p in MODEL.parameters()}


# ---- Python --------------------------------------------------------------------------------

REST = {key: value for key, value in VALUES.items() if key != "name"}
CALLS: dict[str, Callable[[], Any]] = {
    "two positions": lambda: build_optimizer(VALUES, MODEL),
    "params by keyword": lambda: build_optimizer(VALUES, params=MODEL),
    "both by keyword": lambda: build_optimizer(cfg=VALUES, params=MODEL),
    "all by keyword": lambda: build_optimizer(params=MODEL, **VALUES),
    "config by keyword": lambda: build_optimizer(MODEL.parameters(), **VALUES),
    "a node's items": lambda: build_optimizer(params=MODEL, **OmegaConf.create(VALUES)),
    "a node in a dict": lambda: build_optimizer(dict(OmegaConf.create(VALUES)), MODEL),
    "partial": lambda: partial(build_optimizer, "adamw8bit", **REST)(params=MODEL),
    "partial, position": lambda: partial(build_optimizer, "adamw8bit", **REST)(MODEL),
    "partial of keywords": lambda: partial(build_optimizer, **VALUES)(MODEL),
    "partial as config": lambda: build_optimizer(partial(build_optimizer, VALUES), MODEL),
    "factory": lambda: optimizer_factory("adamw8bit", **REST)(MODEL),
    "factory of keywords": lambda: optimizer_factory(**VALUES)(params=MODEL),
    "factory, late config": lambda: optimizer_factory()(MODEL, **VALUES),
    "factory, later override": lambda: optimizer_factory(VALUES, lr=7.0)(MODEL, lr=0.5),
    "factory with parameters": lambda: optimizer_factory(VALUES, MODEL),
    "factory as config": lambda: build_optimizer(optimizer_factory(**VALUES), MODEL),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_builds_the_same_optimizer(call: str) -> None:
    assert_built(CALLS[call]())


def test_a_config_may_be_resolved_from_keywords_and_from_a_factory() -> None:
    assert resolve(**VALUES) == resolve(VALUES) == resolve(optimizer_factory(**VALUES))


def test_a_tensor_as_learning_rate_is_kept_on_every_way() -> None:
    lr = torch.tensor(0.25)
    for make in (
        build_optimizer("adam", MODEL, lr=lr),
        build_optimizer(params=MODEL, name="adam", lr=lr),
        optimizer_factory("adam", lr=lr)(MODEL),
        build_optimizer(optimizer_factory({"name": "adam", "lr": lr}), MODEL),
    ):
        assert make.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("given", [("adam",), (VALUES,), (OmegaConf.create(VALUES),), ()])
def test_missing_parameters_are_named(given: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"got no parameters; give them .* as params="):
        build_optimizer(*given, name="adam")


def test_a_missing_name_is_named() -> None:
    for call in (build_optimizer, optimizer_factory):
        with pytest.raises(ConfigError, match="no key 'name'"):
            call(params=MODEL, lr=0.1)


def test_a_factory_checks_its_config_at_once() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        optimizer_factory("adam", lr=-1)
    with pytest.raises(UnknownOptimizerError):
        optimizer_factory(name="adm")
    with pytest.raises(ConfigError, match="got partial"):
        build_optimizer(partial(torch.optim.SGD, lr=1.0), MODEL)  # type: ignore[call-overload]


# ---- Hydra's instantiate -------------------------------------------------------------------


def node(**more: Any) -> DictConfig:
    """The shipped node, as an app composes it, below another key and with its own values."""
    shipped = OmegaConf.load(config_folder() / "adamw8bit.yaml")
    app = OmegaConf.merge({"model": {"optimizer": shipped}, "lr": 0.5},
                          {"model": {"optimizer": {**VALUES, "lr": "${lr}", **more}}})  # fmt: skip
    assert isinstance(app, DictConfig)
    OmegaConf.set_struct(app, True)
    return app


def parameters() -> list[torch.nn.Parameter]:
    return list(MODEL.parameters())


INSTANTIATIONS: dict[str, Callable[[Any], Any]] = {
    "lightning-hydra-template": lambda n: instantiate(n)(params=MODEL.parameters()),
    "then a position": lambda n: instantiate(n)(MODEL.parameters()),
    "then a Module": lambda n: instantiate(n)(MODEL),
    "at once": lambda n: instantiate(n, params=MODEL.parameters()),
    "at once, a list": lambda n: instantiate(n, params=parameters()),
    "at once, pairs": lambda n: instantiate(n, params=list(MODEL.named_parameters())),
    "at once, groups": lambda n: instantiate(n, params=[{"params": parameters()}]),
    "at once, a position": lambda n: instantiate(n, MODEL.parameters()),
    "at once, a Module": lambda n: instantiate(n, params=MODEL),
    "partial by the caller": lambda n: instantiate(n, _partial_=True)(params=MODEL.parameters()),
    "all containers plain": lambda n: instantiate(n, _convert_="all")(MODEL.parameters()),
    "not recursive": lambda n: instantiate(n, _recursive_=False)(MODEL.parameters()),
    "then our own": lambda n: build_optimizer(instantiate(n), MODEL),
    "our own": lambda n: build_optimizer(n, MODEL),
}


@pytest.mark.parametrize("way", INSTANTIATIONS)
@pytest.mark.parametrize("more", [{}, {"_partial_": True}, {"_convert_": "all"}])
def test_a_shipped_node_can_be_instantiated(way: str, more: dict[str, Any]) -> None:
    if "_partial_" in more and way.startswith("at once"):
        return  # a contradiction of its own: Hydra returns a function then
    assert_built(INSTANTIATIONS[way](node(**more).model.optimizer))


def test_a_whole_config_can_be_instantiated() -> None:
    built = instantiate(node())
    assert_built(built.model.optimizer(params=MODEL.parameters()))
    assert_built(build_optimizer(built.model.optimizer, MODEL))


@pytest.mark.parametrize("target", ["optfactory.build_optimizer", "optfactory.optimizer_factory"])
@pytest.mark.parametrize("given", [VALUES, {"cfg": VALUES}, {"_args_": [VALUES]}])
def test_a_partial_target_of_the_users_own(target: str, given: dict[str, Any]) -> None:
    config = {"_target_": target, "_partial_": True, **given}
    assert_built(instantiate(config)(params=MODEL.parameters()))


@pytest.mark.parametrize("name", list_optimizers())
def test_every_shipped_file_can_be_instantiated(name: str) -> None:
    make = instantiate(OmegaConf.load(config_folder() / f"{name}.yaml"))
    assert make(params=MODEL.parameters()).config == resolve(name)


def test_a_wrong_value_is_refused_when_the_node_is_instantiated() -> None:
    # Hydra 1.4 lets the error itself through.
    with pytest.raises(
        (ConfigError, InstantiationException), match=r"optimizer\.lr: Input should be greater"
    ):
        instantiate(node(lr=-1).model.optimizer)


KEYS = {"_partial_": True, "_convert_": "all", "_recursive_": False, "_isolate_": True,
        "_execution_whitelist_": ["optfactory.*"]}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_hydras_keys_are_no_hyperparameters(key: str) -> None:
    assert resolve({**VALUES, key: KEYS[key]}) == resolve(VALUES)


@pytest.mark.parametrize("target", ["torch.optim.SGD", "torch.optim.AdamW", "a.b", None, 3])
def test_a_target_that_would_not_be_built_is_refused(target: Any) -> None:
    for values in ({"_target_": target, "lr": 0.1}, {**VALUES, "_target_": target}):
        with pytest.raises(ConfigError) as caught:
            build_optimizer(
                OmegaConf.create({"model": {"optimizer": values}}).model.optimizer, MODEL
            )
        assert f"model.optimizer._target_: {target!r} is not an optimizer of optfactory" in str(
            caught.value
        )
        assert "hydra.utils.instantiate, or drop _target_ and set name" in str(caught.value)


def test_positional_arguments_of_a_target_are_not_dropped() -> None:
    with pytest.raises(ConfigError, match="_args_: unknown key"):
        build_optimizer({**VALUES, "_args_": [1]}, MODEL)
