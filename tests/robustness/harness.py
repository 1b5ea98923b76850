"""Tools of the robustness tests: the same examples at every run, numbers at the limits of their
dtype, and tensors cut from larger memory that must not change around them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from optfactory import Optimizer2State
from tests import families
from tests.numerics.harness import DTYPES

# Examples are vectors too; tests/muon has optimizers of matrices. Every third has all widths and
# families: see tests/sampling.py.
NAMES = sorted(families.ELEMENT_WISE_NAMES, key=lambda name: name[::-1])
# RAdam steps by its momentum, whose unit is the gradient's, as long as the variance is unknown.
ADAMS = [n for n in NAMES if families.has_adams_moments(n) and "radam" not in n]
FAMILIES = families.ELEMENT_WISE

# Kernels that do more than the rule, each with a dtype: few, because every one is compiled.
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "one scale, clipped": (
        torch.float32,
        {"optim_bits": 8, "min_8bit_size": 64, "block_wise": False, "percentile_clipping": 20},
    ),
    "stochastic": (
        torch.bfloat16,
        {
            "optim_bits": 8,
            "min_8bit_size": 64,
            "param_rounding": "stochastic",
            "state_rounding": "stochastic",
            "seed": 7,
        },
    ),
    "kahan, skipping": (
        torch.float16,
        {"param_rounding": "kahan", "skip_zeros": True, "nonfinite": "skip_element"},
    ),
}
# Kernels stop the process at undefined behaviour: a step of .ci/run.
SANITIZED = "-fsanitize" in os.environ.get("CXX", "")

Shape = tuple[int, ...]
Array = NDArray[np.float64]


def examples(count: int) -> settings:
    """So many examples, always the same ones, and the first that fails is reported as it is.

    OPTFACTORY_EXAMPLES=20 looks for others, twenty times as many, and simplifies what fails.
    """
    factor = int(os.environ.get("OPTFACTORY_EXAMPLES", "0"))
    if factor:
        return settings(max_examples=factor * count, database=None, deadline=None)
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=phases
    )


# ---- numbers ---------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int, torch.finfo], Array]


def _signs(rng: np.random.Generator, n: int) -> Array:
    return rng.choice([-1.0, 1.0], n)


def _with_negative_extreme(rng: np.random.Generator, n: int, info: torch.finfo) -> Array:
    x = rng.standard_normal(n)
    x[rng.integers(n)] = -10.0
    return x


REGIMES: dict[str, Draw] = {
    "zero": lambda rng, n, info: np.zeros(n),
    "minus zero": lambda rng, n, info: -np.zeros(n),
    "normal": lambda rng, n, info: rng.standard_normal(n),
    "decades": lambda rng, n, info: rng.standard_normal(n) * 10 ** rng.uniform(-7, 1, n),
    "huge": lambda rng, n, info: _signs(rng, n) * info.max * rng.uniform(0.1, 1, n),
    "largest": lambda rng, n, info: _signs(rng, n) * info.max,
    "denormal": lambda rng, n, info: _signs(rng, n) * info.tiny * rng.uniform(0, 1, n),
    "smallest": lambda rng, n, info: _signs(rng, n) * info.smallest_normal * info.eps,
    "all equal": lambda rng, n, info: np.full(n, rng.standard_normal()),
    "all negative": lambda rng, n, info: -np.abs(rng.standard_normal(n)),
    "negative extreme": _with_negative_extreme,
    "one of many": lambda rng, n, info: np.eye(1, n, rng.integers(n))[0] * rng.standard_normal(),
}


@dataclass(frozen=True)
class Numbers:
    """A recipe for a tensor: runs of numbers of these kinds, one after the other or mixed."""

    kinds: tuple[str, ...]
    seed: int
    mixed: bool

    def array(self, shape: Shape, dtype: torch.dtype) -> Array:
        """The numbers in float64, before they are rounded to the dtype."""
        rng, count = np.random.default_rng(self.seed), math.prod(shape)
        cuts = np.sort(rng.integers(0, count + 1, len(self.kinds) - 1))
        lengths = np.diff([0, *cuts, count])
        runs = [
            REGIMES[kind](rng, int(n), torch.finfo(dtype))
            for kind, n in zip(self.kinds, lengths, strict=True)
            if n
        ]
        flat = np.concatenate([*runs, np.zeros(0)])
        return (rng.permutation(flat) if self.mixed else flat).reshape(shape)

    def tensor(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The tensor, contiguous."""
        return torch.from_numpy(self.array(shape, dtype)).to(dtype)


def numbers(*kinds: str) -> st.SearchStrategy[Numbers]:
    """Recipes of up to four of these kinds; of any if none is named."""
    chosen = st.lists(st.sampled_from(kinds or tuple(REGIMES)), min_size=1, max_size=4)
    return st.builds(Numbers, chosen.map(tuple), st.integers(0, 2**32 - 1), st.booleans())


# ---- shapes and memory -----------------------------------------------------------------------

dtypes = st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__)

_EDGES = (1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097)
_lengths = st.sampled_from(_EDGES) | st.integers(1, 5000)
_rows = st.sampled_from([64, 65, 255, 256, 257, 300, 513]) | st.integers(1, 700)


def _matrix(rows: int, columns: int) -> Shape:
    return (min(rows, max(1, 5000 // columns)), columns)


shapes: st.SearchStrategy[Shape] = st.one_of(
    st.tuples(_lengths),
    st.builds(_matrix, st.integers(1, 60), _rows),
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4)),
    st.sampled_from([(), (0,), (3, 0, 5), (1, 4096), (4096, 1), (16, 256)]),
)

GUARD = {torch.uint8: 0xA5}
_GUARD = 7.5  # of all floats: exact, and no result of a test


class Cut:
    """A tensor with given values in the midst of guarded memory.

    Args:
        values: what the tensor holds.
        order: its dimensions from the outermost in memory to the innermost.
        steps, before, after: of each dimension in memory: the distance of neighbours, and the
            elements around them.
        offset: elements in front of all.
    """

    def __init__(
        self, values: Tensor, order: Shape, steps: Shape, before: Shape, after: Shape, offset: int
    ) -> None:
        lengths = [values.shape[d] * steps[k] for k, d in enumerate(order)]
        sizes = [b + n + a for b, n, a in zip(before, lengths, after, strict=True)]
        self._guard = GUARD.get(values.dtype, _GUARD)
        self._place = tuple(
            slice(b, b + n, s) for b, n, s in zip(before, lengths, steps, strict=True)
        )
        self._sizes, self._offset = sizes, offset
        self._inverse = tuple(int(k) for k in np.argsort(order))
        self.storage = torch.full((offset + math.prod(sizes) + 1,), self._guard, dtype=values.dtype)
        self.view = self._cut(self.storage)
        self.view.copy_(values)

    def _cut(self, storage: Tensor) -> Tensor:
        box = storage[self._offset : -1].view(self._sizes)
        return box[self._place].permute(self._inverse)

    def assert_untouched_around(self, what: str) -> None:
        """Everything but the tensor itself is as it was."""
        around = torch.ones(self.storage.shape, dtype=torch.bool)
        self._cut(around).fill_(False)
        wrong = self.storage.detach()[around] != self._guard
        assert not wrong.any(), f"{what}: {int(wrong.sum())} elements around it were written"


@dataclass(frozen=True)
class Memory:
    """How to cut a tensor of some number of dimensions; `Cut` says what the fields mean."""

    order: Shape
    steps: Shape
    before: Shape
    after: Shape
    offset: int

    def cut(self, values: Tensor) -> Cut:
        return Cut(values, self.order, self.steps, self.before, self.after, self.offset)


@st.composite
def memories(draw: st.DrawFn, ndim: int) -> Memory:
    """Contiguous, offset, transposed, strided and padded memory."""

    def each(choices: list[int]) -> Shape:
        return tuple(draw(st.tuples(*(st.sampled_from(choices) for _ in range(ndim)))))

    if draw(st.booleans()):  # contiguous, but for where it begins
        none = (0,) * ndim
        return Memory(tuple(range(ndim)), (1,) * ndim, none, none, draw(st.integers(0, 9)))
    order = tuple(draw(st.permutations(range(ndim))))
    steps = each([1, 1, 2, 3])
    return Memory(order, steps, each([0, 1, 2]), each([0, 1, 3]), draw(st.integers(0, 9)))


def fence_states(optimizer: Optimizer2State, margin: int = 67) -> list[tuple[str, Cut]]:
    """Moves all state into guarded memory, at an odd place."""
    fences = []
    for number, p in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[p]
        for key, tensor in state.items():
            shape = tuple(tensor.shape)
            none, ones = (0,) * len(shape), (1,) * len(shape)
            cut = Cut(tensor, tuple(range(len(shape))), ones, none, none, margin)
            state[key] = cut.view
            fences.append((f"{key} of parameter {number}", cut))
    return fences


# ---- comparisons -----------------------------------------------------------------------------


def raw(tensor: Tensor) -> bytes:
    """The tensor's bytes in logical order; strides of a single element do not count."""
    x = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return x.view(torch.uint8).numpy().tobytes() if x.numel() else b""


def everything(optimizer: Optimizer2State) -> dict[str, bytes]:
    """The bytes of all parameters and states, whatever their places in memory."""
    found: dict[str, bytes] = {}
    params: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(params):
        found[f"p{number}"] = raw(p)
        for key, tensor in optimizer.state[p].items():
            found[f"p{number}.{key}"] = raw(tensor)
    return found


def assert_same(one: dict[str, bytes], other: dict[str, bytes], what: str) -> None:
    """Equal, bit for bit; names what is not."""
    assert one.keys() == other.keys(), what
    different = [key for key in one if one[key] != other[key]]
    assert not different, f"{what}: {different} differ"
