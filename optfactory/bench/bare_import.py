"""Importing one module of a package whose own import fails for want of something else."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """A module; where its packages cannot be imported, without running their `__init__`.

    timm needs torchvision, whose wheels fit one torch alone, and its optimizers need neither.

    Raises:
        ImportError: the module itself cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision raises either beside another torch
        try:
            return _without_packages(name)
        except ImportError:
            raise error from None


def _without_packages(name: str) -> ModuleType:
    packages = name.split(".")[:-1]
    before = {key: sys.modules[key] for key in list(sys.modules) if _is_within(key, packages[0])}
    for key in before:
        del sys.modules[key]
    try:
        places = None
        for depth in range(1, len(packages) + 1):
            package = ".".join(packages[:depth])
            spec = importlib.machinery.PathFinder.find_spec(package, places)
            if spec is None or spec.submodule_search_locations is None:
                raise ImportError(f"no package {package}", name=package)
            places = list(spec.submodule_search_locations)
            bare = ModuleType(package)
            bare.__path__ = places
            sys.modules[package] = bare
        return importlib.import_module(name)
    finally:
        # The module stays alive by itself; others must not find packages without their contents.
        for key in [key for key in sys.modules if _is_within(key, packages[0])]:
            del sys.modules[key]
        sys.modules.update(before)


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
