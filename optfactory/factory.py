"""From a config to an optimizer: `resolve` checks, `build_optimizer` builds, now or later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast, overload

from optfactory.config.hydra_keys import MADE_FOR, NODE_KEYS, renamed_problem, target_problem
from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.registry import canonical_name, get_optimizer_info, implied_fields
from optfactory.rule_check import validate_with_rules

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from optfactory.groups.parameters import Params
    from optfactory.optimizer import Optimizer2State

    Config = str | Mapping[str, Any] | DictConfig | OptimizerConfig | partial[Optimizer2State]


def resolve(cfg: Config | None = None, **overrides: Any) -> OptimizerConfig:
    """Check a configuration and return it as a frozen model.

    >>> config = resolve({"name": "paged_adamw_8bit", "lr": "3e-4"})
    >>> config.name, config.lr, config.optim_bits, config.is_paged
    ('paged_adamw8bit', 0.0003, 8, True)

    Args:
        cfg: an optimizer name or alias, a mapping with the key `name`, a Hydra/OmegaConf node, a
            config that was already resolved, or what `optimizer_factory` returned.
        overrides: hyperparameters that replace those of `cfg`; all of them, with `name`, if there
            is no `cfg`.

    Raises:
        UnknownOptimizerError: no optimizer of that name.
        ConfigError: lists every problem with its dotted path.
    """
    return _checked(*values_of(cfg, overrides))


@overload
def build_optimizer(cfg: Config, params: Params, **overrides: Any) -> Optimizer2State: ...
@overload
def build_optimizer(cfg: Params, *, name: str, **overrides: Any) -> Optimizer2State: ...
@overload
def build_optimizer(*, params: Params, name: str, **overrides: Any) -> Optimizer2State: ...
def build_optimizer(cfg: Any = None, params: Any = None, **overrides: Any) -> Optimizer2State:
    """Build the optimizer that a config names, after checking all of it.

    >>> import torch
    >>> model = torch.nn.Linear(128, 64)
    >>> rules = {"no_decay": {"ndim": 1, "weight_decay": 0.0}}
    >>> optimizer = build_optimizer("adamw8bit", model, lr=3e-4, param_groups=rules)
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('default', 0.01), ('no_decay', 0.0)]

    All of it may be given by keyword, the config as well:

    >>> optimizer = build_optimizer(params=model, name="adamw8bit", lr=3e-4)

    Args:
        cfg: as for `resolve`; left out where `name` is among the overrides, as when Hydra's
            partial functions call with the parameters alone.
        params: a Module (its trainable parameters), tensors, (name, tensor) pairs, or torch
            param-group dicts, whose own hyperparameters override the config's.
        overrides: hyperparameters that replace those of `cfg`; `lr` may be a 0-d tensor, which the
            groups then hold, or where rules make groups, each a copy of its own.

    Raises:
        ConfigError: the config or the parameters are refused; nothing was allocated.
    """
    # torch loads here and not with the module: checking a config must take milliseconds.
    from torch import Tensor

    from optfactory.optimizer import Optimizer2State

    cfg, params = _told_apart(cfg, params, overrides)
    if params is None:
        raise ConfigError(
            "build_optimizer got no parameters; give them as the second argument or as params=, "
            "or use optimizer_factory to give them later"
        )
    values, path = values_of(cfg, overrides)
    config, lr = _checked(values, path), values.get("lr")
    # The config holds its value; the groups hold the tensor, which schedules change in place.
    return Optimizer2State(_plain_params(params), config, lr=lr if isinstance(lr, Tensor) else None)


@overload
def optimizer_factory(
    cfg: Config | None = None, params: None = None, **overrides: Any
) -> Callable[..., Optimizer2State]: ...
@overload
def optimizer_factory(cfg: Config, params: Params, **overrides: Any) -> Optimizer2State: ...
@overload
def optimizer_factory(cfg: Params, *, name: str, **overrides: Any) -> Optimizer2State: ...
@overload
def optimizer_factory(*, params: Params, name: str, **overrides: Any) -> Optimizer2State: ...
def optimizer_factory(
    cfg: Any = None, params: Any = None, **overrides: Any
) -> Callable[..., Optimizer2State] | Optimizer2State:
    """Build an optimizer once its parameters are there: for frameworks that make their own.

    Without parameters it checks the config and returns a function that takes them; with them it
    builds. It is the target of the shipped YAML files, for `hydra.utils.instantiate`, and what
    Hugging Face's Trainer takes: `optimizer_cls_and_kwargs=(optimizer_factory, {"name": "adam"})`.

    >>> import torch
    >>> make = optimizer_factory("adamw8bit", lr=3e-4)
    >>> make(params=torch.nn.Linear(128, 64)).config.name
    'adamw8bit'

    Args:
        cfg: as for `build_optimizer`; without one, the function takes all of it later.
        params: as for `build_optimizer`.
        overrides: hyperparameters that replace those of `cfg`.

    Raises:
        ConfigError: the config or the parameters are refused.
    """
    cfg, params = _told_apart(cfg, params, overrides)
    if params is not None:
        return build_optimizer(cfg, params, **overrides)
    later: Callable[..., Optimizer2State] = optimizer_factory
    if cfg is None:
        if "name" in overrides:
            resolve(**overrides)
        return partial(later, **overrides)
    resolve(cfg, **overrides)
    return partial(later, cfg, **overrides)


def _told_apart(cfg: Any, params: Any, overrides: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config and the parameters, where a single argument stands for either.

    Who knows the config as keywords, as Hydra's partial functions do, gives parameters alone.
    """
    if params is None and "name" in overrides and not _is_config(cfg):
        return None, cfg
    return cfg, params


def _is_config(given: object) -> bool:
    return isinstance(given, (str, Mapping, OptimizerConfig, partial)) or _is_omegaconf(given)


def _is_omegaconf(given: object) -> bool:
    return type(given).__module__.partition(".")[0] == "omegaconf"


def without_omegaconf(given: Any) -> Any:
    """What Hydra wrapped on its way here, in containers of Python.

    Raises:
        ConfigError: it has an interpolation that leads nowhere.
    """
    if not _is_omegaconf(given):
        return given
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {error}") from error


def _plain_params(params: Any) -> Any:
    """Parameters without Hydra's containers, in which (name, tensor) pairs became lists."""
    params = without_omegaconf(params)
    if not isinstance(params, list):
        return params
    return [tuple(entry) if _is_pair(entry) else entry for entry in params]


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def _checked(values: dict[str, Any], path: str) -> OptimizerConfig:
    problem = target_problem(values, path)
    if problem:
        raise ConfigError(problem)
    if "name" not in values:
        keys = sorted(values.keys() - NODE_KEYS)
        raise ConfigError(
            f"the optimizer config has no key 'name'; got the keys {keys}; add e.g. name: adam8bit"
        )
    if not isinstance(values["name"], str):
        raise ConfigError(f"the optimizer's name must be a string, got {values['name']!r}")
    try:
        name = canonical_name(values["name"])
    except UnknownOptimizerError as error:
        raise UnknownOptimizerError(f"{path}.name: {error}") from None
    implied = implied_fields(values["name"], name)
    values["name"] = name
    problem = renamed_problem(values, path)
    if problem:
        raise ConfigError(problem)
    own = implied | {key: value for key, value in values.items() if key not in NODE_KEYS}
    model = get_optimizer_info(name).config_class
    config = validate_with_rules(model, own, path, f"optimizer '{name}'")
    return _without_defaults(config) if MADE_FOR in values else config


def _without_defaults(config: OptimizerConfig) -> OptimizerConfig:
    """The config of a node that lists every default: they do not count as stated.

    So another name that is chosen later has its own, as for a config in which they are left out.
    """
    defaults = get_optimizer_info(config.name).defaults
    stated = {key for key, value in config if key not in defaults or value != defaults[key]}
    return config.model_construct(_fields_set=stated, **dict(config))


def values_of(cfg: object, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A config's plain values, overrides included, and where it stands in the user's config."""
    overrides = {key: without_omegaconf(value) for key, value in given.items()}
    if cfg is None and overrides:
        return overrides, "optimizer"
    if isinstance(cfg, str):
        return {"name": cfg, **overrides}, "optimizer"
    if isinstance(cfg, OptimizerConfig):
        # Without the defaults: another name may be chosen, and has defaults of its own.
        return {**cfg.model_dump(exclude_unset=True), "name": cfg.name, **overrides}, "optimizer"
    if isinstance(cfg, partial) and cfg.func in (build_optimizer, optimizer_factory):
        return values_of(cfg.args[0] if cfg.args else None, {**cfg.keywords, **overrides})
    if _is_omegaconf(cfg):
        return _omegaconf_values(cfg, overrides)
    if isinstance(cfg, Mapping):
        return {
            **{key: without_omegaconf(value) for key, value in cfg.items()},
            **overrides,
        }, "optimizer"
    raise ConfigError(
        "an optimizer config is a name, a mapping, an OmegaConf node or a resolved config, "
        f"got {type(cfg).__name__}"
    )


def _omegaconf_values(cfg: object, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(cfg, DictConfig) or cfg._is_none() or cfg._is_missing():
        raise ConfigError(f"an optimizer config must be a mapping, got {cfg!r}")
    path = str(cfg._get_full_key("name")).removesuffix("name").removesuffix(".") or "optimizer"
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config at '{path}' cannot be resolved: {error}") from error
    merged = {str(key): value for key, value in cast("dict[Any, Any]", values).items()}
    keys = [key.removeprefix(f"{path}.") for key in sorted(OmegaConf.missing_keys(cfg))]
    missing = [
        f"{path}.{key}: a value is missing (???)"
        for key in keys
        if key.partition(".")[0] not in overrides
    ]
    if missing:
        raise config_error("an optimizer", missing)
    return merged | dict(overrides), path
