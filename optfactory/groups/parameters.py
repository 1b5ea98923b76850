"""What `build_optimizer` accepts as parameters, turned into torch param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optfactory.config.plain import plain
from optfactory.config.validation import config_error
from optfactory.errors import ConfigError
from optfactory.group_schema import OPTIMIZER_KEY, family_of
from optfactory.groups.origins import Origins, without_wrappers
from optfactory.rules.options import NOISE_KEY
from optfactory.sharding.dtensors import Sharding, is_dtensor, local_tensor
from optfactory.sharding.engines import put_pieces_back

NamedTensor = tuple[str, Tensor]
Params = nn.Module | Iterable[Tensor] | Iterable[NamedTensor] | Iterable[Mapping[str, Any]]

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Iterable, but no lists of parameters.
_NO_LISTS = (Tensor, str, Mapping)

# Keys of a param group that are no hyperparameters: torch's own and the schedulers' bookkeeping.
ANNOTATIONS = ("params", "param_names", "name", "initial_lr")

# What our groups hold beside: of the optimizer that they are in, and not to be taken along.
_FORMAT = "format_version"
_MARKS = (_FORMAT, NOISE_KEY)


def read_params(params: Params, origins: Origins | None = None) -> list[dict[str, Any]]:
    """Read parameters of any accepted form as param groups with a list of tensors each.

    Groups keep the names of their tensors under `param_names` where the caller gave names.

    Args:
        origins: where to note what names and Modules say of the parameters.

    Raises:
        ConfigError: nothing to optimize, or parameters that cannot be; lists all of them.
    """
    origins = Origins() if origins is None else origins
    if isinstance(params, nn.Module):
        frozen = sum(1 for _ in params.parameters())
        params = _trainable(params, origins)
        if frozen and not params:
            raise ConfigError(
                f"nothing to optimize: all {frozen} parameters of the model are frozen "
                "(requires_grad is False); unfreeze those that are to be trained first"
            )
    if isinstance(params, _NO_LISTS) or not isinstance(params, Iterable):
        raise ConfigError(
            "params must be a Module, an iterable of tensors, of (name, tensor) pairs or of "
            f"param-group dicts, got {_kind(params)}; wrap it in a list"
        )
    entries = _ordered(params, "params")
    if entries and isinstance(entries[0], Mapping):
        mixed = len({_live_name(group) for group in entries} - {None}) > 1
        groups = [read_group(group, index, origins, mixed) for index, group in enumerate(entries)]
    else:
        groups = [read_group({"params": entries}, 0, origins)]
    if not any(group["params"] for group in groups):
        raise ConfigError("nothing to optimize: there is no parameter in params")
    check_parameters(groups)
    return groups


def read_group(
    group: object, index: int, origins: Origins | None = None, mixed: bool = False
) -> dict[str, Any]:
    """Read one param group: tensors under `params`, their names under `param_names` if given.

    Args:
        index: which of the groups it is.
        origins: as for `read_params`.
        mixed: it may be one of an optimizer of ours with several families, which it keeps.

    Raises:
        ConfigError: it is no param group.
    """
    place = f"param_groups[{index}]"
    if not isinstance(group, Mapping) or "params" not in group:
        raise ConfigError(f"{place} must be a dict with the key 'params', got {_kind(group)}")
    origins = Origins() if origins is None else origins
    params = group["params"]
    if isinstance(params, nn.Module):
        params = _trainable(params, origins)
    elif isinstance(params, Tensor):
        params = [params]
    entries = _ordered(params, f"{place}.params")
    result = {plain(key): plain(value) for key, value in group.items() if key != "params"}
    _read_live_group(result, mixed)
    if any(isinstance(entry, tuple) for entry in entries):
        pairs = [_pair(entry, place) for entry in entries]
        entries = [tensor for _, tensor in pairs]
        origins.add_named(pairs)
        result["param_names"] = [without_wrappers(name) for name, _ in pairs]
    elif entries and len(result.get("param_names", ())) == len(entries):
        origins.add_named(zip(result["param_names"], entries, strict=True))
    result["params"] = entries
    return result


def _live_name(group: object) -> object:
    """The name of the optimizer of ours that a group is taken from; None if it is from none."""
    is_live = isinstance(group, Mapping) and _FORMAT in group
    return group.get(OPTIMIZER_KEY) if isinstance(group, Mapping) and is_live else None


def _read_live_group(group: dict[str, Any], mixed: bool) -> None:
    """Make a group of another optimizer, ours or torch's, one that a user could have written."""
    if _FORMAT in group:
        name = group.pop(OPTIMIZER_KEY, None)
        if mixed and name is not None:
            group[OPTIMIZER_KEY] = family_of(name)
    for key in _MARKS:
        group.pop(key, None)
    if {"foreach", "differentiable"} <= group.keys():
        # How torch computes a step, not what; every step here is fused.
        for key in ("foreach", "fused"):
            group.pop(key, None)
        if group["differentiable"] is False:
            del group["differentiable"]
        decoupled = group.pop("decoupled_weight_decay", None)
        if decoupled is not None:
            group.setdefault("adam_w_mode", decoupled)


def _trainable(module: nn.Module, origins: Origins) -> list[NamedTensor]:
    put_pieces_back(module)
    origins.add_model(module)
    return [(origins.name(p), p) for p in module.parameters() if p.requires_grad]


def _ordered(params: object, place: str) -> list[Any]:
    if isinstance(params, (set, frozenset)) or not isinstance(params, Iterable):
        raise ConfigError(
            f"{place} must be an ordered iterable, got {_kind(params)}; use a list: "
            "checkpoints number parameters by their order"
        )
    return list(params)


def _pair(entry: object, place: str) -> NamedTensor:
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
        raise ConfigError(
            f"{place}.params mixes (name, tensor) pairs with other entries: "
            f"got {_kind(entry)}; name all parameters or none"
        )
    return entry


def parameter_names(group: Mapping[str, Any], index: int) -> list[str]:
    """A name for each parameter of a group, for messages and reports."""
    names = group.get("param_names")
    if names is not None:
        return list(names)
    return [f"param_groups[{index}].params[{i}]" for i in range(len(group["params"]))]


def check_parameters(groups: list[dict[str, Any]], known: Sequence[dict[str, Any]] = ()) -> None:
    """Refuse parameters that cannot be optimized or appear twice.

    Args:
        known: groups before these, which have been checked.

    Raises:
        ConfigError: lists all of them by name.
    """
    problems = []
    seen: dict[int, str] = {}
    for index, group in enumerate(known):
        seen |= zip(map(id, group["params"]), parameter_names(group, index), strict=True)
    for index, group in enumerate(groups, start=len(known)):
        for name, tensor in zip(parameter_names(group, index), group["params"], strict=True):
            problem = parameter_problem(tensor) if _may_be_trained(tensor) else None
            if problem is None and id(tensor) in seen:
                problem = f"is the same tensor as {seen[id(tensor)]}; list every parameter once"
            if problem is not None:
                problems.append(f"{name}: {problem}")
            seen.setdefault(id(tensor), name)
    if problems:
        raise config_error("the parameters", problems)


def name_all_or_none(groups: list[dict[str, Any]]) -> None:
    """Name the parameters of unnamed groups by their place if other groups have names.

    torch wants names in all groups or in none, and a Module brings names that nobody asked for.
    """
    if any("param_names" in group for group in groups):
        for index, group in enumerate(groups):
            group.setdefault("param_names", parameter_names(group, index))


def _may_be_trained(tensor: object) -> bool:
    """Whether a tensor is more than a frozen one: those may be of any kind, as long as they are."""
    return not isinstance(tensor, nn.Parameter) or tensor.requires_grad or is_lazy(tensor)


def parameter_problem(tensor: object) -> str | None:
    """Why a tensor cannot be optimized, or None if it can."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got {_kind(tensor)}"
    if is_dtensor(tensor):
        return _dtensor_problem(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return (
            f"is {_kind(tensor)}, which has no memory of its own; train the tensors inside it, or "
            "use an optimizer that works through torch operations"
        )
    if is_lazy(tensor):
        return "is not initialized (its module is lazy); run a batch through the model first"
    if tensor.layout != torch.strided:
        return f"must be dense, got layout {tensor.layout}; call .to_dense() on it"
    if tensor.dtype not in SUPPORTED_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        return f"has dtype {tensor.dtype}; allowed are {allowed}"
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return "has elements that share memory (it was expanded); call .clone() on it"
    if tensor.is_neg():
        return "is a view that is negated when it is read; call .resolve_neg() on it"
    if not (tensor.is_leaf or tensor.retains_grad):
        return "is not a leaf of the autograd graph; pass the tensor it was computed from"
    return None


def _dtensor_problem(tensor: Tensor) -> str | None:
    """Why a sharded parameter cannot be optimized, or None if it can."""
    sharding = Sharding.of(tensor)
    assert sharding is not None
    if any(getattr(placement, "is_partial", bool)() for placement in sharding.placements):
        return f"has parts that are still to be summed ({sharding.placements}); redistribute it"
    if not (tensor.is_leaf or tensor.retains_grad):
        return "is not a leaf of the autograd graph; pass the tensor it was computed from"
    local = local_tensor(tensor)
    try:
        sizes = sharding.box.sizes
    except ValueError as error:
        return f"has placements {sharding.placements}, whose parts are in pieces: {error}"
    if not local.is_meta and tuple(local.shape) != sizes:
        return (
            f"has a local part of shape {tuple(local.shape)}, where its placements "
            f"{sharding.placements} on {sharding.mesh} give {sizes}; shard it with "
            "fully_shard, parallelize_module or distribute_tensor"
        )
    return parameter_problem(local.detach())


def is_flat_piece(tensor: Tensor) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has a tensor in pieces of flattened memory."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def is_scattered(tensor: Tensor) -> bool:
    """Whether a tensor is sharded along several dimensions behind the first.

    What a process holds of it lies in runs at unequal distances.
    """
    sharding = Sharding.of(tensor)
    return sharding is not None and len({dim for _, dim in sharding.cuts if dim > 0}) > 1


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
