"""Docstrings as the site shows them: what a `>>>` begins is a block of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SESSION = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)


class Sessions(Extension):
    """Puts the snippets of docstrings, which `doctest` runs, into fences."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """A docstring with a fence around each session, up to the next empty line."""
    return _SESSION.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)
