"""``python -m optfactory.build.wheel FOLDER [GLOB ...]``: builds kernels, prints their tag."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from optfactory.build.wheel.kernels import build, jobs
from optfactory.errors import OptFactoryError


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m optfactory.build.wheel", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("only", nargs="*", help="globs of '<instruction set>/<kernel>'")
    options = parser.parse_args()
    try:
        print(build(options.folder, jobs(options.only)))
    except OptFactoryError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
