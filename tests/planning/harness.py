"""Tools of the planning tests: models of odd shapes, and what torch itself counts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, list_optimizers, resolve
from optfactory.errors import ConfigError
from optfactory.planning.memory_plan import MemoryPlan
from optfactory.planning.sizes import OF_OPTIMIZERS, STATE, Share
from tests.sampling import spread

NAMES = list_optimizers()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Odd(nn.Module):
    """Shapes on either side of every limit: 8-bit sizes and rows, blocks, paging."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 100)
        self.body = nn.Linear(100, 513)
        self.wide = nn.Linear(513, 400)  # large enough to be paged
        self.conv = nn.Conv2d(7, 70, 3)
        self.norm = nn.BatchNorm1d(513)
        shapes = {"flat": (120_001,), "narrow": (200, 63), "row": (200, 64), "cube": (3, 5, 300)}
        shapes |= {"exact": (4096,), "short": (4095,), "scalar": (), "empty": (0, 5), "one": (1, 1)}
        shapes |= {"largest_resident": (99_999,), "least_paged": (100_000,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Tied(nn.Module):
    """A language model's usual sharing: a tied head, a frozen part, buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.norm = nn.BatchNorm1d(96)
        self.frozen = nn.Linear(96, 96).requires_grad_(False)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.norm  # a shared module, with its buffers
        self.register_buffer("mask", torch.ones(7, 3, dtype=torch.bool))
        self.register_buffer("cache", torch.ones(11, dtype=torch.float64), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.again(self.norm(self.embed(tokens)))))


def on_meta(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return build().to(dtype)


RULES: dict[str, dict[str, Any]] = {
    "bits": {
        "wide": {"match": "wide.*", "optim_bits": 8},
        "flat": {"match": ["flat", "row"], "optim_bits": 32},
    },
    "pages": {
        "paged": {"regex": "weight$", "is_paged": True},
        "resident": {"match": "flat", "is_paged": False},
    },
    "sizes": {
        "all": {"ndim": ">=1", "optim_bits": 8, "min_8bit_size": 0, "block_size": 64},
        "none": {"match": "flat", "min_8bit_size": 1_000_000},
    },
}

# Settings that change what state there is; those that a name cannot have are left out.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bits": {"optim_bits": 8},
    "smallest": {"min_8bit_size": 0},
    "larger": {"min_8bit_size": 50_000},
    "blocks": {"block_size": 64},
    "tensor_wise": {"block_wise": False},
    "clipping": {"percentile_clipping": 50},
    "amsgrad": {"amsgrad": True},
    "symmetric": {"signed_map": "symmetric"},
    "compat": {"compat": "bitsandbytes"},
    "compat_clip": {"compat": "bitsandbytes", "trust_ratio": "clip"},
    "stochastic": {"param_rounding": "stochastic", "seed": 3},
    "kahan": {"param_rounding": "kahan"},
    "split": {"master_weights": "split"},
    "kahan_clipping": {"param_rounding": "kahan", "percentile_clipping": 5, "block_size": 4096},
    **{f"rules_{key}": {"param_groups": rules} for key, rules in RULES.items()},
}


def possible(name: str, setting: str) -> bool:
    with contextlib.suppress(ConfigError):
        return bool(resolve(name, **SETTINGS[setting]))
    return False


# Each case is resolved to see whether it can be: those of all names would take seconds a run.
FOR_TESTS = ("adam", "adamw8bit", "lamb", "paged_adamw8bit")
CASE_NAMES = list(dict.fromkeys((*spread(NAMES, 16), *FOR_TESTS)))
CASES = [(name, setting) for name in CASE_NAMES for setting in SETTINGS if possible(name, setting)]


def dtype_of(setting: str) -> torch.dtype:
    """A parameter dtype that a setting works with; others take turns."""
    if "kahan" in setting or setting in ("stochastic", "split"):
        return torch.bfloat16
    return DTYPES[list(SETTINGS).index(setting) % 3]


def parameters_of(optimizer: Optimizer2State) -> list[Tensor]:
    groups = optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.requires_grad]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that torch keeps for tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({(s.data_ptr(), s.nbytes()): s.nbytes() for s in storages}.values())


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch has a tensor from a file."""
    return tensor.untyped_storage().filename is not None


def width_of(state: Mapping[str, Tensor]) -> int:
    """The bits of a parameter's states; what storing it lost is as wide as the parameter."""
    kinds = {value.dtype for key, value in state.items() if key != "compensation"}
    halves = any(key.endswith("_q4") for key in state)  # two codes a byte
    narrow = {torch.uint8: 4 if halves else 8, torch.bfloat16: 16}
    return next((bits for kind, bits in narrow.items() if kind in kinds), 32)


def counted_state(optimizer: Optimizer2State) -> Counter[tuple[int, bool]]:
    """Bytes of allocated state by (width of its parameter's state, whether it is mapped)."""
    found: Counter[tuple[int, bool]] = Counter()
    for state in optimizer.state.values():
        bits = width_of(state)
        for value in state.values():
            found[bits, is_mapped(value)] += value.untyped_storage().nbytes()
    return Counter({key: nbytes for key, nbytes in found.items() if nbytes})


def planned_state(plan: MemoryPlan) -> Counter[tuple[int, bool]]:
    """The same of a plan."""
    found: Counter[tuple[int, bool]] = Counter()
    for share in plan.shares:
        if share.what == STATE:
            found[share.bits, share.place != "resident"] += share.nbytes
    return found


def sized(plan: MemoryPlan, what: str) -> dict[int, int]:
    """Bytes of one kind by bits of an element."""
    found: Counter[int] = Counter()
    for share in plan.shares:
        if share.what == what:
            found[share.bits] += share.nbytes
    return dict(found)


def state_shares(plan: MemoryPlan) -> tuple[Share, ...]:
    return tuple(share for share in plan.shares if share.what in OF_OPTIMIZERS)
