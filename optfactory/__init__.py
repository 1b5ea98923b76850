"""optfactory: choose a PyTorch optimizer, and how many bits its state takes, by a name.

>>> import optfactory
>>> optfactory.resolve("adam8bit", lr="3e-4").lr
0.0003
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optfactory.rules.resources import alias_configs

if TYPE_CHECKING:
    from optfactory import optim
    from optfactory.checkpoints.files import load_checkpoint, save_checkpoint
    from optfactory.config.ready_rules import list_rules, ready_rules
    from optfactory.config.schema import OptimizerConfig
    from optfactory.explaining.explanation import explain
    from optfactory.factory import build_optimizer, optimizer_factory, resolve
    from optfactory.optimizer import Optimizer2State
    from optfactory.planning.memory_plan import plan
    from optfactory.registry import OptimizerInfo, get_optimizer_info, list_optimizers

__version__ = "0.1.0"

__all__ = [
    "Optimizer2State",
    "OptimizerConfig",
    "OptimizerInfo",
    "__version__",
    "build_optimizer",
    "explain",
    "get_optimizer_info",
    "list_optimizers",
    "list_rules",
    "load_checkpoint",
    "optim",
    "optimizer_factory",
    "plan",
    "ready_rules",
    "resolve",
    "save_checkpoint",
]

# Hydra imports this package at every start to look for its search path, whatever the app. Names
# load on first use (PEP 562), so that an app that never builds an optimizer never pays for torch.
_HOME = {
    "Optimizer2State": "optimizer",
    "OptimizerConfig": "config.schema",
    "OptimizerInfo": "registry",
    "build_optimizer": "factory",
    "explain": "explaining.explanation",
    "get_optimizer_info": "registry",
    "list_optimizers": "registry",
    "list_rules": "config.ready_rules",
    "load_checkpoint": "checkpoints.files",
    "optimizer_factory": "factory",
    "plan": "planning.memory_plan",
    "ready_rules": "config.ready_rules",
    "resolve": "factory",
    "save_checkpoint": "checkpoints.files",
}

alias_configs()


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("optfactory.optim")
    if name not in _HOME:
        raise AttributeError(f"module 'optfactory' has no attribute '{name}'")
    value = getattr(import_module(f"optfactory.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
