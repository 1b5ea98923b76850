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
_RISEN = 1.001


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


def of_schedule(scheduler: Scheduler, run: Run, rates: Sequence[Curve]) -> list[str]:
    """What a scheduler does that was perhaps not meant."""
    found = [f"torch warns: {text}" for text in run.warned]
    found += _made_equal(scheduler, rates)
    if run.steps and scheduler.name not in _PERIODIC:
        found += _end(scheduler, run, rates)
    return found


def _made_equal(scheduler: Scheduler, rates: Sequence[Curve]) -> list[str]:
    configured = [curve.configured for curve in rates]
    if len(set(configured)) < 2 or len({curve.values for curve in rates}) > 1:
        return []
    text = f"{scheduler.name} makes the learning rates of all groups equal"
    key = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr and max_lr"}.get(scheduler.name)
    peak = max(rates[0].values)
    share = [f"{peak * rate / max(configured):.4g}" for rate in configured]
    remedy = f"; give {key} as a list, one for each param group in order" if key else ""
    if remedy and all(len(curve.groups) == 1 for curve in rates):
        remedy += f", such as [{', '.join(share)}]"
    return [f"{text}, which undoes lr_scale and layer_decay{remedy}"]


def _end(scheduler: Scheduler, run: Run, rates: Sequence[Curve]) -> Iterator[str]:
    curve = max(rates, key=lambda curve: curve.configured).values
    peak = curve.index(max(curve))
    lowest = min(curve[peak:])
    turn = peak + curve[peak:].index(lowest)
    if curve[-1] > _RISEN * lowest and turn > peak and curve[-1] > lowest + 1e-3 * curve[peak]:
        made_for = "" if run.length is None else f", which it is made for {run.length:,} of"
        yield (
            f"{scheduler.name} rises again after step {turn:,}, to {curve[-1]:.4g} at the last of "
            f"{run.steps:,} steps{made_for}; make it as long as the training"
        )
    elif run.length is not None and not run.failure and run.steps < run.length:
        yield (
            f"{scheduler.name} is made for {run.length:,} steps, and after {run.steps:,} the "
            f"learning rate is {curve[-1]:.4g} yet"
        )


def told(
    scheduler: Scheduler,
    run: Run,
    keeps: bool,
    rates: Sequence[Curve],
    momenta: Sequence[Curve],
) -> tuple[str, ...]:
    """What to know of a scheduler."""
    if scheduler.name == PLATEAU:
        made = run.scheduler
        return (
            f"{PLATEAU} follows a metric, so that nothing can be said of steps: the learning rates "
            f"stay as they are until the metric has not improved for more than {made.patience} "
            f"calls of step(metric), and are then multiplied by {made.factor:g}, each group's "
            f"down to {', '.join(f'{rate:g}' for rate in dict.fromkeys(made.min_lrs))} at least",
        )
    sentences = []
    own = _OWN_RATES.get(scheduler.name)
    if own:
        sentences.append(
            f"{scheduler.name} sets the learning rates itself, by {own}; those of the config, with "
            "lr_scale and layer_decay, have no effect."
        )
    if len(run.rates) > 1:
        sentences.append(_ratios(keeps, rates))
    for curve in momenta:
        sentences.append(
            f"It also sets the momentum (betas[0]) of {', '.join(curve.groups)}, from "
            f"{min(curve.values):.4g} to {max(curve.values):.4g} in place of the config's "
            f"{curve.configured:.4g}."
        )
    return tuple(sentences)


def _ratios(keeps: bool, rates: Sequence[Curve]) -> str:
    if keeps:
        return "The ratios between the groups' learning rates stay as the config has them."
    high = max(rates, key=lambda curve: curve.configured)
    low = min(rates, key=lambda curve: curve.configured)
    ratios = [
        f"{above / below:.4g}" if below else "infinite"
        for above, below in (
            (high.configured, low.configured),
            (high.values[0], low.values[0]),
            (high.values[-1], low.values[-1]),
        )
    ]
    return (
        f"The ratios between the groups' learning rates change: from {high.groups[0]} to "
        f"{low.groups[0]} it is {ratios[0]} in the config, {ratios[1]} at the first step, "
        f"{ratios[2]} at the last."
    )


def keeps_ratios(rates: Sequence[Curve]) -> bool:
    """Whether the rates of all groups are the config's times one factor at each step."""
    first = rates[0]
    return all(
        abs(value * first.configured - other * curve.configured)
        <= _ALIKE * max(abs(value * first.configured), abs(other * curve.configured))
        for curve in rates[1:]
        for value, other in zip(curve.values, first.values, strict=True)
    )
