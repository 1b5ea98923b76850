"""A plan as plain text: the groups, the bytes, what stays at 32 bits, what other names take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optfactory.planning.figures import PlanFigures

_SHOWN = 3  # names of tensors in one line


def render(plan: PlanFigures) -> str:
    """All tables of a plan."""
    parts = [headline(plan), _groups(plan), _shares(plan), _wide(plan), _others(plan)]
    parts += plan.unmatched.values()
    parts += [f"param_groups.{label}: {why}" for label, why in plan.idle.items()]
    return "\n\n".join(filter(None, parts))


def human(nbytes: int) -> str:
    """A number of bytes in the largest binary unit that keeps it at 1 or more."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{nbytes} B" if unit == "B" else f"{size:.2f} {unit}"


def headline(plan: PlanFigures) -> str:
    """The optimizer and what it trains."""
    tensors = sum(len(group.parameters) for group in plan.groups)
    elements = sum(group.elements for group in plan.groups)
    return f"{plan.config.name} for {tensors} trained tensors of {elements:,} elements"


def _groups(plan: PlanFigures) -> str:
    rows = [
        [
            group.name,
            str(len(group.parameters)),
            f"{group.elements:,}",
            ", ".join(f"{key}: {value}" for key, value in group.overrides.items()),
        ]
        for group in plan.groups
    ]
    return _table(["group", "tensors", "elements", "overrides"], rows, "<>><")


def _shares(plan: PlanFigures) -> str:
    rows = [
        [s.what, s.device, str(s.bits), s.place, f"{s.nbytes:,}", human(s.nbytes)]
        for s in plan.shares
    ]
    total = sum(share.nbytes for share in plan.shares)
    rows.append(["total", "", "", "", f"{total:,}", human(total)])
    lines = _table(["memory", "device", "bits", "place", "bytes", ""], rows, "<<><>>")
    lines += "\nActivations and what the backward pass keeps come on top."
    if plan.memory is not None:
        stay, leave = plan.needed()
        verdicts = {
            "fits": "It fits",
            "fits paged": "It fits only with paged state elsewhere",
            "no": "It does not fit",
        }
        paged = f", and {human(leave)} that can leave" if leave else ""
        lines += f"\n{verdicts[plan.verdict()]}: {human(stay)}{paged}, of {human(plan.memory)}."
    return lines


def _wide(plan: PlanFigures) -> str:
    """The tensors whose state is not as small or as movable as the config asks, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in plan.report.rows:
        if row.reason:
            reasons.setdefault(_kind(row.reason), []).append(row.name)
    rows = [
        [str(len(names)), reason, ", ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")]
        for reason, names in reasons.items()
    ]
    return (
        _table(["tensors", "not 8-bit, or not paged, because of", ""], rows, "><<") if rows else ""
    )


def _kind(reason: str) -> str:
    """A reason without the number that differs from tensor to tensor."""
    parts = [re.sub(r"^\d+ elements, ", "", part) for part in reason.split("; ")]
    return "; ".join(re.sub(r"^(rows) of \d+ elements,", r"\1", part) for part in parts)


def _others(plan: PlanFigures) -> str:
    rows = []
    for other in plan.alternatives:
        mark = "*" if other.name == plan.config.name else ""
        if other.problem:
            rows.append([other.name + mark, "", "", other.problem.partition(";")[0]])
        else:
            stay, leave = plan.needed(other.shares)
            rows.append(
                [
                    other.name + mark,
                    human(other.state_bytes),
                    human(stay + leave),
                    plan.verdict(other.shares),
                ]
            )
    return _table(["name", "state", "on the device", ""], rows, "<>><")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns as wide as their widest cell."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in table
    )
