"""Offers the optimizers of other packages, and registered ones, as Hydra options `optimizer=...`.

They have no YAML file in a package's folder; it is rendered when an app asks for one. Nothing of
optfactory is imported before that, and nothing in an environment where no package adds optimizers.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

_GROUP = "optimizer"


class OptfactoryConfigSource(ConfigSource):
    """The source `optfactory://`: the group `optimizer`, without the names that are shipped."""

    @staticmethod
    def scheme() -> str:
        return "optfactory"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", _GROUP)

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return group == _GROUP and name in _names()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return _names() if config_path == _GROUP and results_filter != ObjectType.GROUP else []

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        from optfactory.catalog.files import shipped_text

        _, text = shipped_text(config_path.removesuffix(".yaml").rpartition("/")[2])
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.create(text),
            header=self._get_header_dict(text),
        )


def _names() -> list[str]:
    # Whoever registered an optimizer has imported this module.
    if "optfactory.families" not in sys.modules and not entry_points(group="optfactory.optimizers"):
        return []
    from optfactory.catalog.files import config_folder
    from optfactory.registry import list_optimizers

    shipped = {path.stem for path in config_folder().glob("*.yaml")}
    return [name for name in list_optimizers() if name not in shipped]
