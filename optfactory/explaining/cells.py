"""Values, tables and paragraphs as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

_WIDTH = 100  # of a page, in columns
_VALUE = 40  # of the second column of a table


def shown(value: Any) -> str:
    """A value as YAML writes it, numbers with six digits.

    >>> shown({"lr": 0.1 + 0.2, "betas": (0.9, 1e-8), "seed": None, "cautious": True})
    '{lr: 0.3, betas: [0.9, 1e-08], seed: null, cautious: true}'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}" if value % 1 else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "tensor"), counted(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first of many names.

    >>> shortened(["a", "b", "c", "d"]), shortened(["a", "b"])
    ('a, b, c and 1 more', 'a, b')
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Columns with their last one wrapped at the page's width, and values before it."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    widths[1] = min(widths[1], _VALUE)
    left = _WIDTH - len(indent) - sum(widths) - 2 * len(widths)
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
            for cell, width in zip(row, [*widths, left], strict=True)
        ]
        for parts in zip_longest(*cells, fillvalue=""):
            line = "  ".join(
                f"{part:<{width}}" for part, width in zip(parts, [*widths, 0], strict=True)
            )
            lines.append(f"{indent}{line}".rstrip())
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], sides: str, indent: str = "  ") -> list[str]:
    """Lines with columns as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def filled(text: str, first: str = "", later: str = "  ") -> str:
    """A paragraph."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
        break_long_words=False,
    )
