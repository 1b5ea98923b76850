"""Adds the shipped `optimizer/` config group to the search path of every Hydra app.

The module imports nothing of optfactory: Hydra loads it in every app on the machine.
"""

from __future__ import annotations

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

# The shipped files, and what other packages add (config_source.py).
_PATHS = ("pkg://optfactory.configs", "optfactory://")
_OPT_OUT = "OPTFACTORY_NO_HYDRA_PLUGIN"


class OptfactorySearchPath(SearchPathPlugin):
    """Appends our paths once each; `OPTFACTORY_NO_HYDRA_PLUGIN=1` turns it off."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them behind the app's own, so that the user's files shadow ours."""
        if os.environ.get(_OPT_OUT, "0") not in ("", "0"):
            return
        # Hydra 1.4 finds the plugin twice: as hydra_plugins.optfactory and by its entry point.
        there = {element.path for element in search_path.get_path()}
        for path in _PATHS:
            if path not in there:
                search_path.append(provider="optfactory", path=path)
