"""Clipping, skipping and rounding of the portable backend; kernels/shared/element.cuh in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optfactory.backends.walk import numbered_runs
from optfactory.rules.options import CLIP_HISTORY, KernelOptions
from optfactory.state import masters
from optfactory.state.specs import HISTORY_KEY, LOSS_KEY, LOW_KEY, MASTER_KEY
from optfactory.step.slots import Slot

_UINT32 = 0xFFFFFFFF


def clip_factor(slot: Slot, sum_of_squares: Tensor, scalars: Mapping[str, float]) -> Tensor:
    """What percentile clipping multiplies the gradient by; notes its norm in the state."""
    history, step = slot.state[HISTORY_KEY], _step_number(scalars)
    squares = sum_of_squares.float()
    if not squares.isfinite():
        return torch.ones_like(squares)
    if not history.any():  # zeros would stop the parameter for as many steps as they stay
        history.fill_(squares)
    history[step % CLIP_HISTORY] = squares
    norm = squares.sqrt()
    clip = history.sort().values[int(scalars["percentile"])].sqrt()
    return torch.where(norm > clip, clip / norm, 1.0)


def _step_number(scalars: Mapping[str, float]) -> int:
    """The step; counts that no run reaches, which a state may hold all the same, are 0."""
    step = scalars["step"] + scalars["step_high"] * 2**24
    return int(step) if 0 <= step < 2**30 else 0


def stays(gradient: Tensor, options: KernelOptions) -> Tensor | None:
    """Which elements stay out of the step; None if all take part."""
    masks = []
    if options.skips_zeros:
        masks.append(gradient == 0)
    if options.nonfinite != "propagate":
        masks.append(~gradient.isfinite())
    return None if not masks else torch.stack(masks).any(dim=0)


def same_signs(a: Tensor, b: Tensor) -> Tensor:
    """Where two numbers have the same sign; their product could underflow."""
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))


def stored_value(slot: Slot) -> Tensor:
    """The parameter in float32, with what earlier stores lost of it."""
    p, key = slot.local.detach(), slot.layout.kept_key
    return masters.master_of(p, key, slot.state[key]) if key else p.float()


def store(slot: Slot, value: Tensor, scalars: Mapping[str, float]) -> None:
    """Round a float32 value to the parameter's dtype, as its options say."""
    p, rounding = slot.local.detach(), slot.layout.options.rounding
    if rounding == "split":
        upper, low = masters.split(value)
        p.copy_(upper)
        slot.state[LOW_KEY].copy_(low)
        return
    if rounding == "stochastic":
        value = rounded_at_random(value, p.dtype, random_bits(slot, scalars))
    p.copy_(value)
    if rounding == "kahan":
        stored = p.float()
        slot.state[LOSS_KEY].copy_(torch.where(stored.isfinite(), value - stored, 0.0))
    elif rounding == "fp32":
        slot.state[MASTER_KEY].copy_(value)


def rounded_at_random(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 numbers of the dtype, away from zero with the probability of what is cut off."""
    bits = x.view(torch.int32).long() & _UINT32
    magnitude, sign = bits & 0x7FFFFFFF, bits & 0x80000000
    cut = 16 if dtype == torch.bfloat16 else 13
    raised = (magnitude + (random & ((1 << cut) - 1))) >> cut << cut
    result = _from_bits(raised | sign)
    if dtype == torch.float16:
        units = x.abs() * 2.0**24
        whole = units.floor()
        up = (units - whole) * 2.0**16 >= 2.0**16 - (random & 0xFFFF).float()
        small = torch.copysign((whole + up) * 2.0**-24, x)
        result = torch.where(x.abs() < 2.0**-14, small, result)
    return torch.where(x.isfinite(), result, x)


def _from_bits(bits: Tensor) -> Tensor:
    signed = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def random_bits(slot: Slot, scalars: Mapping[str, float]) -> Tensor:
    """32 bits for each element, from seed, parameter, step and element alone; int64."""
    return _bits(slot, _key(slot, scalars))


def code_bits(slot: Slot, scalars: Mapping[str, float]) -> Tensor:
    """As `random_bits`, but others: for the codes of states."""
    return _bits(slot, _mix((_key(slot, scalars) + 0x9E3779B9) & _UINT32))


def bits_of_state(words: Tensor, state: int, bits: int = 32) -> Tensor:
    """What a state, by its number, takes of these: the leading bits are others for each."""
    if state == 1 and bits < 32:
        return words & ((1 << bits) - 1)
    by = 16 * (state & 1) + 8 * (state >> 1 & 1) + 4 * (state >> 2 & 1)
    return ((words << by & _UINT32) | words >> (32 - by)) >> (32 - bits)


def _key(slot: Slot, scalars: Mapping[str, float]) -> Tensor:
    key = torch.tensor(int(scalars["seed"]), dtype=torch.int64, device=slot.local.device)
    return _mix(_mix(_mix(key) ^ slot.number) ^ _step_number(scalars))


def _bits(slot: Slot, key: Tensor) -> Tensor:
    p = slot.local
    element = torch.arange(p.numel(), dtype=torch.int64, device=p.device)
    if slot.layout.piece is not None:  # of the whole tensor
        runs = numbered_runs(slot.layout.piece.box, slot.name)
        length = max(runs.length, 1)
        element = runs.first + element // length * runs.stride + element % length
    return _mix(_mix((element >> 32) ^ key) ^ (element & _UINT32)).view(p.shape)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)
