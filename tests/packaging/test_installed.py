"""optfactory as a user has it: installed in a clean environment, far from the checkout."""

import json
import os

import pytest

from optfactory import __version__, list_optimizers, resolve
from tests.hydra_app import results, run_app, write_app

pytestmark = pytest.mark.slow

CHOICE = "defaults: [{optimizer: paged_adam8bit}, _self_]\nbuild: true\n"
SEARCH_PATH = "hydra: {searchpath: ['pkg://optfactory.configs']}\n"


def one_result(app, installation, *arguments, **environment):
    run = run_app(app, *arguments, python=installation.python, **environment)
    return results(run)[0]


def expect_trained(result, name, **overrides):
    assert result["config"] == resolve(name, **overrides).model_dump(mode="json")
    assert result["changed"]
    assert "exp_avg_q8" in result["state"]


def test_the_command_is_on_the_path(installation, tmp_path):
    assert (
        installation.run("optfactory", "--version", cwd=tmp_path) == f"optfactory {__version__}\n"
    )
    rows = json.loads(installation.run("optfactory", "list", "--json", cwd=tmp_path))
    assert [row["name"] for row in rows] == list_optimizers()


def test_the_shipped_configs_are_those_of_the_schemas(installation, tmp_path):
    assert "up to date" in installation.run("optfactory", "configs", "--check", cwd=tmp_path)


def test_a_hydra_app_finds_the_names_by_itself_and_trains(installation, tmp_path):
    app = write_app(tmp_path / "app", CHOICE)
    expect_trained(one_result(app, installation), "paged_adam8bit")
    result = one_result(app, installation, "optimizer=lamb8bit", "optimizer.lr=3e-4")
    expect_trained(result, "lamb8bit", lr=3e-4)


def test_a_hydra_app_may_name_the_search_path(installation, tmp_path):
    app = write_app(tmp_path / "app", CHOICE + SEARCH_PATH)
    result = one_result(app, installation, OPTFACTORY_NO_HYDRA_PLUGIN="1")
    expect_trained(result, "paged_adam8bit")


def test_it_runs_outside_of_the_checkout(installation, tmp_path):
    code = "import optfactory, sys; print(optfactory.__file__); print(sys.prefix)"
    file, prefix = installation.run("python", "-c", code, cwd=tmp_path).split()
    assert prefix == str(installation.folder)
    assert os.path.isfile(file)
    is_wheel = (
        "optfactory" in {path.name for path in installation.site_packages.iterdir()}
        and (installation.site_packages / "optfactory" / "__init__.py").is_file()
    )
    assert is_wheel == file.startswith(prefix)
