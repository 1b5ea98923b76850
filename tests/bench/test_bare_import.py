"""Peers whose package cannot be imported whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optfactory.bench.bare_import import import_module


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose `__init__` asks for what is not there; modules of it do without."""
    folder = tmp_path / "partly_broken" / "optim"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("import not_there_at_all\n")
    (folder / "__init__.py").write_text("from partly_broken import layers\n")
    (folder / "types.py").write_text("KIND = 'kind'\n")
    (folder / "lamb.py").write_text("from .types import KIND\nclass Lamb: kind = KIND\n")
    (folder / "other.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_module_is_imported_without_its_broken_packages(package: Path) -> None:
    assert import_module("partly_broken.optim.lamb").Lamb.kind == "kind"
    assert not [name for name in sys.modules if name.startswith("partly_broken")]


def test_the_first_error_is_raised_where_the_module_is_broken_too(package: Path) -> None:
    with pytest.raises(ImportError, match="not_there_at_all"):
        import_module("partly_broken.optim.other")
    assert not [name for name in sys.modules if name.startswith("partly_broken")]


def test_what_can_be_imported_is_imported_as_ever() -> None:
    assert import_module("json.decoder") is sys.modules["json.decoder"]
