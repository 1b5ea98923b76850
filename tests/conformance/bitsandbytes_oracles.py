"""bitsandbytes' generic implementation on CPU tensors, and a model of its CPU quantizer.

The package has two implementations that run without a GPU. The generic one quantizes to the nearest
code, as the CUDA kernels do; on CPU tensors the dispatcher prefers the other one, whose quantizer
goes through a table of 65,536 equal steps. That table is modelled here for the tests alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.conformance.harness import eager, peer
from tests.reference.quantization import COMPAT_SIGNED_CODEC, COMPAT_UNSIGNED_CODEC

Array = NDArray[Any]

BLOCK = 256
MIN_8BIT_SIZE = 4096
TABLE_SIZE = 65536
CODECS = {
    1: COMPAT_SIGNED_CODEC,
    2: COMPAT_UNSIGNED_CODEC,
}  # by the number of the state in its state dicts
MAPS = {number: codec.values for number, codec in CODECS.items()}


def generic(operator: str, *args: Any) -> Any:
    """Call the generic implementation of one of the package's operators."""
    peer("bitsandbytes")
    op = getattr(torch.ops.bitsandbytes, operator).default
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    with eager():
        return op.redispatch(torch._C.DispatchKeySet(key), *args)


def quantize(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Codes and scales by the nearest code, in blocks of the flattened tensor."""
    table = torch.from_numpy(MAPS[number].copy())
    codes, scales = generic("quantize_blockwise", x, table, BLOCK)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, number: int) -> Tensor:
    table = torch.from_numpy(MAPS[number].copy())
    values: Tensor = generic("dequantize_blockwise", codes, scales, table, BLOCK, torch.float32)
    return values


def sign_fixed(codes: Array, x: Array, number: int) -> Array:
    """Nearest codes as CUDA kernels store them: a negative moment next to 0 takes 126."""
    return np.where((number == 1) & (codes == 127) & (x < 0), 126, codes)


class Generic:
    """An optimizer of the package's generic operators.

    At 8 bits, which have no generic operator of their own, the 32-bit one works on dequantized
    state: what the package's 8-bit optimizers are by definition, and LAMB with its ratio too.
    """

    def __init__(
        self,
        params: list[Tensor],
        name: str = "adam",
        bits: int = 32,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_unorm: float = 0.0,
    ) -> None:
        self.name, self.max_unorm = name, max_unorm
        self.group: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay
        }  # fmt: skip
        self.params = params
        self.state = {p: self._fresh(p, bits) for p in params}
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def _fresh(self, p: Tensor, bits: int) -> dict[str, Any]:
        entries: dict[str, Any] = {"step": 0}
        for number in (1, 2):
            zeros = torch.zeros(p.shape)
            entries[f"state{number}"] = zeros
            if bits == 8 and p.numel() >= MIN_8BIT_SIZE:
                codes, scales = quantize(zeros, number)
                entries |= {f"state{number}": codes, f"absmax{number}": scales}
                entries[f"qmap{number}"] = torch.from_numpy(MAPS[number].copy())
        if self.name in ("lamb", "lars"):
            entries["unorm_vec"] = torch.zeros(1)
        return entries

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            entries = self.state[p]
            entries["step"] += 1
            quantized = "absmax1" in entries
            moments = [entries["state1"], entries["state2"]]
            if quantized:
                moments = [
                    dequantize(entries[f"state{n}"], entries[f"absmax{n}"], n) for n in (1, 2)
                ]
            self._update(p, moments[0], moments[1], entries)
            self.moments[p] = (moments[0], moments[1])
            for n in (1, 2) if quantized else ():
                codes, scales = quantize(moments[n - 1], n)
                entries |= {f"state{n}": codes, f"absmax{n}": scales}

    def _update(self, p: Tensor, m: Tensor, v: Tensor, entries: dict[str, Any]) -> None:
        group = self.group
        norm = float(p.float().norm()) if self.max_unorm else 0.0
        generic(
            "optimizer_update_32bit", self.name, p.grad, p, m, v, entries.get("unorm_vec"),
            self.max_unorm, norm, *group["betas"], 0.0, 0.0, group["eps"], group["weight_decay"],
            entries["step"], group["lr"], 1.0, False,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As the package's releases before 0.49.2 wrote it."""
        state = {index: dict(self.state[p]) for index, p in enumerate(self.params)}
        return {"state": state, "param_groups": [{**self.group, "params": list(state)}]}


def table_index(y: Array) -> Array:
    """Which of the table's equal steps a value in [-1, 1] falls on, in float32."""
    f = np.float32
    result: Array = np.floor((y + f(1)) * f(0.5) * f(TABLE_SIZE - 1) + f(0.5)).astype(np.int64)
    return result


def table_of(values: Array) -> NDArray[np.uint8]:
    """The code of every step: how many mid-points of the map lie strictly below it."""
    f = np.float32
    steps = f(-1) + f(2) * np.arange(TABLE_SIZE, dtype=np.float32) / f(TABLE_SIZE - 1)
    midpoints = (values[:-1] + values[1:]) * f(0.5)
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)


def table_quantize(x: Array, number: int) -> tuple[Array, Array]:
    """Codes and scales of the CPU quantizer; a block of zeros takes code 0."""
    f = np.float32
    blocks = np.zeros((-(-x.size // BLOCK), BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: x.size] = x.reshape(-1)
    scales = np.abs(blocks).max(axis=1)
    zero = scales == 0
    y = blocks * (f(1) / np.where(zero, f(1), scales))[:, None]
    codes = table_of(MAPS[number])[table_index(np.clip(y, f(-1), f(1)))]
    codes[zero] = 0
    return codes.reshape(-1)[: x.size].reshape(x.shape), scales


def table_dequantize(codes: Array, scales: Array, number: int) -> Array:
    factors = np.repeat(scales, BLOCK)[: codes.size].reshape(codes.shape)
    result: Array = MAPS[number][codes] * factors
    return result
