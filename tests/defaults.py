"""Runs what an optimizer does under a program's default dtype or device, which must change nothing.

OPTFACTORY_TEST_DEFAULT (bfloat16, float16, float64 or meta) does so for a whole run of the tests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from optfactory import Optimizer2State

DEFAULTS = ("bfloat16", "float16", "float64", "meta")
_METHODS = (
    *("_update", "init_states", "load_state_dict", "export_state_dict", "memory_report"),
    *("__getstate__", "__setstate__"),
)


@contextmanager
def default(name: str) -> Iterator[None]:
    """A default dtype by its name, or the default device "meta"."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def patch_optimizer(patch: pytest.MonkeyPatch) -> None:
    """Let all that the optimizer does by itself happen under the chosen default, if any."""
    chosen = os.environ.get("OPTFACTORY_TEST_DEFAULT")
    for name in _METHODS if chosen else ():
        method = getattr(Optimizer2State, name)

        @functools.wraps(method)
        def under_default(*args: object, _method: object = method, **kwargs: object) -> object:
            with default(chosen):
                return _method(*args, **kwargs)

        patch.setattr(Optimizer2State, name, under_default)
