"""Where parameters stand in their model: what rules for param groups are matched against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

# Components of names that wrappers put in: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = ("DistributedDataParallel", "DataParallel")


@dataclass
class Origin:
    """One parameter, which may have several names: it is tied, or its module is shared.

    Attributes:
        names: all its full names, in the model's order.
        owners: the class of the module behind each name; empty where no Module was given.
    """

    names: list[str] = field(default_factory=list)
    owners: list[type[nn.Module]] = field(default_factory=list)


class Origins:
    """The origins of all parameters that came with names, frozen ones included.

    Attributes:
        models: the Modules that were given.
    """

    def __init__(self) -> None:
        self.models: list[nn.Module] = []
        self._origins: dict[int, Origin] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's only as long as it lives

    def add_model(self, model: nn.Module) -> None:
        """Note every parameter of a Module."""
        self.models.append(model)
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(recurse=False):
                full = plain_name(f"{prefix}.{name}" if prefix else name, model)
                self._add(parameter, full, type(module))

    def add_named(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Note tensors of which only the names are known."""
        for name, tensor in pairs:
            if id(tensor) not in self._origins:
                self._add(tensor, name, None)

    def of(self, tensor: Tensor) -> Origin | None:
        """The origin of a tensor; None if it came without a name."""
        return self._origins.get(id(tensor))

    def all(self) -> Iterator[tuple[Tensor, Origin]]:
        """Every parameter with its origin."""
        return zip(self._kept, self._origins.values(), strict=True)

    def _add(self, tensor: Tensor, name: str, owner: type[nn.Module] | None) -> None:
        if id(tensor) not in self._origins:
            self._kept.append(tensor)
        origin = self._origins.setdefault(id(tensor), Origin())
        origin.names.append(name)
        if owner is not None:
            origin.owners.append(owner)


def plain_name(name: str, model: nn.Module) -> str:
    """A parameter's name as it would be without the wrappers around its model."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if type(model).__name__ in _PARALLEL and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)
