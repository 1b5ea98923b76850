"""Every public name says what it is, with a snippet that runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import Any

import pytest

import optfactory
from optfactory import extend, families, optim

NO_SNIPPET = {"__version__", "Beta", "Betas", "Number"}  # a text, and types of fields
PUBLIC = [
    (module, name)
    for module in (optfactory, optim, extend)
    for name in module.__all__
    if name not in NO_SNIPPET
]
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(optfactory.__path__, "optfactory.")
    if not info.name.startswith(("optfactory._hydra_plugin", "optfactory.build.wheel"))
    and not info.name.endswith("__main__")
)


@pytest.mark.parametrize(
    ("module", "name"), PUBLIC, ids=lambda item: getattr(item, "__name__", item)
)
def test_every_public_name_has_a_snippet(module: Any, name: str) -> None:
    docstring = vars(getattr(module, name)).get("__doc__") or getattr(module, name).__doc__
    assert docstring is not None
    assert ">>> " in docstring


def test_every_module_says_what_it_is_for() -> None:
    for name in MODULES:
        assert (importlib.import_module(name).__doc__ or "").strip(), name


@pytest.mark.parametrize("name", ["optfactory", *MODULES])
def test_the_snippets_of_a_module_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False)
    for test in finder.find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
