"""The exceptions optfactory raises, drawn as one tree.

OptFactoryError
├── ConfigError (ValueError)          a hyperparameter, name or parameter list is refused
│   └── UnknownOptimizerError         no optimizer of that name
├── BackendError (RuntimeError)       a device's backend cannot run on this machine
├── KernelCompileError (RuntimeError) the compiler refused a kernel
│   ├── NoCompilerError               a kernel must be compiled, and there is no compiler
│   └── BrokenCompilerError           there is one, and nothing that it builds can be used
└── StateError (ValueError)           a checkpoint does not fit this optimizer
"""

from __future__ import annotations

from collections.abc import Sequence


class OptFactoryError(Exception):
    """Base class of every error raised by optfactory itself."""


class ConfigError(OptFactoryError, ValueError):
    """A configuration or parameter list was refused before anything was allocated.

    Attributes:
        problems: every single problem, where the message lists several.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class UnknownOptimizerError(ConfigError):
    """The requested optimizer name does not exist."""


class BackendError(OptFactoryError, RuntimeError):
    """The backend of a device cannot run on this machine: something is missing or does not fit.

    The message names the cause and the command that removes it.
    """


class KernelCompileError(OptFactoryError, RuntimeError):
    """A native kernel could not be compiled."""


class NoCompilerError(KernelCompileError):
    """A kernel is not among the prebuilt ones, and no C++ compiler was found."""


class BrokenCompilerError(KernelCompileError):
    """A kernel is not among the prebuilt ones, and the C++ compiler builds nothing that runs."""


class StateError(OptFactoryError, ValueError):
    """A checkpoint does not match the optimizer it is loaded into."""


def a_type(value: object) -> str:
    """The type of a value, in a message.

    >>> a_type(3), a_type([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"
