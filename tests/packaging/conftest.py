"""Clean virtual environments that borrow the running one's packages, so that no network is used."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What an optfactory installed in the running environment leaves there; it must not be borrowed.
OURS = ("optfactory", "_optfactory", "__editable__", "hydra_plugins")


@dataclass(frozen=True)
class Installation:
    """A virtual environment with optfactory installed in one way."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, command: str, *arguments: str, cwd: Path) -> str:
        """Run a program of this environment; returns what it printed."""
        words = [str(self.folder / "bin" / command), *arguments]
        return subprocess.run(
            words, cwd=cwd, env={"PATH": "/usr/bin:/bin"}, text=True, check=True, timeout=300,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip


def run_pip(*arguments: str, python: str = sys.executable) -> None:
    """pip without an index: nothing can be downloaded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(folder: Path, source: Path = ROOT, kernels: str = "0") -> Path:
    """The wheel that a checkout or an sdist builds, by default without prebuilt kernels."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFACTORY_PREBUILT", kernels)
        run_pip("wheel", *options, "--wheel-dir", str(folder), str(source))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the running environment's packages, optfactory left out."""
    folder = tmp_path_factory.mktemp("borrowed")
    for key in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(key)).iterdir():
            link = folder / entry.name
            if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that this checkout builds."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def install(folder: Path, borrowed: Path, *what: str) -> Installation:
    """Make an empty environment, let it see the borrowed packages, and install into it."""
    venv.create(folder, with_pip=False, symlinks=True)
    made = Installation(folder)
    (made.site_packages / "borrowed.pth").write_text(f"{borrowed}\n")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run_pip("install", *options, *what, python=made.python)
    return made


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installation(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    borrowed: Path,
    wheel: Path,
) -> Installation:
    """optfactory in a clean environment, from the wheel and as an editable install."""
    what = [str(wheel)] if request.param == "wheel" else ["--editable", str(ROOT)]
    return install(tmp_path_factory.mktemp(request.param) / "venv", borrowed, *what)
