"""An explanation as plain text: the keys, the groups, the scheduler, what was perhaps not meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optfactory.explaining.cells import columns, counted, filled, shortened, shown, table
from optfactory.explaining.figures import (
    DEFAULT,
    NAME,
    OWN,
    Curve,
    Figures,
    Group,
    Key,
    Rate,
    Schedule,
    Setting,
    States,
)
from optfactory.planning.text import human

_CURVES = 16  # lines of a table
_MANY = 40  # groups, of more of which the first and the last are told
_FIRST, _LAST = 15, 5


def render(told: Figures) -> str:
    """All of an explanation."""
    parts = [f"{told.config.name}, from {told.source}", _keys(told.keys)]
    if told.groups is None:
        parts.append(
            "Param groups are left out: they depend on the model. Give it, by --model on the "
            "command line."
        )
    else:
        parts += _groups(told.groups)
    if told.schedule is not None:
        parts += [_schedule(told.schedule)]
    parts += [filled(f"note: {text}") for text in told.notes]
    parts += [filled(f"warning: {text}") for text in told.warnings]
    parts += [filled(f"problem: {text}") for text in told.problems]
    return "\n\n".join(parts)


# ---- keys --------------------------------------------------------------------------------------


def _keys(keys: Sequence[Key]) -> str:
    parts = {
        "stated": [key for key in keys if key.key == "name" or key.source not in (NAME, DEFAULT)],
        "stated by the name": [key for key in keys if key.source == NAME and key.key != "name"],
        "defaults": [key for key in keys if key.source == DEFAULT],
    }
    tables = []
    for title, members in parts.items():
        rows = [[key.key, _value(key), key.source, key.description] for key in members]
        if title == "defaults":  # whose source is said by the title
            rows = [[row[0], row[1], row[3]] for row in rows]
        if rows:
            tables.append(f"{title}\n{table(rows)}")
    return "\n\n".join(tables)


def _value(key: Key) -> str:
    notes = []
    if key.given:
        notes.append(f"given as {key.given}")
    if key.default is not None:
        notes.append(f"default {shown(key.default)}")
    return shown(key.value) + (f" ({', '.join(notes)})" if notes else "")


# ---- groups ------------------------------------------------------------------------------------


def _groups(groups: Sequence[Group]) -> list[str]:
    if len(groups) <= _MANY:
        return list(map(_group, groups))
    between = len(groups) - _FIRST - _LAST
    return [
        *map(_group, groups[:_FIRST]),
        f"... {counted(between, 'group')} more; --json lists all",
        *map(_group, groups[-_LAST:]),
    ]


def _group(group: Group) -> str:
    count = len(group.parameters)
    lines = [f"group {group.name}: {counted(count, 'tensor')}, {group.elements:,} elements"]
    said = [f"rules: {', '.join(group.rules) or 'none'}"]
    if count:
        said.insert(0, shortened(group.parameters))
    if group.reasons:
        said.append(f"no hidden matrix, because it is {' or '.join(group.reasons)}")
    said.append(rate_line(group.rate))
    said += [setting_line(setting) for setting in group.settings]
    if group.is_other and group.defaults:
        values = ", ".join(f"{key} {shown(value)}" for key, value in group.defaults.items())
        said.append(f"defaults of {group.optimizer}: {values}")
    named = len(group.states) > 1
    said += [_states(states, named) for states in group.states]
    return "\n".join([*lines, *(filled(text, "  ", "    ") for text in said)])


def rate_line(rate: Rate) -> str:
    """A learning rate with its arithmetic.

    >>> from optfactory.groups.merging import Factor
    >>> rate_line(Rate(0.005, 0.001, "", (Factor("lr_scale", "head", 5.0, 1),)))
    "lr 0.005 = 0.001 x 5 (lr_scale of 'head')"
    """
    base = shown(rate.base) + (f" (of {_who(rate.said_by)})" if rate.said_by else "")
    if not rate.factors:
        return f"lr {shown(rate.value)}" + (f" from {_who(rate.said_by)}" if rate.said_by else "")
    terms = [base]
    for factor in rate.factors:
        if factor.key == "lr_scale":
            terms.append(f"{factor.number:g} (lr_scale of '{factor.label}')")
        else:
            layers = f"{counted(factor.power, 'layer')} below the last"
            where = layers if factor.power else "the last layer"
            terms.append(
                f"{factor.number:g}^{factor.power} (layer_decay of '{factor.label}', {where})"
            )
    return f"lr {shown(rate.value)} = {' x '.join(terms)}"


def setting_line(setting: Setting) -> str:
    """A hyperparameter, who stated it and what it was."""
    by = f"from {_who(setting.said_by)}" if setting.said_by else "as follows from the above"
    was = "as everywhere" if setting.value == setting.was else f"was {shown(setting.was)}"
    earlier = "".join(
        f"; rule '{label}' said {shown(value)}" for label, value in setting.overruled.items()
    )
    return f"{setting.key} {shown(setting.value)} {by} ({was}{earlier})"


def _who(label: str) -> str:
    return label if label == OWN else f"rule '{label}'"


def _states(states: States, named: bool) -> str:
    by_codec: dict[str, list[str]] = {}
    for name, codec in states.codecs.items():
        by_codec.setdefault(codec, []).append(name)
    kept = ", ".join(f"{', '.join(names)} {codec}" for codec, names in by_codec.items())
    count = counted(states.tensors, "tensor")
    place = "" if states.place == "resident" else f", paged ({states.place})"
    why = f" ({states.reason})" if states.reason else ""
    names = f": {shortened(states.names)}" if named else ""
    return f"state: {kept or 'none'}, {human(states.nbytes)} for {count}{place}{why}{names}"


# ---- schedulers --------------------------------------------------------------------------------


def _schedule(schedule: Schedule) -> str:
    title = f"scheduler {call(schedule)}"
    parts = [filled(f"{title}, {counted(schedule.steps, 'step')}" if schedule.steps else title)]
    if schedule.rates:
        parts.append(_curves(schedule.rates, schedule.milestones, "lr"))
    if schedule.momenta:
        parts.append(_curves(schedule.momenta, schedule.milestones, "momentum or betas[0]"))
    parts += [filled(sentence, "  ", "  ") for sentence in schedule.told]
    return "\n".join(parts)


def call(schedule: Schedule) -> str:
    """A scheduler as it would be written."""
    arguments = ", ".join(f"{key}={shown(value)}" for key, value in schedule.arguments.items())
    return f"{schedule.name}({arguments})"


def _curves(curves: Sequence[Curve], milestones: Mapping[int, str], what: str) -> str:
    """A line for each curve; of many the first ones and the last."""
    steps = [f"{step:,} {text}".rstrip() for step, text in milestones.items()]
    header = [f"{what} at step", "config", *steps, "min", "max"]
    rows = []
    left_out = max(0, len(curves) - _CURVES)
    for curve in [*curves[: _CURVES - 1], curves[-1]] if left_out else curves:
        values = [curve.values[step] for step in milestones]
        extremes = [curve.values[step] for step in curve.extremes()]
        configured = ", ".join(f"{value:.4g}" for value in dict.fromkeys(curve.configured))
        cells = [f"{value:.4g}" for value in [*values, *extremes]]
        rows.append([label(curve), configured, *cells])
    if all(row[1] == row[2] for row in rows):  # the first step tells it
        for row in (header, *rows):
            del row[1]
    lines = columns([header, *rows], "<" + ">" * (len(header) - 1))
    if left_out:
        lines.insert(-1, f"  ({left_out:,} more; --json has all)")
    return "\n".join(lines)


def label(curve: Curve) -> str:
    """The groups of a curve, shortened."""
    return shortened(curve.groups)
