"""How many bytes a model and its optimizer take, by what they are and where they live."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optfactory.config.schema import OptimizerConfig
from optfactory.errors import BackendError
from optfactory.group_config import check_groups
from optfactory.group_schema import schema_of
from optfactory.groups.grouping import Grouping
from optfactory.groups.parameters import parameter_names
from optfactory.memory import placement
from optfactory.memory.managed import concurrent_managed_access
from optfactory.planning.spread import Holder
from optfactory.sharding.dtensors import local_tensor
from optfactory.state.layout import StateLayout
from optfactory.step.scratch import scratch_bytes
from optfactory.step.slots import Slot

PARAMETERS, BUFFERS, GRADIENTS, STATE = "parameters", "buffers", "gradients", "state"
SCRATCH = "scratch"
# What depends on the optimizer.
OF_OPTIMIZERS = (STATE, SCRATCH)


# Bytes by the attributes of a Share.
Sizes = Counter[tuple[str, str, int, str]]


@dataclass(frozen=True)
class Share:
    """One part of the memory.

    Attributes:
        what: ``parameters``, ``buffers``, ``gradients``, ``state``, or ``scratch``: memory for
            directions of whole matrices.
        device: the type of the device where it lives, or is paged to.
        bits: bits of an element; of state its width, scales and step counters included.
        place: ``resident``, or the kind of memory that makes room for other data.
        nbytes: how many bytes.
    """

    what: str
    device: str
    bits: int
    place: str
    nbytes: int


@dataclass(frozen=True)
class LaidOut:
    """Parameters in their groups, with the layout that the state of each will have.

    Attributes:
        configs: the config of each group.
        ranks: every trained parameter, for each holder.
        devices: where the parameter of each slot will be.
    """

    grouping: Grouping
    configs: list[OptimizerConfig]
    ranks: list[list[Slot]]
    devices: list[torch.device]
    _sizes: dict[tuple[int, torch.device], Sizes] = field(default_factory=dict, repr=False)

    def optimizer_shares(self, slots: Sequence[Slot]) -> tuple[Share, ...]:
        """The bytes of all states and of scratch memory on one of the ranks."""
        sizes: Sizes = Counter()
        for slot, device in zip(slots, self.devices, strict=True):
            layout = slot.layout
            key = (id(layout), device)  # many slots on many ranks share a few layouts
            if key not in self._sizes:
                self._sizes[key] = _state_sizes(layout, device)
            for kind, nbytes in self._sizes[key].items():
                sizes[kind] += nbytes
        return (*_shares(sizes), *self._scratch_shares(slots))

    def _scratch_shares(self, slots: Sequence[Slot]) -> list[Share]:
        sizes: Sizes = Counter()
        found = zip(slots, self.devices, strict=True)
        of_matrices = [(slot, home) for slot, home in found if slot.layout.rule.transform]
        if not of_matrices:  # as for nearly all names, whose plans are made together
            return []
        values = [checked.model_dump() for checked in self.configs]
        places = {id(group): index for index, group in enumerate(self.grouping.groups)}
        for device in dict.fromkeys(self.devices):
            here = [
                replace(slot, group=values[places[id(slot.group)]])
                for slot, home in of_matrices
                if home == device
            ]
            sizes[SCRATCH, device.type, 32, placement.RESIDENT] += scratch_bytes(here, device)
        return _shares(sizes)


def lay_out(
    grouping: Grouping,
    config: OptimizerConfig,
    device: torch.device | None,
    holders: Sequence[Holder] = (Holder(),),
) -> LaidOut:
    """The layout of every trained parameter's state, as the optimizer of this config makes it.

    Args:
        grouping: the parameters, sorted by the config's rules.
        device: where the parameters will be; None takes where they are, and the CPU for those on
            the meta device.
        holders: the ranks to plan for; one that has the parameters as they are by default.

    Raises:
        ConfigError: rules or groups are refused; rules that match nothing are not.
    """
    all_meta = all(p.is_meta for group in grouping.groups for p in group["params"])
    planned = torch.device("cpu") if device is None and all_meta else device
    configs = check_groups(replace(grouping, unmatched={}), config, planned)
    entries: list[tuple[str, Tensor, dict[str, Any], int]] = [
        (name, p, group, index)
        for index, group in enumerate(grouping.groups)
        for name, p in zip(parameter_names(group, index), group["params"], strict=True)
        if p.requires_grad
    ]
    devices = [planned_device(p, device) for _, p, _, _ in entries]
    values = [checked.model_dump() for checked in configs]
    schemas = [schema_of(group, config) for group in grouping.groups]
    layouts: dict[tuple[Any, ...], StateLayout] = {}
    ranks = []
    for holder in holders:
        slots: list[Slot] = []
        for (name, p, group, index), home in zip(entries, devices, strict=True):
            facts = (tuple(p.shape), home, p.dtype)
            key = (index, facts, holder.part(p))
            if key not in layouts:
                placed = _placed(values[index], home)
                layouts[key] = StateLayout.of(*facts, schemas[index], placed, holder.sharding(p))
            slots.append(Slot(p, name, len(slots), group, schemas[index], layouts[key]))
        ranks.append(slots)
    return LaidOut(grouping, configs, ranks, devices)


def model_shares(
    model: nn.Module | None,
    trained: Sequence[Tensor],
    device: torch.device | None,
    holder: Holder,
) -> list[Share]:
    """The bytes of a model's tensors on one rank, and of the gradients of what is trained.

    Args:
        model: the model; None counts the trained parameters alone.
        holder: the rank; buffers are whole on all.
    """
    kinds: list[tuple[str, Iterable[Tensor]]] = [
        (PARAMETERS, model.parameters() if model is not None else trained),
        (BUFFERS, model.buffers() if model is not None else ()),
        (GRADIENTS, trained),
    ]
    sizes: Sizes = Counter()
    for what, tensors in kinds:
        for tensor in tensors:
            key = (
                what,
                planned_device(tensor, device).type,
                8 * tensor.itemsize,
                placement.RESIDENT,
            )
            nbytes = stored_bytes(tensor)
            sizes[key] += nbytes if what == BUFFERS else holder.held(tensor, nbytes)
    return _shares(sizes)


def _state_sizes(layout: StateLayout, device: torch.device) -> Sizes:
    sizes: Sizes = Counter()
    bits = {key: codec.bits for state, codec in layout.stored for key in codec.keys(state)}
    others = min(bits.values(), default=32)
    for key, spec in layout.tensors.items():
        home = device if spec.where == placement.PINNED else spec.home(device)
        sizes[STATE, home.type, bits.get(key, others), spec.where] += spec.nbytes
    return sizes


def planned_device(tensor: Tensor, device: torch.device | None) -> torch.device:
    """Where a tensor will be."""
    if device is not None:
        return device
    local = local_tensor(tensor)
    return torch.device("cpu") if local.is_meta else local.device


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes here; of quantized and sparse ones, what they are made of."""
    tensor = local_tensor(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.layout is torch.strided:
        return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
    if tensor.layout is torch.sparse_coo:
        return stored_bytes(tensor._indices()) + stored_bytes(tensor._values())
    return 2 * stored_bytes(tensor.values())  # compressed: indices take about as much as values


def _placed(group: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """A group's values; where no GPU can be asked, it is planned to support managed memory."""
    if device.type != "cuda" or group["page_memory"] != "auto" or not group["is_paged"]:
        return group
    managed = True
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        with contextlib.suppress(BackendError):  # without CuPy
            managed = concurrent_managed_access(torch.device("cuda", index))
    return {**group, "page_memory": placement.MANAGED if managed else placement.PINNED}


def _shares(sizes: Sizes) -> list[Share]:
    return [Share(*key, nbytes) for key, nbytes in sizes.items() if nbytes]
