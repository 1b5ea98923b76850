"""What `build_optimizer` accepts as parameters, turned into torch param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optfactory.errors import ConfigError
from optfactory.schema import config_error

NamedTensor = tuple[str, Tensor]
Params = nn.Module | Iterable[Tensor] | Iterable[NamedTensor] | Iterable[Mapping[str, Any]]

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Keys of a param group that are no hyperparameters: torch's own and the schedulers' bookkeeping.
ANNOTATIONS = ("params", "param_names", "name", "initial_lr")


def read_params(params: Params) -> list[dict[str, Any]]:
    """Read parameters of any accepted form as param groups with a list of tensors each.

    Groups keep the names of their tensors under `param_names` where the caller gave names.

    Raises:
        ConfigError: nothing to optimize, or parameters that cannot be; lists all of them.
    """
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    if isinstance(params, (Tensor, str, Mapping)) or not isinstance(params, Iterable):
        raise ConfigError(
            "params must be a Module, an iterable of tensors, of (name, tensor) pairs or of "
            f"param-group dicts, got one {type(params).__name__}; wrap it in a list"
        )
    entries = list(params)
    if not entries:
        raise ConfigError("nothing to optimize: the parameter list is empty")
    if isinstance(entries[0], Mapping):
        groups = [_read_group(index, group) for index, group in enumerate(entries)]
    else:
        groups = [_read_group(0, {"params": entries})]
    _check(groups)
    return groups


def _read_group(index: int, group: object) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise ConfigError(
            f"param_groups[{index}] must be a dict with the key 'params', got {_kind(group)}"
        )
    params = group["params"]
    if isinstance(params, nn.Module):
        params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
    elif isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, (set, frozenset)):
        raise ConfigError(f"param_groups[{index}].params must be ordered, got a set; use a list")
    entries = list(params)
    result = {key: value for key, value in group.items() if key != "params"}
    if any(isinstance(entry, tuple) for entry in entries):
        pairs = [_pair(index, entry) for entry in entries]
        result["param_names"] = [name for name, _ in pairs]
        entries = [tensor for _, tensor in pairs]
    result["params"] = entries
    return result


def _pair(index: int, entry: object) -> NamedTensor:
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
        raise ConfigError(
            f"param_groups[{index}].params mixes (name, tensor) pairs with other entries: "
            f"got {_kind(entry)}; name all parameters or none"
        )
    return entry


def parameter_names(group: Mapping[str, Any], index: int) -> list[str]:
    """A name for each parameter of a group, for messages and reports."""
    names = group.get("param_names")
    if names is not None:
        return list(names)
    return [f"param_groups[{index}].params[{i}]" for i in range(len(group["params"]))]


def _check(groups: list[dict[str, Any]]) -> None:
    problems = []
    seen: dict[int, str] = {}
    for index, group in enumerate(groups):
        for name, tensor in zip(parameter_names(group, index), group["params"], strict=True):
            problem = parameter_problem(tensor)
            if problem is None and id(tensor) in seen:
                problem = f"is the same tensor as {seen[id(tensor)]}; list every parameter once"
            if problem is not None:
                problems.append(f"{name}: {problem}")
            seen.setdefault(id(tensor), name)
    if not seen:
        raise ConfigError("nothing to optimize: every param group is empty")
    if problems:
        raise config_error("the parameters", problems)


def parameter_problem(tensor: object) -> str | None:
    """Why a tensor cannot be optimized, or None if it can."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got {_kind(tensor)}"
    if tensor.layout != torch.strided:
        return f"must be dense, got layout {tensor.layout}; call .to_dense() on it"
    if tensor.dtype not in SUPPORTED_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        return f"has dtype {tensor.dtype}; allowed are {allowed}"
    if hasattr(tensor, "device_mesh"):
        return "is a DTensor; sharded parameters are not supported yet"
    if not (tensor.is_leaf or tensor.retains_grad):
        return "is not a leaf of the autograd graph; pass the tensor it was computed from"
    return None


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
