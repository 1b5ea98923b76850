"""The config group `optimizer/` inside a user's own Hydra app, from a checkout.

Hydra 1.3 finds plugins in the namespace package `hydra_plugins`, which only an installation has
(tests/packaging tries one). Here a link stands in for it, so that the tests run uninstalled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optfactory import list_optimizers, resolve
from tests.hydra_app import configs, run_app, write_app
from tests.plugin_packages import family_source, install

ROOT = Path(__file__).parents[2]
CHOICE = "defaults: [{optimizer: paged_adam8bit}, _self_]\n"


@pytest.fixture
def environment(tmp_path):
    plugins = tmp_path / "site" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "optfactory").symlink_to(ROOT / "optfactory" / "_hydra_plugin")
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}


@pytest.fixture
def app(tmp_path):
    return write_app(tmp_path / "app", CHOICE)


def expected(name, **overrides):
    return resolve(name, **overrides).model_dump(mode="json")


def test_the_group_is_found_without_any_configuration(app, environment):
    assert configs(run_app(app, **environment)) == [expected("paged_adam8bit")]


def test_name_and_values_are_overridden_on_the_command_line(app, environment):
    run = run_app(app, "optimizer=lamb8bit", "optimizer.lr=3e-4", **environment)
    assert configs(run) == [expected("lamb8bit", lr=3e-4)]


def test_the_config_overrides_values_in_its_own_optimizer_node(tmp_path, environment):
    app = write_app(tmp_path / "app", CHOICE + "peak: 0.1\noptimizer: {lr: '${peak}'}\n")
    assert configs(run_app(app, **environment)) == [expected("paged_adam8bit", lr=0.1)]


def test_the_group_may_be_mounted_elsewhere(tmp_path, environment):
    config = "defaults: [{optimizer@model.optimizer: adam}, _self_]\nnode: model.optimizer\n"
    app = write_app(tmp_path / "app", config)
    run = run_app(app, "optimizer@model.optimizer=adamw32bit", **environment)
    assert configs(run) == [expected("adamw32bit")]

    refused = run_app(app, "model.optimizer.lr=-1", **environment)
    assert refused.returncode == 1
    assert "model.optimizer.lr:" in refused.stderr


def test_multirun_sweeps_over_a_glob_of_names(app, environment):
    run = run_app(app, "-m", "optimizer=glob(*adam*8bit)", **environment)
    assert [config["name"] for config in configs(run)] == list_optimizers("*adam*8bit")


def test_the_users_file_of_the_same_name_shadows_the_shipped_one(app, environment):
    (app / "conf" / "optimizer").mkdir()
    (app / "conf" / "optimizer" / "adam8bit.yaml").write_text("name: adam8bit\nlr: 0.5\n")
    run = run_app(app, "optimizer=adam8bit", **environment)
    assert configs(run) == [expected("adam8bit", lr=0.5)]
    assert configs(run_app(app, **environment)) == [expected("paged_adam8bit")]


def test_an_appended_unknown_key_gets_past_hydra_but_not_past_the_schema(app, environment):
    run = run_app(app, "+optimizer.lrr=3", **environment)
    assert run.returncode == 1
    assert "optimizer.lrr: unknown key; did you mean 'lr'?" in run.stderr


TEMPLATE = """
import warnings

import hydra
import torch

warnings.filterwarnings("ignore", "(?s).*_execution_whitelist_")  # advice of Hydra 1.4


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    model = torch.nn.Linear(96, 64)
    optimizer = hydra.utils.instantiate(cfg.model.optimizer)(params=model.parameters())
    model(torch.ones(2, 96)).sum().backward()
    optimizer.step()
    print("RAN", type(optimizer).__name__, optimizer.param_groups[0]["lr"])


main()
"""


def test_an_app_with_options_of_its_own_can_use_ours_in_the_same_way(tmp_path, environment):
    # As lightning-hydra-template has it: its options are partial functions of torch's classes.
    app = write_app(tmp_path / "app", "defaults: [{optimizer@model.optimizer: mine}, _self_]\n")
    (app / "app.py").write_text(TEMPLATE)
    (app / "conf" / "optimizer").mkdir()
    (app / "conf" / "optimizer" / "mine.yaml").write_text(
        "{_target_: torch.optim.SGD, _partial_: true, lr: 0.5}\n"
    )
    chosen = "optimizer@model.optimizer=glob([adamw?bit,lion8bit,mine])"
    sweep = ("-m", chosen, "hydra.job.chdir=false")
    run = run_app(app, *sweep, "model.optimizer.lr=0.25", **environment)
    assert run.returncode == 0, run.stderr
    ran = [line for line in run.stdout.splitlines() if line.startswith("RAN")]
    ours = [*list_optimizers("adamw?bit"), "lion8bit"]
    assert sorted(ran) == ["RAN Optimizer2State 0.25"] * len(ours) + ["RAN SGD 0.25"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_plugin_can_be_turned_off(app, environment, value):
    run = run_app(app, OPTFACTORY_NO_HYDRA_PLUGIN=value, **environment)
    assert run.returncode == 1
    assert "Could not find 'optimizer/paged_adam8bit'" in run.stderr


@pytest.mark.parametrize("value", ["", "0"])
def test_an_opt_out_that_says_no_leaves_the_plugin_on(app, environment, value):
    run = run_app(app, OPTFACTORY_NO_HYDRA_PLUGIN=value, **environment)
    assert configs(run) == [expected("paged_adam8bit")]


def test_a_checkout_serves_apps_that_name_the_search_path(tmp_path):
    line = "hydra: {searchpath: ['pkg://optfactory.configs']}\n"
    app = write_app(tmp_path / "app", CHOICE + line)
    environment = {"PYTHONPATH": str(ROOT), "OPTFACTORY_NO_HYDRA_PLUGIN": "1"}
    assert configs(run_app(app, **environment)) == [expected("paged_adam8bit")]


def test_the_search_path_may_come_from_the_command_line(app):
    argument = "hydra.searchpath=[pkg://optfactory.configs]"
    run = run_app(app, argument, PYTHONPATH=str(ROOT), OPTFACTORY_NO_HYDRA_PLUGIN="1")
    assert configs(run) == [expected("paged_adam8bit")]


def test_plugin_and_named_search_path_do_not_disturb_each_other(tmp_path, environment):
    line = "hydra: {searchpath: ['pkg://optfactory.configs']}\n"
    app = write_app(tmp_path / "app", CHOICE + line)
    run = run_app(app, "-m", "optimizer=glob(lamb*)", **environment)
    assert [config["name"] for config in configs(run)] == list_optimizers("lamb*")


def test_the_path_is_appended_only_once(app, environment, tmp_path):
    # As Hydra 1.4 does, which also reads the entry point: the plugin runs a second time.
    again = tmp_path / "site" / "hydra_plugins" / "again"
    again.mkdir()
    (again / "__init__.py").write_text(
        "from optfactory._hydra_plugin.searchpath import OptfactorySearchPath\n"
        "class Again(OptfactorySearchPath):\n"
        "    pass\n"
    )
    run = run_app(app, "--info", "searchpath", **environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("pkg://optfactory.configs") == 1
    assert run.stdout.count("optfactory://") == 1


# ---- optimizers of other packages --------------------------------------------------------------


@pytest.fixture
def module(tmp_path):
    """A module with an optimizer where apps can import it; not installed."""
    (tmp_path / "site" / "ball_pkg.py").write_text(family_source("ball", registered=True))


@pytest.fixture
def installed(tmp_path):
    install(tmp_path / "site", "ball_pkg", family_source("ball"), "ball_pkg:BallConfig")


def test_an_installed_packages_optimizer_is_an_option(app, environment, installed):
    run = run_app(app, "optimizer=paged_ball8bit", "optimizer.lr=0.5", **environment)
    (config,) = configs(run)
    assert config["name"] == "paged_ball8bit"
    assert (config["lr"], config["optim_bits"]) == (0.5, 8)


def test_globs_find_the_shipped_names_and_those_of_packages(app, environment, installed):
    run = run_app(app, "-m", "optimizer=glob([*adamw8bit,*ball8bit])", **environment)
    names = {config["name"] for config in configs(run)}
    assert names == {*list_optimizers("*adamw8bit"), "ball8bit", "paged_ball8bit"}


def test_an_optimizer_that_the_app_registers_is_an_option(app, environment, module):
    path = app / "app.py"
    path.write_text("import ball_pkg\n" + path.read_text().replace("import sys", ""))
    path.write_text(
        path.read_text().replace('    assert "torch" not in sys.modules', "    assert 1")
    )
    (config,) = configs(run_app(app, "optimizer=ball", **environment))
    assert config["name"] == "ball"


def test_an_installed_packages_optimizer_can_be_copied_into_an_app(app, environment, installed):
    words = [sys.executable, "-m", "optfactory", "copy", "ball8bit", "conf/optimizer"]
    subprocess.run(words, cwd=app, env=os.environ | environment, check=True)
    path = app / "conf" / "optimizer" / "ball8bit.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.125"))
    (config,) = configs(run_app(app, "optimizer=ball8bit", **environment))
    assert (config["name"], config["lr"]) == ("ball8bit", 0.125)


def test_an_option_that_nobody_has_is_refused_with_those_that_there_are(
    app, environment, installed
):
    run = run_app(app, "optimizer=ball12bit", **environment)
    assert run.returncode == 1
    assert "paged_ball8bit" in run.stderr
    assert "paged_adamw8bit" in run.stderr


def test_apps_that_do_not_ask_for_a_packages_optimizer_load_nothing_of_ours(
    app, environment, installed
):
    path = app / "app.py"
    composed = "def main(cfg: DictConfig) -> None:\n"
    unasked = '    assert "optfactory.registry" not in sys.modules\n'
    path.write_text(path.read_text().replace(composed, composed + unasked))
    assert configs(run_app(app, **environment)) == [expected("paged_adam8bit")]
