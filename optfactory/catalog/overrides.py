"""From the words of a command line to a config: a name or a YAML file, and Hydra's overrides.

The overrides are read by Hydra's own parser, so that `betas=[0.9,0.95]` and `~key` mean what they
mean in a Hydra app. Struct mode is left out: an unknown key reaches the schema, whose error says
what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optfactory.config.hydra_keys import MADE_FOR
from optfactory.errors import ConfigError, OptFactoryError
from optfactory.registry import canonical_name, get_optimizer_info, implied_fields

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


_NODE = "optimizer"  # the key of an app's config


class UsageError(OptFactoryError):
    """The command line itself is wrong, not the config that it names."""


@dataclass(frozen=True)
class Source:
    """What a command line names, and which part of it says what.

    Attributes:
        text: as it was written.
        kind: ``name``, ``file`` or ``composition`` (Hydra's, of a defaults list).
        node: the optimizer node with the overrides applied; not yet validated.
        implied: what the spelling of a name says beside it.
        overridden: the keys of the node that the overrides set, dotted where they are nested.
        app: the app's whole config, if it is one.
    """

    text: str
    kind: str
    node: dict[str, Any] | DictConfig
    implied: Mapping[str, Any] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    app: DictConfig | None = None


def read_config(source: str, overrides: Sequence[str] = ()) -> dict[str, Any] | DictConfig:
    """The optimizer node that `source` names, with the overrides applied; see `read_source`."""
    return read_source(source, overrides).node


def read_source(source: str, overrides: Sequence[str] = ()) -> Source:
    """The optimizer node that `source` names, with the overrides applied, and what says what.

    Args:
        source: an optimizer name or alias, or a YAML file: the optimizer node itself, or an app's
            config with the key `optimizer`. An app's config with a defaults list is composed by
            Hydra.
        overrides: `key=value`, `+key=value` or `~key`, from the root of what `source` names.

    Raises:
        UsageError: no such file, or an override that cannot be read.
        ConfigError: a name that does not exist, or a file that is not such a config.
    """
    if _is_file_name(source):
        return _from_file(source, overrides)
    name = canonical_name(source)
    implied = implied_fields(source, name)
    if not overrides:
        return Source(source, "name", {"name": name, **implied}, implied)
    _require_hydra()
    from omegaconf import OmegaConf

    # All keys, as in the shipped YAML: there `~lr` removes a key that exists.
    info = get_optimizer_info(name)
    values = info.config_class(name=name).model_dump(mode="json")
    node = _apply(OmegaConf.create({MADE_FOR: name, **values, **implied}), overrides)
    return Source(source, "name", node, implied, _overridden(overrides))


def _is_file_name(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or "\\" in source


def _from_file(source: str, overrides: Sequence[str]) -> Source:
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    _require_hydra()
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} must hold a mapping, got {type(config).__name__}")
    is_composed = "defaults" in config
    config = _compose(path, overrides) if is_composed else _apply(config, overrides)
    if not is_composed and _NODE not in config:
        return Source(source, "file", config, overridden=_overridden(overrides))
    return Source(
        source,
        "composition" if is_composed else "file",
        _optimizer_node(config, path),
        overridden=_overridden(overrides, _NODE),
        app=config,
    )


def _overridden(overrides: Sequence[str], node: str = "") -> frozenset[str]:
    """The keys that overrides set in a node of the config; all are without a node."""
    keys: set[str] = set()
    for override in _parse(overrides):
        key = override.key_or_group.replace("/", ".")
        if override.is_delete():
            continue
        if node and key == node:  # another choice of the group, or a mapping
            value = override.value()
            keys |= set(map(str, value)) if isinstance(value, dict) else {"name"}
        elif not node or key.startswith(f"{node}."):
            keys.add(key.removeprefix(f"{node}.") if node else key)
    return frozenset(keys)


def _optimizer_node(config: DictConfig, path: Path) -> DictConfig:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = config.get(_NODE)
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: the key 'optimizer' cannot be resolved: {why}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path} must have a mapping under the key 'optimizer', got {node!r}")
    return node


def _compose(path: Path, overrides: Sequence[str]) -> DictConfig:
    """Compose an app's config as the app itself would."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    parsed = _parse(overrides)
    try:
        with initialize_config_dir(config_dir=str(path.resolve().parent), version_base=None):
            return compose(path.stem, [_without_struct_mode(item) for item in parsed])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"Hydra cannot compose {path}: {error}") from error


def _without_struct_mode(override: Override) -> str:
    # `++` sets a key whether it exists or not; a choice of a config group has no dot and stays.
    line = str(override.input_line)
    plain_value = "." in override.key_or_group and not override.is_delete()
    return f"++{line.lstrip('+')}" if plain_value else line


def _apply(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in _parse(overrides):
        key = override.key_or_group
        if override.package is not None:
            raise UsageError(f"'{override.input_line}' chooses a group; give key=value")
        try:
            if override.is_delete():
                _delete(config, key, override)
            else:
                OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"cannot apply '{override.input_line}': {error}") from error
    return config


def _delete(config: DictConfig, key: str, override: Override) -> None:
    """Remove a key, which may be nested; `~key=value` only if it has that value."""
    from omegaconf import DictConfig, OmegaConf

    parent_key, _, last = key.rpartition(".")
    parent = OmegaConf.select(config, parent_key) if parent_key else config
    if not isinstance(parent, DictConfig) or last not in parent:
        raise ConfigError(f"cannot apply '{override.input_line}': there is no key '{key}'")
    if override.value() is not None and override.value() != parent[last]:
        raise ConfigError(f"cannot apply '{override.input_line}': '{key}' is {parent[last]!r}")
    del parent[last]


def _parse(overrides: Sequence[str]) -> list[Override]:
    if not overrides:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(f"cannot read the overrides: {error}") from error
    for override in parsed:
        if override.is_sweep_override():
            raise UsageError(
                f"'{override.input_line}' is a sweep; give one value, or quote a text with commas"
            )
    return parsed


def _require_hydra() -> None:
    try:
        import hydra  # noqa: F401 - only whether it is there
        import omegaconf  # noqa: F401
    except ImportError as error:
        raise OptFactoryError(
            f"files and overrides need Hydra and OmegaConf ({error}); "
            "run: pip install 'hydra-core>=1.3,<1.5' 'omegaconf>=2.3,<2.5'"
        ) from error
