"""A model from the command line's "package.module:factory", without memory for its tensors."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optfactory.errors import ConfigError, a_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(text: str, dtype: str | None = None) -> nn.Module:
    """Call a factory without arguments on the meta device, where tensors have only a shape.

    Args:
        text: ``package.module:factory``; modules are also looked for in the current folder. The
            factory is a function or a class that returns a Module, or is one.
        dtype: convert its floating-point parameters to this.

    Raises:
        ConfigError: there is no such factory, or it fails, or returns something else.
    """
    name, _, attribute = text.partition(":")
    if not (name and attribute):
        raise ConfigError(f"--model is package.module:factory, got {text!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    # A user's module may raise anything while it is loaded, and may even leave.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--model {text!r} cannot be loaded: {_told(error)}") from error
    model = factory if isinstance(factory, nn.Module) else _call(factory, text)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {text!r} returned {a_type(model)}, not a Module")
    return model.to(DTYPES[dtype]) if dtype else model


def _call(factory: object, text: str) -> object:
    if not callable(factory):
        raise ConfigError(f"--model {text!r} is {a_type(factory)}, not a function")
    try:
        with torch.device("meta"), _WithoutInitialization():
            return factory()
    # Whatever a user's code raises: it ran in a way that it was perhaps not written for.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--model {text!r} failed on the meta device, where tensors have no data: "
            f"{_told(error)}; write a function without arguments that builds the "
            "bare model, or call optfactory.plan(cfg, model) or optfactory.explain(cfg, model) "
            "from Python"
        ) from error


def _told(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class _WithoutInitialization(TorchFunctionMode):
    """Leaves out the random numbers that tensors without data would be filled with.

    On the meta device they mean nothing, but torch would load its compiler for them: a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if name in ("normal_", "uniform_") and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)
