"""Which library a state dict is of, and the export to another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optfactory.checkpoints.bitsandbytes import NESTED, BitsandbytesLayout
from optfactory.checkpoints.foreign import States, copied
from optfactory.checkpoints.own import OwnLayout, live_record
from optfactory.checkpoints.peers import peers_of
from optfactory.checkpoints.records import MARKS, PLACEMENT, PRODUCTS, STORAGE, Export, Layout
from optfactory.checkpoints.sharded import whole_entries
from optfactory.checkpoints.torch import TorchLayout
from optfactory.checkpoints.torchao import TorchaoLayout
from optfactory.checkpoints.writing import wrapped
from optfactory.config.peers import TorchPeer
from optfactory.config.schema import OptimizerConfig, family_class
from optfactory.config.validation import config_error
from optfactory.errors import ConfigError, StateError
from optfactory.group_schema import schema_of
from optfactory.rules.options import NOISE_KEY, has_masters
from optfactory.step.slots import Slot

Groups = list[Mapping[str, Any]]


def recognize(groups: Groups, state: Mapping[Any, Any]) -> Layout:
    """The layout of a state dict, from the keys that it has.

    Raises:
        StateError: it is of no library whose state can be read here.
    """
    settings = {key for group in groups for key in group}
    every = {key for entries in state.values() if isinstance(entries, Mapping) for key in entries}
    known = States()
    fields = {key for key in every if key in known}
    if settings & {"format_version", "optimizer"}:
        return OwnLayout()
    if fields & {NESTED, "state1"} or (not fields and "t_alpha" in settings):
        return BitsandbytesLayout(state)
    layout = TorchaoLayout.of_state(state) or TorchLayout.of_settings(settings)
    if layout is not None:
        return layout
    names = sorted(peer.name for peer in peers_of(TorchPeer).values())
    raise StateError(
        "format_version: missing; the checkpoint was not written by optfactory, nor is it of "
        f"bitsandbytes, torchao or torch.optim.{{{', '.join(names)}}}; "
        f"its states have the keys {sorted(map(str, every))}, its groups "
        f"{sorted(map(str, settings))}"
    )


def export(
    name: str,
    groups: list[dict[str, Any]],
    states: list[tuple[Slot, Mapping[str, Tensor]]],
    config: OptimizerConfig,
) -> dict[str, Any]:
    """A state dict of another library, as a copy.

    Args:
        name: ``torch``, ``bitsandbytes`` or ``torchao``.
        states: every parameter in order with its state, which is empty before its first step.

    Raises:
        ConfigError: the layout's name is unknown, its library could not go on as we do, or is not
            there to make its tensors.
        StateError: a parameter's state is not what it was allocated as.
    """
    layouts: dict[str, Export] = {
        "torch": TorchLayout([config.family]),
        "bitsandbytes": BitsandbytesLayout(family=config.family),
        "torchao": TorchaoLayout(config.family),
    }
    if name not in layouts:
        *first, last = layouts
        raise ConfigError(
            f"unknown layout {name!r}; state is exported as {', '.join(first)} or {last}"
        )
    layout = layouts[name]
    problems = [
        f"param_groups[{index}].{problem}"
        for index, group in enumerate(groups)
        for problem in _problems(group, family_class(schema_of(group, config)), layout)
    ]
    if problems:
        raise config_error(f"a state dict of {layout.title}", problems)
    number = {id(slot.parameter): index for index, (slot, _) in enumerate(states)}
    entries = {}
    for index, (slot, state) in enumerate(states):
        own = {key: state[key] for key in slot.layout.tensors if key in state}
        if own:
            slot.layout.check(slot.name, own, slot.local.device)
            foreign = {key: copied(value) for key, value in state.items() if key not in own}
            entries[index] = {**_exported(layout, slot, own), **foreign}
    written = [
        {
            **copied({**_labels(group, schema_of(group, config)), **layout.write_group(group)}),
            "params": [number[id(p)] for p in group["params"]],
        }
        for group in groups
    ]
    return {"state": entries, "param_groups": written}


def _exported(layout: Export, slot: Slot, own: Mapping[str, Tensor]) -> dict[str, Any]:
    """One parameter's state; sharded where the other library knows DTensors, else gathered."""
    piece = slot.layout.piece
    if piece is None:
        return layout.write_entries(slot.layout, live_record(slot.layout, own), slot.group)
    if not layout.takes_dtensors:
        whole = slot.layout.unsharded()
        gathered = whole_entries(wrapped(slot, own), own.keys())
        return layout.write_entries(whole, live_record(whole, gathered), slot.group)
    entries = layout.write_entries(slot.layout, live_record(slot.layout, own), slot.group)
    states = {state.name for state in slot.layout.rule.states}
    return {
        key: piece.sharding.wrap(value) if key in states and value is not None else value
        for key, value in entries.items()
    }


def _problems(group: Mapping[str, Any], schema: type[OptimizerConfig], layout: Export) -> list[str]:
    if schema.family not in layout.families:
        return [f"optimizer: {layout.title} has no {schema.family}"]
    own = {"name", "annotations", *layout.expressed, *PLACEMENT, *STORAGE, *PRODUCTS}
    own |= set() if has_masters(group) else {"master_weights"}
    fields = schema.model_fields.items()
    problems = [
        f"{key}: {group[key]!r} has no counterpart there, which does as with {field.default!r}"
        for key, field in fields
        if key not in own and group[key] != field.default
    ]
    return problems + layout.write_problems(group)


def _labels(group: Mapping[str, Any], schema: type[OptimizerConfig]) -> dict[str, Any]:
    """What users and schedulers keep in a group."""
    ours = {*schema.model_fields, *MARKS, NOISE_KEY} - {"name", "param_names"}
    return {key: value for key, value in group.items() if key not in ours}
