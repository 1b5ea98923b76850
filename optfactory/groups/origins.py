"""Where parameters stand in their model: what rules for param groups are matched against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

# Components of names that wrappers put in: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = frozenset({"DistributedDataParallel", "DataParallel"})  # keep theirs in `module`


@dataclass
class Origin:
    """One parameter, which may have several names: it is tied, or its module is shared.

    Attributes:
        names: all its full names, in the model's order, without the components of wrappers.
        owners: the class of the module behind each name; empty where no Module was given.
    """

    names: list[str] = field(default_factory=list)
    owners: list[type[nn.Module]] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """A module in a model: its path without wrappers, and the class that owns its parameters."""

    path: str
    module: nn.Module
    owner: type[nn.Module]

    def name(self, of: str) -> str:
        """The full name of something in the module."""
        return f"{self.path}.{of}" if self.path else of


class Origins:
    """The origins of all parameters that came with names, frozen ones included.

    Attributes:
        places: every module of the Modules that were given.
        models: these Modules.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.models: list[nn.Module] = []
        self._origins: dict[int, Origin] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's only as long as it lives

    def add_model(self, model: nn.Module) -> None:
        """Note every parameter of a Module."""
        self.models.append(model)
        for place in _places(model):
            self.places.append(place)
            for name, tensor in place.module.named_parameters(
                recurse=False, remove_duplicate=False
            ):
                self._add(tensor, place.name(name), place.owner)

    def add_named(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Note tensors of which only the names are known."""
        for name, tensor in pairs:
            if id(tensor) not in self._origins:
                self._add(tensor, without_wrappers(name), None)

    def of(self, tensor: Tensor) -> Origin | None:
        """The origin of a tensor; None if it came without a name."""
        return self._origins.get(id(tensor))

    def name(self, tensor: Tensor) -> str:
        """The first name of a tensor that came with one."""
        return self._origins[id(tensor)].names[0]

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


def _places(model: nn.Module) -> Iterator[Place]:
    """Every module of a model, shared ones at each of their places."""
    # Each entry: a place, and the modules on the way to it, so that a cycle ends.
    waiting: list[tuple[Place, tuple[nn.Module, ...]]] = [(Place("", model, type(model)), (model,))]
    while waiting:
        place, way = waiting.pop()
        yield place
        children = [
            (Place(_path(place, name), child, _owner(child, way)), (*way, child))
            for name, child in place.module._modules.items()
            if child is not None and not any(child is module for module in way)
        ]
        waiting += reversed(children)


def _path(parent: Place, name: str) -> str:
    """A child's path; wrappers and what they wrap share one."""
    classes = {base.__name__ for base in type(parent.module).mro()}
    is_wrapper = name in _WRAPPERS or (name == "module" and classes & _PARALLEL)
    return parent.path if is_wrapper else parent.name(name)


def _owner(module: nn.Module, way: tuple[nn.Module, ...]) -> type[nn.Module]:
    """The class of a module; behind parametrized weights, of the module that has the weight."""
    if type(module).__name__ == "ParametrizationList" and len(way) > 1:
        return type(way[-2])
    return type(module)


def without_wrappers(name: str) -> str:
    """A name without the components that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
