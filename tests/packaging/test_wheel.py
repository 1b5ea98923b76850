"""What is in the wheel."""

import zipfile
from email.parser import Parser

import pytest

import optfactory
from optfactory import list_optimizers
from tests.packaging.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archive(wheel):
    with zipfile.ZipFile(wheel) as opened:
        yield opened


@pytest.fixture(scope="module")
def names(archive):
    return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(archive, names):
    path = next(name for name in names if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(path).decode())


def sources(folder):
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_holds_the_package_the_configs_the_kernels_the_plugin_and_nothing_else(names):
    plugin = sources("optfactory/_hydra_plugin")
    expected = {f"optfactory/{name}" for name in sources("optfactory")}
    expected |= {f"optfactory/configs/{name}" for name in sources("configs")}
    expected |= {f"optfactory/kernels/{name}" for name in sources("kernels")}
    expected |= {f"hydra_plugins/optfactory/{name}" for name in plugin}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_what_must_not_be_forgotten_is_there(names):
    assert {f"optfactory/configs/optimizer/{name}.yaml" for name in list_optimizers()} <= names
    assert "optfactory/py.typed" in names
    assert "optfactory/configs/__init__.py" in names  # Hydra calls the folder unavailable without
    assert any(name.startswith("optfactory/kernels/rules/") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_shared_namespaces_are_left_open(names):
    # An __init__ here would hide other projects' Hydra plugins, or the package `kernels`.
    assert "hydra_plugins/__init__.py" not in names
    assert "optfactory/kernels/__init__.py" not in names


def test_the_metadata(metadata):
    assert metadata["Name"] == "optfactory"
    assert metadata["Version"] == optfactory.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {
        "bench",
        *("cuda12", "cuda13", "dev", "docs", "examples", "test"),
    }


def test_cupy_is_only_an_extra(metadata):
    cupy = [text for text in metadata.get_all("Requires-Dist") if text.startswith("cupy")]
    assert {text.split(">")[0] for text in cupy} == {"cupy-cuda12x", "cupy-cuda13x"}
    assert all("extra ==" in text for text in cupy)


def test_the_entry_points(archive, names):
    path = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
    text = archive.read(path).decode()
    assert "optfactory = optfactory.cli:main" in text
    assert "optfactory = optfactory._hydra_plugin.searchpath:OptfactorySearchPath" in text
    assert "optfactory_packages = optfactory._hydra_plugin.config_source:Optfactory" in text
