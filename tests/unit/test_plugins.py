"""Packages that add optimizers by an entry point: installed, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import NAMES, PER_FAMILY
from tests.plugin_packages import family_source, install

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "examples" / "custom_optimizer.py").read_text(encoding="utf-8")


class Site:
    """A folder with installed packages, and programs that see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, source: str, *values: str) -> None:
        install(self.folder, name, source, *values)

    def run(self, code: str, *options: str) -> tuple[str, str]:
        """What a program prints, and what it warns of."""
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def warnings_in(stderr: str) -> list[str]:
    return re.findall(r"UserWarning: (.*)", stderr)


# ---- a package that works ------------------------------------------------------------------

USE = "from optfactory import resolve; print(resolve('paged_yogi8bit').optim_bits)"


@pytest.mark.parametrize(
    "first",
    [
        "from optfactory import build_optimizer",
        "import optfactory.registry",
        "from optfactory.registry import canonical_name",
        "import optfactory.registry as r; hasattr(r, '__path__'); hasattr(r, '__wrapped__')",
        "import yogi_pkg",
        "from optfactory.extend import register",
        "import optfactory.factory, yogi_pkg",
        "from optfactory.cli import main; main(['list'])",
    ],
)
def test_the_documented_example_works_in_every_order_of_imports(site: Site, first: str) -> None:
    site.install("yogi_pkg", EXAMPLE, "yogi_pkg:YogiConfig")
    out, err = site.run(f"{first}\n{USE}", "-W", "error")
    assert out.splitlines()[-1] == "8"
    assert not err


def test_importing_optfactory_loads_no_plugin(site: Site) -> None:
    site.install("yogi_pkg", EXAMPLE, "yogi_pkg:YogiConfig")
    code = "import optfactory, optfactory.registry, optfactory.factory, sys\n"
    out, _ = site.run(code + "print('yogi_pkg' in sys.modules)")
    assert out == "False\n"


def test_a_config_is_unpickled_by_a_process_that_did_nothing_else(site: Site) -> None:
    site.install("yogi_pkg", EXAMPLE, "yogi_pkg:YogiConfig")
    dump = "import pickle, optfactory; config = optfactory.resolve('yogi8bit', lr=0.5)\n"
    out, _ = site.run(dump + "print(pickle.dumps(config).hex())")
    load = f"import pickle; print(repr(pickle.loads(bytes.fromhex('{out.strip()}'))))"
    assert "name='yogi8bit' lr=0.5" in site.run(load, "-W", "error")[0].replace(", ", " ")


@pytest.mark.parametrize("registered", [False, True])
def test_a_module_may_use_optimizers_while_it_is_imported(site: Site, registered: bool) -> None:
    source = "from optfactory import resolve\nresolve('adam')\n" + family_source(
        "ball", registered=registered
    )
    site.install("ball_pkg", source, "ball_pkg:BallConfig")
    use = "from optfactory import resolve; print(resolve('ball8bit').name)"
    for first in ("", "import ball_pkg\n", "import optfactory.registry, ball_pkg\n"):
        assert site.run(first + use, "-W", "error")[0] == "ball8bit\n"


def test_a_module_may_use_its_own_optimizer_while_it_is_imported(site: Site) -> None:
    source = (
        family_source("ball", registered=True)
        + "\nimport optfactory\noptfactory.resolve('ball8bit')\n"
    )
    site.install("ball_pkg", source, "ball_pkg:BallConfig")
    use = "from optfactory import resolve; print(resolve('ball').name)"
    for first in ("", "import ball_pkg\n"):
        assert site.run(first + use, "-W", "error")[0] == "ball\n"


def test_one_module_may_add_several_families(site: Site) -> None:
    source = family_source("ball", registered=True) + family_source("cube", registered=True)
    site.install("two_pkg", source, "two_pkg:BallConfig", "two_pkg:CubeConfig")
    use = "from optfactory import list_optimizers; print(len(list_optimizers()))"
    assert site.run(use, "-W", "error")[0] == f"{len(NAMES) + 2 * PER_FAMILY}\n"


# ---- packages that do not work -------------------------------------------------------------

BROKEN = {
    "import a_module_that_is_not_there": "ModuleNotFoundError: No module named 'a_module_that",
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit('stopped')": "SystemExit: stopped",
    "def": "SyntaxError: ",
    "": "AttributeError: module 'bad_pkg' has no attribute 'BadConfig'",
    "BadConfig = 3": "ConfigError: a family is a subclass of OptimizerConfig, got 3",
    family_source("x8bit").replace(
        "X8BitConfig", "BadConfig"
    ): "ConfigError: BadConfig.family is 'x8bit'",
    family_source("bad").replace(
        "u = m", "u = n"
    ): "ConfigError: <rule text of rule>:1: 'n' is unknown",
    family_source("bad", registered=True) + "1 / 0": "ZeroDivisionError: division by zero",
}
KEEPS_ON = """
import sys
import torch
from optfactory import build_optimizer, list_optimizers
for _ in range(2):
    build_optimizer("adam", torch.nn.Linear(2, 2)).init_states()
    print(len(list_optimizers()))
"""


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_package_is_left_out_with_one_warning(site: Site, source: str) -> None:
    site.install("bad_pkg", source, "bad_pkg:BadConfig")
    site.install("ball_pkg", family_source("ball"), "ball_pkg:BallConfig")
    out, err = site.run(KEEPS_ON, "-W", "always")
    assert out == f"{len(NAMES) + PER_FAMILY}\n" * 2
    (warning,) = warnings_in(err)
    assert warning.startswith(
        "optimizers are left out of the package 'bad_pkg 1.5' (entry point 'bad_pkg:BadConfig'): "
        + BROKEN[source]
    )
    assert warning.endswith("update or uninstall the package")


def test_a_name_that_is_missing_says_what_was_left_out(site: Site) -> None:
    site.install("bad_pkg", "import nothing_there", "bad_pkg:BadConfig")
    code = "import optfactory\ntry: optfactory.resolve('bad8bit')\nexcept ValueError as e: print(e)"
    out, _ = site.run(code)
    assert "unknown optimizer 'bad8bit'" in out
    assert "Left out: the package 'bad_pkg 1.5'" in out
    assert "No module named 'nothing_there'" in out


def test_a_malformed_entry_point_is_left_out(site: Site) -> None:
    site.install("bad_pkg", "", "not a place!")
    out, err = site.run(KEEPS_ON)
    assert out == f"{len(NAMES)}\n" * 2
    assert "the package 'bad_pkg 1.5'" in warnings_in(err)[0]


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("family", ["adam", "adam_w"])
def test_a_family_of_ours_stays_ours(site: Site, family: str, registered: bool) -> None:
    cls = f"{family.title()}Config"
    site.install("bad_pkg", family_source(family, registered=registered), f"bad_pkg:{cls}")
    out, err = site.run(KEEPS_ON)
    assert out == f"{len(NAMES)}\n" * 2
    assert re.search(rf"bad_pkg.*'{family}' .*optfactory", warnings_in(err)[0])


CLASH = """
import optfactory
assert optfactory.resolve("adam").name == "adam"
print(len(optfactory.list_optimizers()))
try:
    optfactory.resolve("ball8bit")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("first", ["", "import one_pkg", "import two_pkg"])
def test_two_packages_with_one_family_lose_it_alone(
    site: Site, registered: bool, first: str
) -> None:
    # Which of the two would train must not depend on the order in which they were found.
    site.install(
        "one_pkg",
        family_source("ball", registered=registered) + family_source("cube", registered=registered),
        "one_pkg:BallConfig",
        "one_pkg:CubeConfig",
    )
    site.install("two_pkg", family_source("ball", registered=registered), "two_pkg:BallConfig")
    out, err = site.run(f"{first}\n{CLASH}")
    assert out.startswith(f"{len(NAMES) + PER_FAMILY}\n")
    assert "'ball' is also in the package 'two_pkg 1.5'" in out
    assert "'ball' is also in the package 'one_pkg 1.5'" in out
    assert len(warnings_in(err)) == 2


def test_a_family_registered_by_the_program_is_not_replaced_by_a_package(site: Site) -> None:
    site.install("ball_pkg", family_source("ball"), "ball_pkg:BallConfig")
    (site.folder / "mine.py").write_text(family_source("ball", registered=True))
    use = "import optfactory\nprint(optfactory.get_optimizer_info('ball').config_class.__mro__[1])"
    out, err = site.run(f"import mine\n{use}")
    assert "mine.BallConfig" in out
    assert "also in the module 'mine'" in warnings_in(err)[0]


def test_the_doctor_shows_packages_that_work_and_those_that_do_not(site: Site) -> None:
    site.install("bad_pkg", "import nothing_there", "bad_pkg:BadConfig")
    site.install("ball_pkg", family_source("ball"), "ball_pkg:BallConfig")
    code = "from optfactory.doctor import checks; print(*checks(), sep='\\n')"
    out, err = site.run(code)
    assert re.search(r"^ok +ball_pkg 1\.5 +adds the optimizers ball$", out, re.M)
    broken = (
        r"^broken +bad_pkg 1\.5 .*'bad_pkg:BadConfig'.*No module named 'nothing_there'\n +-> up"
    )
    assert re.search(broken, out, re.M)
    assert not warnings_in(err)
    assert re.search(r"^ok +step on cpu", out, re.M)
