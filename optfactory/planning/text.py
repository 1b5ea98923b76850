"""A plan as plain text: the groups, the bytes, what stays at 32 bits, what other names take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optfactory.planning.figures import PlanFigures, RankFigures
from optfactory.planning.sizes import Share
from optfactory.planning.spread import SCHEMES

_SHOWN = 3  # names of tensors in one line


def render(plan: PlanFigures) -> str:
    """All tables of a plan."""
    parts = [
        headline(plan),
        _groups(plan),
        _others_than_matrices(plan),
        _shares(plan),
        _copies(plan),
        _wide(plan),
        _others(plan),
    ]
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
    title = f"{plan.config.name} for {tensors} trained tensors of {elements:,} elements"
    if not plan.mesh:
        cut = plan.report.state_bytes != plan.report.global_state_bytes
        return f"{title}\nThe model is sharded: bytes are those on this rank." if cut else title
    mesh = "x".join(map(str, plan.mesh))
    return f"{title} on {mesh} ranks\n{plan.shard}: {SCHEMES[plan.shard][0]}."


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


def _others_than_matrices(plan: PlanFigures) -> str:
    """What an optimizer for matrices leaves to another one, by reason."""
    reasons: dict[str, list[str]] = {}
    for group in plan.groups:
        for name, reason in zip(group.parameters, group.reasons, strict=False):
            if reason:
                reasons.setdefault(reason, []).append(name)
    rows = [[str(len(names)), reason, _shortened(names)] for reason, names in reasons.items()]
    return _table(["tensors", "no hidden matrix, because it is", ""], rows, "><<") if rows else ""


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")


def _shares(plan: PlanFigures) -> str:
    largest, smallest = plan.ranks[0], plan.ranks[-1]
    header, sides = ["memory", "device", "bits", "place", "bytes", ""], "<<><>>"
    if plan.mesh and len(plan.ranks) > 1:
        header, sides = [*header[:4], ranks_of(largest), "", ranks_of(smallest), ""], f"{sides}>>"
    elif plan.mesh:
        header[4] = "bytes per rank"
    columns = [{_key(s): s.nbytes for s in figures.shares} for figures in (largest, smallest)]
    if len(header) == 6:
        columns = columns[:1]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[*key, *_sizes([column.get(key, 0) for column in columns])] for key in keys]
    totals = _sizes([sum(column.values()) for column in columns])
    lines = _table(header, [*rows, ["total", "", "", "", *totals]], sides)
    gathered = ", what is gathered from other ranks" if plan.mesh else ""
    lines += f"\nActivations{gathered} and what the backward pass keeps come on top."
    return "\n".join(filter(None, [lines, verdict_line(plan)]))


def verdict_line(plan: PlanFigures) -> str:
    """Whether it fits, in numbers; empty where nobody said how much memory there is."""
    if plan.memory is None:
        return ""
    stay, leave = plan.needed()
    verdicts = {
        "fits": "It fits",
        "fits paged": "It fits only with paged state elsewhere",
        "no": "It does not fit",
    }
    paged = f", and {human(leave)} that can leave" if leave else ""
    each = " on each rank" if plan.mesh else ""
    return f"{verdicts[plan.verdict()]}: {human(stay)}{paged}, of {human(plan.memory)}{each}."


def ranks_of(figures: RankFigures) -> str:
    """The ranks that figures are of, in few words."""
    first, others = figures.ranks[0], len(figures.ranks) - 1
    return f"rank {first}" + (f" and {others} more" if others else "")


def _key(share: Share) -> tuple[str, ...]:
    return share.what, share.device, str(share.bits), share.place


def _sizes(numbers: Sequence[int]) -> list[str]:
    return [text for nbytes in numbers for text in (f"{nbytes:,}", human(nbytes))]


def _copies(plan: PlanFigures) -> str:
    """What a rank holds that others hold, too."""
    rows = [
        [kind.what, str(kind.ranks), str(kind.tensors), *_sizes([kind.nbytes])]
        for kind in plan.copies
    ]
    header = ["the same on several ranks", "ranks", "tensors", "bytes", ""]
    return _table(header, rows, "<>>>>") if rows else ""


def wide_tensors(plan: PlanFigures) -> dict[str, list[str]]:
    """The tensors whose state is not as small or as movable as the config asks, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in plan.report.rows:
        if row.reason:
            reasons.setdefault(kind_of_reason(row.reason), []).append(row.name)
    return reasons


def _wide(plan: PlanFigures) -> str:
    found = wide_tensors(plan)
    rows = [[str(len(names)), reason, _shortened(names)] for reason, names in found.items()]
    bits = plan.config.optim_bits
    why = f"not {bits if bits < 32 else 8}-bit, or not paged, because of"  # rules may say so too
    return _table(["tensors", why, ""], rows, "><<") if rows else ""


def kind_of_reason(reason: str) -> str:
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
            stay, leave = plan.needed(other)
            rows.append(
                [
                    other.name + mark,
                    human(other.state_bytes),
                    human(stay + leave),
                    plan.verdict(other),
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
