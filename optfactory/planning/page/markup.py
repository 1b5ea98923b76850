"""Elements of HTML, with everything that comes from outside escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """A text that is HTML already."""


def element(name: str, *content: str, **attributes: object) -> Markup:
    """An element; texts are escaped, markup stays.

    Attributes of value None are left out, those of value True stand alone; ``class_`` is ``class``
    and ``data_x`` is ``data-x``.
    """
    written = "".join(
        f" {key}" if value is True else f' {key}="{escape(str(value))}"'
        for key, value in ((_attribute(key), value) for key, value in attributes.items())
        if value is not None and value is not False
    )
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def joined(content: Iterable[str]) -> Markup:
    """Several pieces of content."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in content))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A plain table; the first cell of a row is its heading."""
    head = element("tr", *(element("th", text, scope="col") for text in header))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", head),
            element("tbody", *body),
        ),
        class_="wide",
    )


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
