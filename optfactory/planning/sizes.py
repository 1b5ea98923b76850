"""How many bytes a model and its optimizer take, by what they are and where they live."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optfactory.config.schema import OptimizerConfig
from optfactory.errors import BackendError
from optfactory.group_config import check_groups
from optfactory.groups.grouping import Grouping
from optfactory.groups.parameters import parameter_names
from optfactory.memory import placement
from optfactory.memory.managed import concurrent_managed_access
from optfactory.state.layout import StateLayout
from optfactory.step.slots import Slot

PARAMETERS, BUFFERS, GRADIENTS, STATE = "parameters", "buffers", "gradients", "state"


@dataclass(frozen=True)
class Share:
    """One part of the memory.

    Attributes:
        what: ``parameters``, ``buffers``, ``gradients`` or ``state``.
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
        slots: every trained parameter.
        devices: where the parameter of each slot will be.
    """

    grouping: Grouping
    configs: list[OptimizerConfig]
    slots: list[Slot]
    devices: list[torch.device]


def lay_out(grouping: Grouping, config: OptimizerConfig, device: torch.device | None) -> LaidOut:
    """The layout of every trained parameter's state, as the optimizer of this config makes it.

    Args:
        grouping: the parameters, sorted by the config's rules.
        device: where the parameters will be; None takes where they are, and the CPU for those on
            the meta device.

    Raises:
        ConfigError: rules or groups are refused; rules that match nothing are not.
    """
    all_meta = all(p.is_meta for group in grouping.groups for p in group["params"])
    planned = torch.device("cpu") if device is None and all_meta else device
    configs = check_groups(replace(grouping, unmatched={}), config, planned)
    slots: list[Slot] = []
    devices = []
    for index, (group, checked) in enumerate(zip(grouping.groups, configs, strict=True)):
        values = checked.model_dump()
        layouts: dict[tuple[Any, ...], StateLayout] = {}
        for name, p in zip(parameter_names(group, index), group["params"], strict=True):
            if not p.requires_grad:
                continue
            facts = (tuple(p.shape), planned_device(p, device), p.dtype)
            if facts not in layouts:
                layouts[facts] = StateLayout.of(*facts, type(config), _placed(values, facts[1]))
            slots.append(Slot(p, name, len(slots), group, layouts[facts]))
            devices.append(facts[1])
    return LaidOut(grouping, configs, slots, devices)


def state_shares(laid_out: LaidOut) -> list[Share]:
    """The bytes of all states."""
    sizes: Counter[tuple[str, str, int, str]] = Counter()
    for slot, device in zip(laid_out.slots, laid_out.devices, strict=True):
        bits = 8 if slot.layout.quantized else 32
        for spec in slot.layout.tensors.values():
            home = device if spec.where == placement.PINNED else spec.home(device)
            sizes[STATE, home.type, bits, spec.where] += spec.nbytes
    return _shares(sizes)


def model_shares(
    model: nn.Module | None, slots: Iterable[Slot], device: torch.device | None
) -> list[Share]:
    """The bytes of a model's tensors, and of the gradients of what is trained.

    Args:
        model: the model; None counts the parameters of the slots alone.
    """
    trained = [slot.parameter for slot in slots]
    kinds: list[tuple[str, Iterable[Tensor]]] = [
        (PARAMETERS, model.parameters() if model is not None else trained),
        (BUFFERS, model.buffers() if model is not None else ()),
        (GRADIENTS, trained),
    ]
    sizes: Counter[tuple[str, str, int, str]] = Counter()
    for what, tensors in kinds:
        for tensor in tensors:
            key = (
                what,
                planned_device(tensor, device).type,
                8 * tensor.itemsize,
                placement.RESIDENT,
            )
            sizes[key] += _nbytes(tensor)
    return _shares(sizes)


def planned_device(tensor: Tensor, device: torch.device | None) -> torch.device:
    """Where a tensor will be."""
    if device is not None:
        return device
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; of quantized and sparse ones, what they are made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.layout is torch.strided:
        return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
    if tensor.layout is torch.sparse_coo:
        return _nbytes(tensor._indices()) + _nbytes(tensor._values())
    return _nbytes(tensor.values()) * 2  # compressed rows or columns: indices take about as much


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


def _shares(sizes: Counter[tuple[str, str, int, str]]) -> list[Share]:
    return [Share(*key, nbytes) for key, nbytes in sizes.items() if nbytes]
