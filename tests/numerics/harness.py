"""Tools of the numerics tests: tensors to train, stored states as arrays, comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info
from optfactory.config.names import width_of
from tests.devices import here, host, randn
from tests.families import states_of, suited
from tests.reference import reference_of
from tests.reference.base import Options, State, Update
from tests.reference.quantization import BLOCK, SMALL
from tests.reference.quantized import Expected, Quantized, step_8bit
from tests.reference.rounding import Stored, compensated, joined, nearest, own_master, stochastic
from tests.reference.tracked import UNIT, spacing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [
    (1,), (255,), (256,), (257,), (4095,), (4096,), (4097,),
    (70, 64), (33, 300), (64, 8, 3, 3), (2100, 2),
]  # fmt: skip
# float32 error bounds are first order and count the operations of the paper's formula, not
# those of an implementation's factorization, hence a factor.
SLACK = 2.0


def array(tensor: Tensor) -> NDArray[np.float64]:
    """A copy of a tensor in float64; exact for every dtype that a parameter may have."""
    return host(tensor).to(torch.float64).numpy().copy()


def bits(tensor: Tensor) -> NDArray[Any]:
    """The tensor's bytes in logical order, for comparisons that NaN must not escape."""
    return host(tensor).reshape(-1).contiguous().view(torch.uint8).numpy().copy()


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Trainable tensors of about 0.1 N(0, 1)."""
    generator = torch.Generator().manual_seed(1)
    return [(0.1 * randn(shape, generator)).to(dtype).requires_grad_() for shape in shapes]


def own_parameters(
    name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    """Trainable tensors of those shapes that an optimizer steps by its own rule."""
    return parameters(dtype, suited(name, shapes))


def gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Gradients over three decades, a tenth of them zero, with one first block all zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):  # every device gets the same numbers
        decade = 10 ** (-3 * torch.rand(shape, generator=generator))
        g = torch.randn(shape, generator=generator) * decade
        g = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, g)
    if g.numel() > 4096:
        g.view(-1)[:300] = 0.0
    return here(g.to(dtype))


def options_of(name: str, **asked: Any) -> Options:
    """The family's reference defaults with what a test asked for."""
    info = get_optimizer_info(name)
    defaults = reference_of(info.family).defaults
    defaults = replace(defaults, state_rounding=info.defaults["state_rounding"])
    known = {field.name for field in fields(defaults)}
    chosen = {key: value for key, value in asked.items() if key in known}
    chosen["width"] = width_of({"optim_bits": 8, **asked, **info.states})
    if chosen.get("seed", 0) is None:
        del chosen["seed"]  # drawn, for noise that no default has
    return replace(defaults, **chosen)


def stated_bits(name: str, asked: dict[str, Any]) -> int:
    """The width that a name or what was asked for says."""
    return get_optimizer_info(name).optim_bits or asked.get("optim_bits", 32)


def has_codes(name: str, p: Tensor, asked: dict[str, Any]) -> bool:
    """The stated rule: codes iff asked for, numel >= min_8bit_size and rows of 64 at least.

    All is one row where scales are not per row: one for the tensor, or in bitsandbytes' grid. Of
    4 bits, rows of an even number.
    """
    wide = stated_bits(name, asked)
    flat = not asked.get("block_wise", True) or asked.get("compat") == "bitsandbytes"
    row = p.numel() if p.ndim < 2 or flat else p.numel() // max(p.shape[0], 1)
    is_large = p.numel() >= asked.get("min_8bit_size", 4096) and row >= 64
    own = p.numel() if p.ndim < 2 else p.numel() // max(p.shape[0], 1)
    return is_large and (wide == 8 or (wide == 4 and own % 2 == 0))


def quantized(state: dict[str, Any], name: str) -> Quantized:
    """Codes and scales that an optimizer stores for one state, before or after steps."""
    codes, scales = state[f"{name}_q8"], state[f"{name}_absmax"]
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    return Quantized(host(codes).numpy().copy(), host(scales).numpy().copy())


def placed(state: dict[str, Any], name: str, width: str, signed: bool, shape: Any) -> Quantized:
    """The same of any width; codes of small floats by their places in the order of values."""
    if width not in SMALL:
        return quantized(state, name)
    codes, scales = state[f"{name}{ENDS[width]}"], state[f"{name}_scale"]
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    stored = host(codes).numpy().astype(np.int64)
    if width == "4bit":
        stored = np.stack([stored >> 4, stored & 15], axis=-1)
    places = SMALL[width][signed][1][stored.reshape(tuple(shape))]
    assert (places >= 0).all(), "there are codes of NaN, or of -0"
    return Quantized(places.astype(np.uint8), host(scales).numpy().copy())


# Of the keys of codes, by width.
ENDS = {"4bit": "_q4", "8bit": "_q8", "fp8": "_fp8"}


def stored_state(state: dict[str, Any], names: Iterable[str]) -> State:
    """The state of one parameter as the optimizer stores it; 8-bit moments are left out."""
    history = array(state["gnorm_vec"]) if "gnorm_vec" in state else None
    moments = {name: array(state[name]) for name in names if name in state}
    return State(int(state["step"]), moments, history)


def assert_parameter(p: Tensor, state: dict[str, Any], stored: Stored, what: str) -> None:
    """p is the float64 result within its float32 error, rounded to p's dtype as asked for."""
    got = array(p)
    assert_between(got, *stored.parameter(), f"{what}: p")
    kept = {"split": "master_low", "fp32": "master"}.get(stored.rounding, "")
    assert {"master_low", "master"} & state.keys() == ({kept} if kept else set()), what
    if kept:
        assert state[kept].dtype == (torch.int16 if kept == "master_low" else torch.float32)
        master = joined(got, array(state[kept])) if kept == "master_low" else array(state[kept])
        assert stored.accepts_master(master, got), f"{what}: {kept}"
    if stored.rounding != "kahan":
        assert "compensation" not in state, what
        return
    assert state["compensation"].dtype == p.dtype
    rest = array(state["compensation"])
    assert_between(rest, *stored.compensation(got), f"{what}: compensation")


def assert_between(
    got: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], what: str
) -> None:
    """low <= got <= high, and NaN where these are NaN."""
    wrong = ~((low <= got) & (got <= high)) & ~(np.isnan(low) & np.isnan(got))
    where = np.argwhere(wrong)[:3].tolist()
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} elements wrong, first at {where}: "
        f"got {got[wrong][:3]}, want {low[wrong][:3]} to {high[wrong][:3]}"
    )


def assert_close(got: NDArray[np.float64], want: Any, what: str) -> None:
    """Equal within the float32 bound, plus half a unit in the last place."""
    tolerance = SLACK * want.error + 0.5 * spacing(want.value, "float32")
    finite = np.isfinite(want.value)
    same_kind = np.where(
        finite, np.isfinite(got), (got == want.value) | (np.isnan(got) & np.isnan(want.value))
    )
    assert same_kind.all(), f"{what}: non-finite elements differ"
    excess = np.abs(got[finite] - want.value[finite]) / tolerance[finite].clip(min=1e-300)
    worst = excess.max(initial=0.0)
    assert worst <= 1, f"{what}: off by {worst:.3g} x the tolerance"


def assert_halved(got: Tensor, want: Any, what: str) -> None:
    """A bfloat16 state is one of the two numbers next to what it should be, or that itself."""
    assert got.dtype == torch.bfloat16, what
    ends = [nearest(want.value + sign * SLACK * want.error, "float32") for sign in (-1, 1)]
    found = [
        stochastic(end, np.full(end.shape, word, np.uint32), torch.bfloat16)
        for end in ends
        for word in (0, 0xFFFF)
    ]
    assert_between(array(got), np.minimum.reduce(found), np.maximum.reduce(found), what)


@dataclass
class Ambiguity:
    """How many codes were compared and how many lay so near a boundary that two may stand."""

    compared: int = 0
    ambiguous: int = 0
    random: bool = False  # rounded so, where two may stand of all

    def check(self) -> None:
        assert self.compared or self.random
        assert self.ambiguous <= 2 + 2e-3 * self.compared


def assert_quantized(
    got: Quantized, name: str, want: Expected, what: str, count: Ambiguity
) -> None:
    """Stored scales are the block scales; stored codes are the exact nearest ones."""
    shape = want.value.value.shape
    assert got.codes.shape == shape
    assert got.scales.shape == want.scales_shape()
    scales, error = want.scales()
    assert (np.abs(got.scales - scales) <= SLACK * error).all(), f"{what}: {name} scales"
    low, high = want.codes(got.scales, SLACK)
    wrong = (got.codes < low) | (got.codes > high)
    where = np.argwhere(wrong)[:3].tolist()
    assert not wrong.any(), (
        f"{what}: {name} has {wrong.sum()} wrong codes of {wrong.size}, first at {where}: "
        f"got {got.codes[wrong][:3]}, want {low[wrong][:3]} to {high[wrong][:3]}"
    )
    if want.coding.random:
        count.random = True
        return
    count.compared += wrong.size
    count.ambiguous += int((low != high).sum())


class Twin:
    """An optimizer beside its reference, which starts every step from the stored numbers."""

    def __init__(self, name: str, params: list[Tensor], **asked: Any) -> None:
        self.name, self.asked, self.params = name, asked, params
        self.options = options_of(name, **asked)
        size = asked.get("block_size", BLOCK)
        self.block_size = max(size // 2, 64) if self.options.width == "4bit" else size
        self.reference = reference_of(get_optimizer_info(name).family)
        self.step_reference = self.reference.step
        self.optimizer = build_optimizer(name, params, **asked)
        self.states = [state.name for state in states_of(self.optimizer.config)]
        self.optimizer.init_states()
        self.count = Ambiguity()

    def step(self, seed: int, grads: list[Tensor] | None = None) -> list[Update]:
        """One step of the optimizer, each parameter compared with the reference."""
        for index, p in enumerate(self.params):
            p.grad = (
                gradient(tuple(p.shape), p.dtype, 1000 * seed + index).to(p.device)
                if grads is None
                else grads[index]
            )
        expected = [self._expect(p) for p in self.params]
        self.optimizer.step()
        for number, (p, (update, codes)) in enumerate(zip(self.params, expected, strict=True)):
            self._compare(number, p, update, codes)
        return [update for update, _ in expected]

    def _expect(self, p: Tensor) -> tuple[Update, dict[str, Expected] | None]:
        state, grad = self.optimizer.state[p], p.grad
        assert grad is not None
        seen, before = array(p), stored_state(state, self.states)
        if "compensation" in state:
            seen = compensated(seen, array(state["compensation"]))
        if "master_low" in state:
            seen = joined(seen, array(state["master_low"]))
        if "master" in state:
            seen = own_master(seen, array(state["master"]), p.dtype)
        coded, width = has_codes(self.name, p, self.asked), self.options.width
        keys = {f"{name}{ENDS[width]}" if coded else name for name in self.states}
        what = f"{tuple(p.shape)}: want {width if coded else 'no'} codes, got {list(state)}"
        assert keys <= set(state), what
        if not coded:
            return self.step_reference(seen, array(grad), before, self.options), None
        return step_8bit(
            self.step_reference, seen, array(grad),
            {name: self._placed(p, name) for name in self.states}, self._signs,
            before, self.options, self.block_size,
        )  # fmt: skip

    @property
    def _signs(self) -> dict[str, bool]:
        return {**self.reference.states, **self.reference.facts.more_states}

    def _placed(self, p: Tensor, name: str) -> Quantized:
        state = self.optimizer.state[p]
        return placed(state, name, self.options.width, self._signs[name], p.shape)

    def _compare(
        self, number: int, p: Tensor, update: Update, codes: dict[str, Expected] | None
    ) -> None:
        state = self.optimizer.state[p]
        what = f"{self.name} {tuple(p.shape)} {p.dtype} step {update.step}"
        assert int(state["step"]) == update.step, what
        stored = Stored.of(update, p.dtype, self.options, SLACK, number)
        assert_parameter(p, state, stored, what)
        if self.options.percentile_clipping < 100:
            assert state["gnorm_vec"].dtype == torch.float32
            np.testing.assert_allclose(
                array(state["gnorm_vec"]), update.gnorm_vec, rtol=2 * UNIT, atol=0, err_msg=what
            )
        assert set(update.moments) == set(self.states), what
        for name, moment in update.moments.items():
            if codes is not None:
                assert_quantized(self._placed(p, name), name, codes[name], what, self.count)
            elif stated_bits(self.name, self.asked) == 16:
                assert_halved(state[name], moment, f"{what}: {name}")
            else:
                assert state[name].dtype == torch.float32
                assert_close(array(state[name]), moment, f"{what}: {name}")
