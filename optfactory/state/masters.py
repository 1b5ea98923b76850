"""Float32 masters of 16-bit parameters, from what is kept beside these, and back.

The master of a bfloat16 parameter can be cut in two (`split`): with m its pattern, the parameter
has p = (m + 0x8000) >> 16, which rounds half away from zero, and m - (p << 16) is kept as int16, so
that pairs and masters are one to one. With ties to even they could not be: an even p would have
65537 masters. A NaN has one pattern for each sign, as others would round to infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfactory.state.specs import KEPT_KEYS, LOSS_KEY, LOW_KEY

_HALF, _UNIT = 1 << 15, 1 << 16
_SIGN = -(1 << 31)
_NAN = 0x7FC00000


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 parameter and the int16 half of float32 numbers.

    >>> upper, low = split(torch.tensor([1.0 + 2**-8, 1.0 - 2**-12]))
    >>> upper.tolist(), low.tolist()
    ([1.0078125, 1.0], [-32768, -4096])
    """
    bits = master.contiguous().view(torch.int32)
    bits = torch.where(master.isnan(), bits & _SIGN | _NAN, bits)
    upper = (bits + _HALF) >> 16
    low = ((bits & (_UNIT - 1)) ^ _HALF) - _HALF  # the lower half, whose first bit is a sign
    return upper.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def joined(p: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of which a parameter and its kept half were made.

    Beside a parameter that was set to 0, a half below 0 counts as 0: it would borrow from the sign.
    """
    upper = p.float().contiguous().view(torch.int32)
    half = torch.where(p == 0, low.clamp_min(0), low)
    return (upper + half.to(torch.int32)).view(torch.float32)


def master_of(p: Tensor, key: str, kept: Tensor) -> Tensor:
    """A 16-bit parameter in float32, with what is kept beside it.

    Args:
        key: what that is.
    """
    wide = p.float()
    if key == LOSS_KEY:
        return wide + kept.float()
    if key == LOW_KEY:
        return joined(p, kept)
    # A master that does not round to the parameter is of one that was changed from outside.
    same = kept.to(p.dtype).view(torch.int16) == p.contiguous().view(torch.int16)
    return torch.where(same, kept, wide)


def carry(p: Tensor, old: Mapping[str, Any], new: Mapping[str, Tensor], key: str) -> None:
    """Keep what was kept beside a parameter in another way; what does not fit is left out.

    Args:
        p: the parameter, or what this process holds of it.
        old: what was kept, by its key; of the parameter's shape.
        new: the parameter's state, in which it is to be kept under `key`.
    """
    values = p.detach()
    for given in KEPT_KEYS:
        kept = old.get(given)
        if given != key and isinstance(kept, Tensor) and kept.shape == p.shape:
            master = master_of(values, given, kept.to(p.device))
            new[key].copy_(_kept_for(key, values, master))


def _kept_for(key: str, p: Tensor, master: Tensor) -> Tensor:
    """What is to be kept under another key so that a parameter has this master, or nearly this.

    Masters that are no neighbours of the parameter are none of its, and dropped.
    """
    wide = p.float()
    if key == LOW_KEY:
        # As signed magnitudes, patterns count the numbers between two.
        low = master.contiguous().view(torch.int32).long() - wide.contiguous().view(torch.int32)
        low = torch.where((low.abs() <= _HALF) & master.isfinite(), low, 0)
        return low.clamp_max(_HALF - 1).to(torch.int16)
    # Half a unit away, it may round to the other neighbour.
    near = torch.where(master.to(p.dtype) == p, master, torch.nextafter(master, wide))
    if key == LOSS_KEY:
        rest = near - wide
        return torch.where((near.to(p.dtype) == p) & rest.isfinite(), rest, 0.0).to(p.dtype)
    return near
