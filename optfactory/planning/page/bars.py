"""The names as rows with stacked bars: what each takes of every kind of memory."""

from __future__ import annotations

from collections.abc import Mapping

from optfactory.planning.figures import Alternative, PlanFigures
from optfactory.planning.kinds import KINDS, Kind, by_kind
from optfactory.planning.page.markup import Markup, element, joined
from optfactory.planning.sizes import OF_OPTIMIZERS
from optfactory.planning.text import human
from optfactory.registry import get_optimizer_info

_CHOSEN = "chosen"
# Names of columns, and by which attribute of the rows they are sorted.
_COLUMNS = {"name": "name", "state": "state", "in all": "total", "verdict": "verdict"}


def legend(plan: PlanFigures) -> Markup:
    """The kinds of memory that occur, each with its look."""
    used = {kind for other in plan.alternatives for kind in _sizes(plan, other)}
    items = [
        element("li", element("i", class_=_look(kind), aria_hidden="true"), kind.label)
        for kind in KINDS
        if kind in used
    ]
    if plan.memory is not None:
        available = element("i", class_="available", aria_hidden="true")
        items.append(element("li", available, f"{human(plan.memory)} available"))
    return element("ul", *items, class_="legend")


def rows_of_names(plan: PlanFigures) -> Markup:
    """The table of all names that the config can have."""
    possible = [other for other in plan.alternatives if not other.problem]
    ends = [sum(_sizes(plan, other).values()) for other in possible]
    full = _full_width(max(ends, default=1), plan.memory)
    has_verdict = plan.memory is not None
    columns = [text for text in _COLUMNS if has_verdict or text != "verdict"]
    head = [_sortable(text) for text in columns]
    head.insert(1, element("th", "memory", scope="col", class_="bars"))
    return element(
        "table",
        element("caption", f"Memory by name, in {human(full)} from side to side"),
        element("thead", element("tr", *head)),
        element("tbody", *(_row(plan, other, full) for other in possible)),
        id="names",
    )


def refused_names(plan: PlanFigures) -> Markup:
    """The names that the config cannot have, and why."""
    refused = [other for other in plan.alternatives if other.problem]
    if not refused:
        return Markup("")
    items = [element("li", element("code", other.name), f": {other.problem}") for other in refused]
    title = element("summary", f"{len(refused)} names that this config cannot have, and why")
    return element("details", title, element("ul", *items))


def chosen_bar(plan: PlanFigures) -> Markup:
    """The bar of the config's own name, on the scale of that which is there."""
    own = next(other for other in plan.alternatives if other.name == plan.config.name)
    sizes = _sizes(plan, own)
    return _bar(sizes, _full_width(sum(sizes.values()), plan.memory), plan.memory)


def _full_width(longest: int, memory: int | None) -> int:
    """What the width of a bar stands for: what there is, if that is not far from the longest."""
    return max(longest, memory if memory and memory <= 2 * longest else 0, 1)


def _sortable(text: str) -> Markup:
    return element(
        "th",
        element("button", text, type="button", data_key=_COLUMNS[text]),
        scope="col",
        aria_sort="ascending" if text == "name" else None,
    )


def _row(plan: PlanFigures, other: Alternative, full: int) -> Markup:
    sizes = _sizes(plan, other)
    total = sum(sizes.values())
    is_chosen = other.name == plan.config.name
    mark = element("b", _CHOSEN, class_="mark") if is_chosen else Markup("")
    verdict = plan.verdict(other)
    cells = [
        element("th", element("code", other.name), mark, scope="row"),
        element("td", _bar(sizes, full, plan.memory), class_="bars"),
        element("td", human(other.state_bytes), data_label="state "),
        element("td", human(total), data_label="in all "),
    ]
    if plan.memory is not None:
        cells.append(element("td", verdict, class_=verdict.replace(" ", "-")))
    return element(
        "tr",
        *cells,
        class_=_CHOSEN if is_chosen else None,
        data_name=other.name,
        data_family=get_optimizer_info(other.name).family,
        data_state=other.state_bytes,
        data_total=total,
        data_verdict=verdict or None,
    )


def _bar(sizes: Mapping[Kind, int], full: int, memory: int | None) -> Markup:
    parts = [
        element("i", class_=_look(kind), style=f"width:{100 * nbytes / full:.2f}%")
        for kind, nbytes in sizes.items()
    ]
    if memory is not None and memory <= full:
        parts.append(element("u", style=f"left:{100 * memory / full:.2f}%"))
    told = ", ".join(f"{kind.label} {human(nbytes)}" for kind, nbytes in sizes.items())
    return element("div", joined(parts), class_="bar", role="img", aria_label=told, title=told)


def _look(kind: Kind) -> str:
    return f"k{KINDS.index(kind)}" + (" striped" if kind.striped else "")


def _sizes(plan: PlanFigures, other: Alternative) -> dict[Kind, int]:
    base = [share for share in plan.shares if share.what not in OF_OPTIMIZERS]
    return by_kind([*base, *other.shares]) if not other.problem else {}
