"""Where the shipped folders `configs/` and `kernels/` lie.

A wheel holds them inside the package. In a checkout and in an editable install they lie beside it;
there the module name `optfactory.configs` is an alias for the folder, so that Hydra's
`pkg://optfactory.configs` means the same everywhere and edits of a YAML are live.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Literal

from optfactory.errors import OptFactoryError

_PACKAGE = Path(__file__).resolve().parents[1]
_CONFIGS_MODULE = "optfactory.configs"


def data_dir(kind: Literal["configs", "kernels"]) -> Path:
    """Return the folder of the shipped configs or kernels, as real files.

    Raises:
        OptFactoryError: the installation has no such folder.
    """
    installed = _PACKAGE / kind
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # The project file tells a checkout from site-packages, where such a folder is a stranger's.
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    raise OptFactoryError(
        f"optfactory's folder {kind!r} is missing: looked in {installed} and {checkout / kind}. "
        "Reinstall optfactory with pip."
    )


def alias_configs() -> None:
    """Make `optfactory.configs` importable where the import system would not find it."""
    if _CONFIGS_MODULE in sys.modules or (_PACKAGE / "configs").is_dir():
        return
    init = _PACKAGE.parent / "configs" / "__init__.py"
    if not init.is_file():
        return
    spec = importlib.util.spec_from_file_location(
        _CONFIGS_MODULE, init, submodule_search_locations=[str(init.parent)]
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[_CONFIGS_MODULE] = module
    spec.loader.exec_module(module)
