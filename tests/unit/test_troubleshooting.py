"""The messages that the page of troubleshooting explains are those of the package."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pages" / "troubleshooting.md"
ANY = "..."  # what differs between messages
MESSAGES = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@cache
def literals() -> tuple[str, ...]:
    """Every text in the package's source, with `...` for what is filled in."""
    found = []
    for path in sorted((ROOT / "optfactory").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else ANY for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(" ".join(text.split()) for text in found)


def test_there_are_messages_and_each_is_explained_once() -> None:
    assert len(MESSAGES) > 15
    assert len(set(MESSAGES)) == len(MESSAGES)


def is_said(message: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, message.split(ANY))))
    return any(pattern.search(text) for text in literals())


def test_each_message_is_in_the_source() -> None:
    assert [message for message in MESSAGES if not is_said(message)] == []


def test_a_message_that_changed_is_noticed() -> None:
    assert is_said("no C++ compiler was found; install one")
    assert not is_said("no C++ compiler was seen; install one")
