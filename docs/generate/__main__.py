"""`python -m docs.generate --write` brings the generated pages up to date, `--check` compares."""

from __future__ import annotations

import argparse
import sys

from docs.generate.pages import stale_pages, write_pages


def main() -> int:
    """Exit code 1 if `--check` finds a page that is out of date."""
    parser = argparse.ArgumentParser(prog="docs.generate", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="bring the pages up to date")
    action.add_argument("--check", action="store_true", help="exit with 1 if one is out of date")
    if parser.parse_args().write:
        print(f"{len(write_pages())} page(s) changed")
        return 0
    problems = stale_pages()
    if problems:
        print(*problems, "run: python -m docs.generate --write", sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
