"""Hatchling's hook that puts prebuilt kernels into wheels.

The environment variable OPTFACTORY_PREBUILT chooses: ``0`` (the default) leaves them out, because
an install from source would wait minutes for what it compiles at first use; ``1`` builds them,
globs such as ``x86-64-v3/adam-*`` (several with commas) a part of them, and ``auto`` builds them
where it can, for wheels of a checkout. Editable installs have none.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "OPTFACTORY_PREBUILT"


class PrebuiltKernels(BuildHookInterface[Any]):
    """Builds kernels into a temporary folder, which the wheel then includes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get(VARIABLE, "0")
        if version == "editable" or wanted == "0" or (wanted == "auto" and self._needless()):
            return
        patterns = [] if wanted in ("auto", "1") else wanted.split(",")
        # Removed with this object, behind the build.
        self.folder = TemporaryDirectory(prefix="optfactory-kernels-")
        # A process of its own, because this one may have another optfactory on its path.
        command = [sys.executable, "-m", "optfactory.build.wheel", self.folder.name, *patterns]
        done = subprocess.run(command, cwd=self.root, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            build_data["force_include"][self.folder.name] = "optfactory/_prebuilt"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{done.stdout.strip()}"
        elif wanted == "auto":
            self.app.display_warning("the wheel is built without prebuilt kernels")
        else:
            raise RuntimeError(f"{VARIABLE} is {wanted!r}, and the kernels cannot be built")

    def _needless(self) -> bool:
        """Whether these are no wheels for others: installs from source, and foreign platforms."""
        from_sdist = Path(self.root, "PKG-INFO").is_file()
        return from_sdist or sys.platform != "linux" or platform.libc_ver()[0] != "glibc"
