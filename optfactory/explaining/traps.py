"""What a config, its rules and its scheduler do that was perhaps not meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from optfactory.config.group_rules import RULES_FIELD
from optfactory.explaining.cells import shortened
from optfactory.explaining.figures import Curve
from optfactory.explaining.schedules import PLATEAU, Scheduler
from optfactory.explaining.simulation import MOST, Run
from optfactory.groups.grouping import Grouping
from optfactory.groups.merging import Hit, Making
from optfactory.overlooked import overlooked
from optfactory.reminders import lost_updates

# These set the rates of all groups themselves, whatever the config says.
_OWN_RATES = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr"}
_PERIODIC = ("CyclicLR", "CosineAnnealingWarmRestarts")
_ALIKE = 1e-9  # ratios that differ by less are the same, but for rounding
_LISTED = 6  # learning rates that a warning shows
_SMALL = 1e-3  # what is no rounding, of the lowest rate and of the peak
_UNUSABLE: dict[str, Callable[[float], bool]] = {
    "nan": math.isnan,
    "inf": lambda rate: rate == math.inf,
    "negative": lambda rate: rate < 0,
}


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
    found += _made_equal(run, rates)
    if run.strays:
        found.append(
            f"{scheduler.name} sets the momentum of all groups, and those of other optimizers have "
            f"none, whose betas stay: {shortened([names[index] for index in run.strays], _LISTED)}"
        )
    found += _risen(run, names)
    if rates and not run.failure and run.kind not in _PERIODIC:
        found += _end(scheduler, run, rates)
    return found


def _made_equal(run: Run, rates: Sequence[Curve]) -> list[str]:
    kind = run.kind
    configured = [rate for curve in rates for rate in curve.configured]
    if len(set(configured)) < 2 or len(rates) > 1 or not math.isfinite(rates[0].values[0]):
        return []
    text = f"{kind} makes the learning rates of all groups equal"
    key = {"OneCycleLR": "max_lr", "CyclicLR": "base_lr and max_lr"}.get(kind, "")
    # Sampled at steps, the peak may be missed by a little.
    optimizer = getattr(run.scheduler, "optimizer", None)
    group = optimizer.param_groups[0] if isinstance(optimizer, Optimizer) else {}
    peak = float(group.get("max_lr", max(rates[0].values)))
    share = [f"{peak * rate / max(configured):.4g}" for rate in configured]
    remedy = f"; give {key} as a list, one for each param group in order" if key else ""
    if kind == "OneCycleLR":
        first = [*share[:3], "..."] if len(share) > _LISTED else share
        remedy += f", such as [{', '.join(first)}]"
    return [f"{text}, which undoes lr_scale, layer_decay and lr of rules{remedy}"]


def of_rates(rates: Sequence[Curve]) -> list[str]:
    """Learning rates that the optimizer refuses at a step."""
    found: dict[tuple[str, int, bool], list[str]] = {}
    for curve in rates:
        for what, is_so in _UNUSABLE.items():
            steps = [step for step, rate in enumerate(curve.values) if is_so(rate)]
            if steps:
                is_to_the_end = len(steps) == len(curve.values) - steps[0]
                found.setdefault((what, steps[0], is_to_the_end), []).extend(curve.groups)
    return [
        f"the learning rate of {shortened(groups)} is {what} from step {step:,} on"
        + ("" if is_to_the_end else ", though not at every one")
        for (what, step, is_to_the_end), groups in found.items()
    ]


def _risen(run: Run, names: Sequence[str]) -> Iterator[str]:
    """Groups that a decay to eta_min raises, since that is above their learning rate."""
    for part in _parts(run.scheduler):
        least, starts = getattr(part, "eta_min", None), getattr(part, "base_lrs", None)
        if not isinstance(least, (int, float)) or not isinstance(starts, list):
            continue
        raised = {name: rate for name, rate in zip(names, starts, strict=False) if rate < least}
        if raised:
            rates = shortened([f"{rate:.4g}" for rate in dict.fromkeys(raised.values())])
            yield (
                f"{type(part).__name__} raises the learning rate of {shortened(list(raised))}, "
                f"which is {rates}, to its eta_min {least:.4g}; all groups end there"
            )


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those that it consists of."""
    yield scheduler
    parts = getattr(scheduler, "_schedulers", ())
    for part in parts if isinstance(parts, (list, tuple)) else ():
        yield from _parts(part)


def _end(scheduler: Scheduler, run: Run, rates: Sequence[Curve]) -> Iterator[str]:
    curve = max(rates, key=lambda curve: max(curve.configured)).values
    if not all(0 <= rate < math.inf for rate in curve):  # which is a problem
        return
    peak = curve.index(max(curve))
    lowest = min(curve[peak:])
    turn = peak + curve[peak:].index(lowest)
    if curve[-1] - lowest > _SMALL * (abs(lowest) + abs(curve[peak])):
        made_for = "" if run.length is None else f": it is made for {run.length:,} steps"
        yield (
            f"{scheduler.name} rises again after step {turn:,}, to {curve[-1]:.4g} at the last of "
            f"{run.steps:,}{made_for}. Make it as long as the training"
        )
    elif run.length is not None and run.steps < min(run.length, MOST):
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
    if rates and len(run.rates) > 1:
        sentences.append(_ratios(keeps, rates))
    for curve in momenta:
        low, high = (curve.values[step] for step in curve.extremes())
        before = ", ".join(f"{number:.4g}" for number in dict.fromkeys(curve.configured))
        sentences.append(
            f"It also sets the momentum (or betas[0]) of {shortened(curve.groups, _LISTED)}, from "
            f"{low:.4g} to {high:.4g} in place of {before}."
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
