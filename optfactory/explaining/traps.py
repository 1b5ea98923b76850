"""What a config, its rules and its scheduler do that was perhaps not meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optfactory.config.group_rules import RULES_FIELD
from optfactory.explaining.figures import Curve
from optfactory.explaining.schedules import PLATEAU, Scheduler
from optfactory.explaining.simulation import Run
from optfactory.groups.grouping import Grouping
from optfactory.groups.merging import Hit, Making
from optfactory.overlooked import overlooked
from optfactory.reminders import lost_updates

# These set the rates of all groups themselves, whatever the config says.
_OWN_RATES = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr"}
_PERIODIC = ("CyclicLR", "CosineAnnealingWarmRestarts")
_ALIKE = 1e-9  # ratios that differ by less are the same, but for rounding
_LISTED = 6  # learning rates that a warning shows
_RISEN, _SMALL = 1.001, 1e-3  # what is no rounding, of the lowest rate and of the peak


def of_grouping(grouping: Grouping, values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules without effect, and what the optimizer would warn of when it is built.

    Args:
        values: the hyperparameters of each group.
    """
    found = [f"{RULES_FIELD}.{label}: {why}" for label, why in grouping.idle.items()]
    found += _overruled(grouping.makings)
    groups = [
        {**own, "params": group["params"]}
        for own, group in zip(values, grouping.groups, strict=True)
    ]
    for group, given in zip(groups, grouping.groups, strict=True):
        if "param_names" in given:
            group["param_names"] = given["param_names"]
    lost = lost_updates(groups).removesuffix(". This is said once")
    told = (grouping.warning, lost, overlooked(groups, grouping.models))
    return [*found, *filter(None, told)]


def _overruled(makings: Sequence[Making]) -> Iterator[str]:
    """Keys that a rule sets and others override wherever it matches."""
    winners: dict[tuple[str, str], set[str]] = {}
    effective: set[tuple[str, str]] = set()
    for making in makings:
        sayers = making.sayers()
        factors = {factor.key: factor.label for factor in making.factors}
        for hit in making.hits:
            if hit.implied:
                continue
            for key in hit.said:
                last = sayers.get(key, [])[-1:]
                _note(hit, key, last == [hit], _who(last, making), effective, winners)
            for key, stated in (
                ("lr_scale", hit.rule.lr_scale),
                ("layer_decay", hit.rule.layer_decay),
            ):
                if stated is not None:
                    label = factors[key]
                    _note(hit, key, label == hit.label, f"rule '{label}'", effective, winners)
    for (label, key), others in winners.items():
        if (label, key) not in effective:
            by = " and ".join(sorted(others))
            yield (
                f"{RULES_FIELD}.{label}.{key}: has no effect, {by} overrides it wherever the rule "
                "matches; later rules win"
            )


def _note(
    hit: Hit,
    key: str,
    wins: bool,
    winner: str,
    effective: set[tuple[str, str]],
    winners: dict[tuple[str, str], set[str]],
) -> None:
    place = (hit.label, key)
    if wins:
        effective.add(place)
    else:
        winners.setdefault(place, set()).add(winner)


def _who(last: Sequence[Hit | None], making: Making) -> str:
    if not last:  # a rule that names another optimizer began anew
        naming = [hit.label for hit in making.hits if hit.rule.optimizer is not None]
        return f"the optimizer of rule '{naming[-1]}'" if naming else "another optimizer"
    return "the param group itself" if last[0] is None else f"rule '{last[0].label}'"


def of_schedule(
    scheduler: Scheduler, run: Run, rates: Sequence[Curve], names: Sequence[str]
) -> list[str]:
    """What a scheduler does that was perhaps not meant.

    Args:
        names: of all groups.
    """
    found = [f"torch warns: {text}" for text in run.warned]
    found += _made_equal(run.kind, rates)
    if run.strays:
        found.append(
            f"{scheduler.name} sets the momentum of all groups, and those of other optimizers have "
            f"none, whose betas stay: {', '.join(names[index] for index in run.strays)}"
        )
    if run.steps and run.kind not in _PERIODIC:
        found += _end(scheduler, run, rates)
    return found


def _made_equal(kind: str, rates: Sequence[Curve]) -> list[str]:
    configured = [rate for curve in rates for rate in curve.configured]
    if len(set(configured)) < 2 or len(rates) > 1:
        return []
    text = f"{kind} makes the learning rates of all groups equal"
    key = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr and max_lr"}.get(kind, "")
    share = [f"{max(rates[0].values) * rate / max(configured):.4g}" for rate in configured]
    remedy = f"; give {key} as a list, one for each param group in order" if key else ""
    if kind == "OneCycleLR":
        first = [*share[:3], "..."] if len(share) > _LISTED else share
        remedy += f", such as [{', '.join(first)}]"
    return [f"{text}, which undoes lr_scale, layer_decay and lr of rules{remedy}"]


def _end(scheduler: Scheduler, run: Run, rates: Sequence[Curve]) -> Iterator[str]:
    curve = max(rates, key=lambda curve: max(curve.configured)).values
    peak = curve.index(max(curve))
    lowest = min(curve[peak:])
    turn = peak + curve[peak:].index(lowest)
    if curve[-1] > _RISEN * lowest + _SMALL * curve[peak]:
        made_for = "" if run.length is None else f": it is made for {run.length:,} steps"
        yield (
            f"{scheduler.name} rises again after step {turn:,}, to {curve[-1]:.4g} at the last of "
            f"{run.steps:,}{made_for}. Make it as long as the training"
        )
    elif run.length is not None and not run.failure and run.steps < run.length:
        yield (
            f"{scheduler.name} is made for {run.length:,} steps, and after {run.steps:,} the "
            f"learning rate is {curve[-1]:.4g} yet"
        )


def told(
    run: Run,
    keeps: bool,
    rates: Sequence[Curve],
    momenta: Sequence[Curve],
) -> tuple[str, ...]:
    """What to know of a scheduler."""
    if run.kind == PLATEAU:
        made = run.scheduler
        return (
            f"{PLATEAU} follows a metric, so that nothing can be said of steps: the learning rates "
            f"stay as they are until the metric has not improved for more than {made.patience} "
            f"calls of step(metric), and are then multiplied by {made.factor:g}, each group's "
            f"down to {', '.join(f'{rate:g}' for rate in dict.fromkeys(made.min_lrs))} at least",
        )
    sentences = []
    own = _OWN_RATES.get(run.kind)
    if own:
        sentences.append(
            f"{run.kind} sets the learning rates itself, by {own}; those of the config, with "
            "lr_scale and layer_decay, have no effect."
        )
    if len(run.rates) > 1:
        sentences.append(_ratios(keeps, rates))
    for curve in momenta:
        before = ", ".join(f"{number:.4g}" for number in dict.fromkeys(curve.configured))
        sentences.append(
            f"It also sets the momentum (or betas[0]) of {', '.join(curve.groups)}, from "
            f"{min(curve.values):.4g} to {max(curve.values):.4g} in place of {before}."
        )
    return tuple(sentences)


def _ratios(keeps: bool, rates: Sequence[Curve]) -> str:
    if keeps:
        return "The ratios between the groups' learning rates stay as the config has them."
    pairs = [pair for curve in rates for pair in _groups(curve)]
    high, low = max(pairs, key=lambda pair: pair[1]), min(pairs, key=lambda pair: pair[1])
    ratios = [
        f"{above / below:.4g}" if below else "infinite"
        for above, below in (
            (high[1], low[1]),
            (high[2].values[0], low[2].values[0]),
            (high[2].values[-1], low[2].values[-1]),
        )
    ]
    return (
        f"The ratios between the groups' learning rates change: of {high[0]} to {low[0]} it is "
        f"{ratios[0]} in the config, {ratios[1]} at the first step, {ratios[2]} at the last."
    )


def _groups(curve: Curve) -> Iterator[tuple[str, float, Curve]]:
    """Each group of a curve with its configured rate."""
    for name, rate in zip(curve.groups, curve.configured, strict=True):
        yield name, rate, curve


def keeps_ratios(rates: Sequence[Curve]) -> bool:
    """Whether the rates of all groups are the config's times one factor at each step."""
    first, start = rates[0].values, rates[0].configured[0]
    return all(
        abs(value * start - other * rate) <= _ALIKE * max(abs(value * start), abs(other * rate))
        for curve in rates
        for rate in set(curve.configured)
        for value, other in zip(curve.values, first, strict=True)
    )
