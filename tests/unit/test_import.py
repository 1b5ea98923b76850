"""What importing optfactory loads, and where it finds its files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import optfactory
from optfactory.errors import OptFactoryError
from optfactory.rules.resources import data_dir

ROOT = Path(__file__).parents[2]


def loaded_by(code):
    """Top-level packages that a fresh interpreter has loaded after running `code`."""
    report = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(run.stdout))


def test_the_package_itself_loads_no_dependency():
    heavy = {"torch", "cupy", "numpy", "pydantic", "hydra", "omegaconf", "yaml"}
    loaded = loaded_by("import optfactory")
    assert "optfactory" in loaded
    assert not heavy & loaded


@pytest.mark.parametrize(
    "code",
    [
        "import optfactory; optfactory.resolve('paged_lamb8bit', lr='1e-3')",
        "from optfactory import list_optimizers; list_optimizers()",
        "from optfactory import get_optimizer_info; get_optimizer_info('adamw_bnb_8bit')",
        "from optfactory.cli import main; main(['show', 'adam8bit', 'lr=3e-4'])",
        "from optfactory.catalog import files; files.expected_files()",
    ],
)
def test_configs_are_checked_without_torch(code):
    quiet = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}"
    assert not {"torch", "cupy", "numpy"} & loaded_by(quiet)


def test_listing_loads_neither_hydra_nor_omegaconf():
    code = "from optfactory.registry import list_optimizers; list_optimizers(); "
    assert not {"hydra", "omegaconf"} & loaded_by(code + "import optfactory.cli")


def test_every_public_name_is_there():
    for name in optfactory.__all__:
        assert getattr(optfactory, name) is not None
    assert set(optfactory.__all__) <= set(dir(optfactory))


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="make_optimiser"):
        optfactory.make_optimiser  # noqa: B018


@pytest.mark.parametrize("kind", ["configs", "kernels"])
def test_the_shipped_folders_are_found_as_files(kind):
    assert any(path.is_file() for path in data_dir(kind).rglob("*"))


def test_a_missing_folder_is_named_with_the_places_searched(monkeypatch, tmp_path):
    monkeypatch.setattr("optfactory.rules.resources._PACKAGE", tmp_path / "optfactory")
    with pytest.raises(OptFactoryError, match=r"'kernels' is missing: looked in .*Reinstall"):
        data_dir("kernels")


def test_a_strangers_folder_beside_an_installed_package_is_not_taken(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()  # as in site-packages, where `kernels` is another project's
    monkeypatch.setattr("optfactory.rules.resources._PACKAGE", tmp_path / "optfactory")
    with pytest.raises(OptFactoryError, match="missing"):
        data_dir("kernels")


def test_the_configs_are_importable_as_hydra_needs_them():
    code = "from importlib.resources import files; import sys;"
    code += "sys.exit(not (files('optfactory.configs') / 'optimizer' / 'adam.yaml').is_file())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
