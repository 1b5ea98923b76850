"""From a config to an optimizer: `resolve` checks, `build_optimizer` builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from optfactory.config.schema import OptimizerConfig
from optfactory.config.validation import config_error, validate
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.registry import canonical_name, get_optimizer_info

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from optfactory.groups.parameters import Params
    from optfactory.optimizer import Optimizer2State

# Keys with which Hydra's `instantiate` addresses a node; they configure Hydra, not the optimizer.
_INSTANTIATE_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}


def resolve(
    cfg: str | Mapping[str, Any] | DictConfig | OptimizerConfig, /, **overrides: Any
) -> OptimizerConfig:
    """Check a configuration and return it as a frozen model.

    >>> config = resolve({"name": "paged_adamw_8bit", "lr": "3e-4"})
    >>> config.name, config.lr, config.optim_bits, config.is_paged
    ('paged_adamw8bit', 0.0003, 8, True)

    Args:
        cfg: an optimizer name or alias, a mapping with the key `name`, a Hydra/OmegaConf node, or
            a config that was already resolved.
        overrides: hyperparameters that replace those of `cfg`.

    Raises:
        UnknownOptimizerError: no optimizer of that name.
        ConfigError: lists every problem with its dotted path.
    """
    values, path = _values(cfg, overrides)
    values = {key: value for key, value in values.items() if key not in _INSTANTIATE_KEYS}
    if "name" not in values:
        raise ConfigError(
            f"the optimizer config has no key 'name'; got the keys {sorted(values)}; "
            "add e.g. name: adam8bit"
        )
    if not isinstance(values["name"], str):
        raise ConfigError(f"the optimizer's name must be a string, got {values['name']!r}")
    try:
        name = values["name"] = canonical_name(values["name"])
    except UnknownOptimizerError as error:
        raise UnknownOptimizerError(f"{path}.name: {error}") from None
    return validate(get_optimizer_info(name).config_class, values, path, f"optimizer '{name}'")


def build_optimizer(
    cfg: str | Mapping[str, Any] | DictConfig | OptimizerConfig, params: Params, /, **overrides: Any
) -> Optimizer2State:
    """Build the optimizer that a config names, after checking all of it.

    >>> import torch
    >>> model = torch.nn.Linear(128, 64)
    >>> rules = {"no_decay": {"ndim": 1, "weight_decay": 0.0}}
    >>> optimizer = build_optimizer("adamw8bit", model, lr=3e-4, param_groups=rules)
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('default', 0.01), ('no_decay', 0.0)]

    Args:
        cfg: as for `resolve`.
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

    config = resolve(cfg, **overrides)
    lr = overrides.get("lr", cfg.get("lr") if isinstance(cfg, Mapping) else None)
    # The config holds its value; the groups hold the tensor, which schedules change in place.
    return Optimizer2State(params, config, lr=lr if isinstance(lr, Tensor) else None)


def _values(cfg: object, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A config's plain values, overrides included, and where it stands in the user's config."""
    if isinstance(cfg, str):
        return {"name": cfg, **overrides}, "optimizer"
    if isinstance(cfg, OptimizerConfig):
        # Without the defaults: another name may be chosen, and has defaults of its own.
        return {**cfg.model_dump(exclude_unset=True), "name": cfg.name, **overrides}, "optimizer"
    if type(cfg).__module__.partition(".")[0] == "omegaconf":
        return _omegaconf_values(cfg, overrides)
    if isinstance(cfg, Mapping):
        return {**cfg, **overrides}, "optimizer"
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
