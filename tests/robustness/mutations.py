"""Random damage to state dicts: to tensors, to values, and to what holds them together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.checkpoints.harness import NESTED, StateDict

Path = tuple[Any, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]


class OddTensor(torch.Tensor):
    """A subclass that does nothing of its own."""


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """All elements this value, or the nearest there is to a finite one; integers become 1."""

    def change(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.ones_like(t)
        top = torch.finfo(t.dtype).max
        return torch.full_like(t, max(min(value, top), -top) if math.isfinite(value) else value)

    return change


def _random_bytes(t: Tensor) -> Tensor:
    count = t.numel() * t.element_size()
    data = bytearray(np.random.default_rng(count).bytes(count + 8))
    return torch.frombuffer(data, dtype=t.dtype, count=t.numel()).view(t.shape)


def _in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _needs_gradient(t: Tensor) -> Tensor:
    return t.clone().requires_grad_(t.is_floating_point())


def _at_an_odd_offset(t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return torch.cat([flat.new_zeros(1), flat])[1:].view(t.shape)


TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "flat": lambda t: t.reshape(-1),
    "one more dimension": lambda t: t[None],
    "transposed": lambda t: t.transpose(0, -1) if t.ndim else t,
    "transposed in memory": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "spread": lambda t: torch.stack([t, t, t], -1)[..., 1],
    "expanded": lambda t: t.new_ones(()).expand(t.shape),
    "at an odd offset": _at_an_odd_offset,
    "an element less": lambda t: t.reshape(-1)[:-1] if t.ndim else t,
    "a row less": lambda t: t[:-1] if t.ndim else t,
    "twice as long": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
    "no elements": lambda t: t.new_empty(0),
    "a dimension of zero": lambda t: t.new_empty((0, *t.shape)),
    "NaN": _filled(math.nan),
    "infinite": _filled(math.inf),
    "negative": lambda t: -t if t.is_floating_point() else t + 129,
    "negative zero": _filled(-0.0),
    "huge": _filled(3e38),
    "subnormal": _filled(1e-45),
    "random bytes": _random_bytes,
    "no data": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "needs a gradient": _needs_gradient,
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "result of a graph": lambda t: _needs_gradient(t) * 1,
    "subclass": lambda t: t.as_subclass(OddTensor),
    "inference": _in_inference_mode,
    "lazily negated": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "lazily conjugated": lambda t: t.to(torch.complex64).conj(),
    "array": lambda t: t.resolve_conj().resolve_neg().numpy(),
    "list": lambda t: t.tolist(),
}
BARE_DTYPES = (torch.float8_e4m3fn, torch.uint16)  # torch computes little with them
DTYPES = (
    *BARE_DTYPES,
    *(torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)

REARRANGEMENTS: dict[str, Callable[[Any], Any]] = {
    "the last dropped": lambda x: x[:-1],
    "the first dropped": lambda x: x[1:],
    "reversed": lambda x: x[::-1],
    "twice": lambda x: x + x,
    "a tuple": tuple,
}

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**24, 2**31, 2**53, 2**62, 2**63, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1e-8, 1e-300, 1e300, 3e38, 1e39, math.nan, math.inf, -math.inf),
    *("", "x", "8", "0.9", "adamw", "lamb8bit", "bitsandbytes", "none", b"x", 1j, range(3)),
    *((), (0.9,), (0.0, 0.0), [0.5, 0.5], (0.9, 1.0), ("a", "b"), [[[[[1]]]]], frozenset("a")),
    *({}, {"a": 1}, {0: {}}, {NESTED: {}}, {"state1": {}}, {"step": 1}, object, math.sqrt),
    *(np.float32(0.1), np.float64("nan"), np.int64(3), np.ones(2), np.ones((3, 300))),
    *(torch.tensor(0.5), torch.tensor(3), torch.tensor(math.nan), torch.tensor(1e30)),
    *(torch.tensor(True), torch.tensor(1j), torch.ones(2), torch.ones(256), torch.ones(3, 300)),
    *(torch.tensor(1.0, device="meta"), torch.eye(3).to_sparse(), torch.tensor(2.0**62)),
)
# What a schema allows, to its limits: such a checkpoint loads, and then it must train.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 1e-300, 1e30, 1e39, 1e308, torch.tensor(0.5), torch.tensor(3e38)),
    "betas": ((0.0, 0.0), (0.0, 1 - 1e-16), (1 - 1e-16, 0.0), [0.5, 0.5]),
    "eps": (0.0, 1e-300, 1e39, 1e308),
    "weight_decay": (0.0, 1e-300, 1e39, 1e308),
    "trust_ratio_bounds": ((0.0, 0.0), (1e39, math.inf)),
    "max_unorm": (0.0, 1e308),
    "bias_correction": (False,),
}
STEPS = (0, 1.0, 2**24, 2**30 - 64, 2**30, 2**53, *map(torch.tensor, (3, 2.0**24, 2.0**62)))

KEYS: tuple[Any, ...] = (
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_q8", "exp_avg_absmax"),
    *(
        "exp_avg_sq_q8",
        "exp_avg_sq_absmax",
        "gnorm_vec",
        "compensation",
        "master_low",
        "master",
        "state1",
        "state2",
    ),
    "neuron_second_moment",
    *("qmap1", "qmap2", "absmax1", "absmax2", "max1", "new_max1", "unorm_vec", NESTED),
    *("params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad"),
    *("format_version", "optimizer", "optim_bits", "block_size", "block_wise", "signed_map"),
    *("compat", "min_8bit_size", "adam_w_mode", "decoupled_weight_decay", "maximize", "alpha"),
    *("t_alpha", "trust_ratio", "max_unorm", "state", "param_groups", "name", "extra"),
    *(0, 1, 77, -1, "0", None, 0.5, (1, 2), b"step"),
)


def places(value: Any, path: Path = ()) -> list[Path]:
    """The paths of everything inside of a nest of dicts and lists."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    inner = [(*path, key) for key, _ in items]
    return inner + [deep for key, item in items for deep in places(item, (*path, key))]


def at(saved: StateDict, path: Path) -> Any:
    """What is at a path."""
    found: Any = saved
    for key in path:
        found = found[key]
    return found


def tensors(saved: StateDict) -> list[Path]:
    """The paths of the tensors."""
    return [path for path in places(saved) if isinstance(at(saved, path), Tensor)]


def _put(saved: StateDict, path: Path, value: Any) -> None:
    at(saved, path[:-1])[path[-1]] = value


def _change_tensor(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(tensors(saved)))
    change = TENSOR_CHANGES[draw(st.sampled_from(sorted(TENSOR_CHANGES)))]
    tensor = at(saved, path)
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    if plain and tensor.numel() and tensor.dtype not in BARE_DTYPES:
        _put(saved, path, change(tensor.detach()))


def _cast(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(tensors(saved)))
    tensor, dtype = at(saved, path), draw(st.sampled_from(DTYPES))
    _put(saved, path, tensor if tensor.is_complex() else tensor.to(dtype))


def _swap(draw: Draw, saved: StateDict) -> None:
    one, other = (draw(st.sampled_from(tensors(saved))) for _ in range(2))
    first, second = at(saved, one), at(saved, other)
    _put(saved, one, second)
    _put(saved, other, first)


def _share(draw: Draw, saved: StateDict) -> None:
    one, other = (draw(st.sampled_from(tensors(saved))) for _ in range(2))
    _put(saved, one, at(saved, other))


def _replace(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(places(saved)))
    _put(saved, path, copy.deepcopy(draw(st.sampled_from(VALUES))))


def _set(draw: Draw, saved: StateDict) -> None:
    for group in saved.get("param_groups", ()) or ():
        known = sorted(SETTINGS.keys() & set(group)) if isinstance(group, dict) else []
        if known:
            key = draw(st.sampled_from(known))
            group[key] = copy.deepcopy(draw(st.sampled_from(SETTINGS[key])))


def _set_step(draw: Draw, saved: StateDict) -> None:
    steps = [path for path in places(saved) if path[-1] == "step"]
    if steps:
        _put(saved, draw(st.sampled_from(steps)), copy.deepcopy(draw(st.sampled_from(STEPS))))


def _drop(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(places(saved)))
    del at(saved, path[:-1])[path[-1]]


def _rename(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(places(saved)))
    parent = at(saved, path[:-1])
    if isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS))] = parent.pop(path[-1])


def _add(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(places(saved)))
    parent = at(saved, path[:-1])
    if isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))


def _rearrange(draw: Draw, saved: StateDict) -> None:
    lists = [path for path in places(saved) if isinstance(at(saved, path), (list, tuple))]
    if lists:
        path = draw(st.sampled_from(lists))
        change = REARRANGEMENTS[draw(st.sampled_from(sorted(REARRANGEMENTS)))]
        _put(saved, path, change(at(saved, path)))


def _nest(draw: Draw, saved: StateDict) -> None:
    path = draw(st.sampled_from(places(saved)))
    value = at(saved, path)
    _put(saved, path, draw(st.sampled_from([list, tuple, dict]))([(path[-1], value)]))


ACTIONS: dict[str, Callable[[Draw, StateDict], None]] = {
    "change a tensor": _change_tensor,
    "cast a tensor": _cast,
    "swap tensors": _swap,
    "put a tensor twice": _share,
    "replace a value": _replace,
    "set a hyperparameter": _set,
    "set a step": _set_step,
    "drop a value": _drop,
    "rename a key": _rename,
    "add a key": _add,
    "rearrange a list": _rearrange,
    "nest a value": _nest,
}
_OFTEN = [*4 * ["change a tensor", "set a hyperparameter"], "set a step", "replace a value"]


def damage(draw: Draw, saved: StateDict) -> None:
    """Changes a state dict in place in one to three ways, as far as there is something left."""
    names = st.sampled_from([*ACTIONS, *_OFTEN])
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        if tensors(saved) and isinstance(saved.get("param_groups"), (list, type(None))):
            ACTIONS[name](draw, saved)
