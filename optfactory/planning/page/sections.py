"""What stands below the bars: memory by kind, groups, wide tensors, ranks, the config."""

from __future__ import annotations

from collections.abc import Sequence

from optfactory.planning.figures import PlanFigures, PlannedGroup, RankFigures
from optfactory.planning.page.markup import Markup, element, table
from optfactory.planning.text import human, ranks_of, wide_tensors


def memory(plan: PlanFigures) -> list[Markup]:
    """The bytes of the chosen name, by what they are and where they live."""
    rows = [
        [share.what, share.device, str(share.bits), share.place, human(share.nbytes)]
        for share in plan.shares
    ]
    rows.append(["total", "", "", "", human(sum(share.nbytes for share in plan.shares))])
    title = (
        f"{plan.config.name}, on the rank that needs the most" if plan.mesh else plan.config.name
    )
    return [
        table(title, ["memory", "device", "bits", "place", "size"], rows),
        element("p", "Activations and what the backward pass keeps come on top."),
    ]


def groups(plan: PlanFigures) -> list[Markup]:
    """The param groups with the parameters that they caught."""
    return [_group(group) for group in plan.groups]


def _group(group: PlannedGroup) -> Markup:
    count = len(group.parameters)
    tensors = f"{count} tensor{'s' * (count != 1)}, {group.elements:,} elements"
    overrides = ", ".join(f"{key}: {value}" for key, value in group.overrides.items())
    reasons = group.reasons or ("",) * count
    names = [
        element("li", element("code", name), f" ({reason})" if reason else "")
        for name, reason in zip(group.parameters, reasons, strict=True)
    ]
    summary = element("summary", element("b", group.name), f": {tensors}")
    return element(
        "details",
        summary,
        element(
            "p", f"differs from the optimizer in {overrides}" if overrides else "as the config"
        ),
        element("ul", *names, class_="tensors"),
    )


def wide(plan: PlanFigures) -> list[Markup]:
    """The tensors whose state is not as small or as movable as the config asks, and why."""
    found = wide_tensors(plan)
    if not found:
        return [element("p", "Nothing: all state is as the config says.")]
    return [
        element(
            "details",
            element("summary", f"{len(names)} tensor{'s' * (len(names) != 1)}: {reason}"),
            element("ul", *(element("li", element("code", n)) for n in names), class_="tensors"),
        )
        for reason, names in found.items()
    ]


def ranks(plan: PlanFigures) -> list[Markup]:
    """What each rank of a mesh needs, and what several hold the same of."""
    rows = [
        [_numbers(figures), human(figures.nbytes), human(figures.state_bytes)]
        for figures in plan.ranks
    ]
    parts = [table("Equal ranks together, the largest first", ["ranks", "in all", "state"], rows)]
    if plan.copies:
        copies = [
            [kind.what, str(kind.ranks), str(kind.tensors), human(kind.nbytes)]
            for kind in plan.copies
        ]
        header = ["the same on several ranks", "ranks", "tensors", "size"]
        parts.append(table("Copies on the largest rank", header, copies))
    return parts


def _numbers(figures: RankFigures) -> str:
    numbers = ", ".join(map(str, figures.ranks[:8]))
    return numbers if len(figures.ranks) <= 8 else ranks_of(figures)


def problems(plan: PlanFigures) -> list[Markup]:
    """Rules that match nothing or change nothing."""
    told = [*plan.unmatched.values()]
    told += [f"param_groups.{label}: {why}" for label, why in plan.idle.items()]
    return [_list(told)] if told else []


def config(plan: PlanFigures) -> list[Markup]:
    """The config with all of its keys."""
    from optfactory.catalog.files import render

    return [element("pre", element("code", render(plan.config)), tabindex="0")]


def _list(texts: Sequence[str]) -> Markup:
    return element("ul", *(element("li", text) for text in texts), class_="problems")
