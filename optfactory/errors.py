"""The exceptions optfactory raises, drawn as one tree.

OptFactoryError
├── ConfigError (ValueError)          a hyperparameter, name or parameter list is refused
│   └── UnknownOptimizerError         no optimizer of that name
├── KernelCompileError (RuntimeError) the system compiler refused a kernel
└── StateError (ValueError)           a checkpoint does not fit this optimizer
"""

from __future__ import annotations


class OptFactoryError(Exception):
    """Base class of every error raised by optfactory itself."""


class ConfigError(OptFactoryError, ValueError):
    """A configuration or parameter list was refused before anything was allocated."""


class UnknownOptimizerError(ConfigError):
    """The requested optimizer name does not exist."""


class KernelCompileError(OptFactoryError, RuntimeError):
    """A native kernel could not be compiled."""


class StateError(OptFactoryError, ValueError):
    """A checkpoint does not match the optimizer it is loaded into."""
