"""The portable backend: the rule texts as plain torch operations, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optfactory.codec import dequantize_blockwise, quantize_blockwise
from optfactory.codegen import torch_trust_ratio, torch_update
from optfactory.plan import Bucket, Slot
from optfactory.quantmap import map_for
from optfactory.rules import UpdateRule
from optfactory.state import absmax_key, codes_key

Scalars = Mapping[str, float]


class ReferenceBackend:
    """Updates one parameter after the other; temporaries are a few times the parameter's size."""

    name = "reference"
    supports_capture = False
    divides_gradients = False

    def capturing(self, device: torch.device) -> bool:
        return False

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            torch_update(bucket.key.rule)

    def update(self, bucket: Bucket) -> None:
        if bucket.must_skip():
            return
        steps = []
        for slot in bucket.slots:
            slot.state["step"].add_(1)
            steps.append(slot.state["step"].item())
        rows, indices = bucket.scalar_rows(steps)
        names = bucket.key.rule.all_scalars
        tables = [dict(zip(names, row, strict=True)) for row in rows]
        for slot, gradient, index in zip(bucket.slots, bucket.gradients, indices, strict=True):
            _update(slot, gradient, tables[index])


def _update(slot: Slot, gradient: Tensor, scalars: Scalars) -> None:
    rule = slot.layout.rule
    p = slot.parameter.detach()
    p32, states = p.float(), _load_states(slot)
    values = torch_update(rule)({"p": p32, "g": gradient.float(), **states, **scalars})
    step = scalars["step_size"] * _ratio(rule, p32, values["u"], scalars)
    p.copy_(p32 * scalars["decay"] - step * values["u"])
    _store_states(slot, values)


def _ratio(rule: UpdateRule, p: Tensor, u: Tensor, scalars: Scalars) -> Tensor | float:
    if rule.trust_ratio is None:
        return 1.0
    norms = {"p_norm": _norm(p), "u_norm": _norm(u)}
    ratio: Tensor = torch_trust_ratio(rule)({**norms, **scalars})["ratio"]
    return ratio


def _norm(x: Tensor) -> Tensor:
    # MPS has no float64; elsewhere the sum of squares must not lose small elements.
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return norm.float()


def _load_states(slot: Slot) -> dict[str, Tensor]:
    if not slot.layout.quantized:
        return {state.name: slot.state[state.name] for state in slot.layout.rule.states}
    block_size = slot.layout.grid.block_size
    return {
        state.name: dequantize_blockwise(
            slot.state[codes_key(state)],
            slot.state[absmax_key(state)],
            map_for(state.signed),
            block_size,
        )
        for state in slot.layout.rule.states
    }


def _store_states(slot: Slot, values: Mapping[str, Tensor]) -> None:
    states = slot.layout.rule.states
    if not slot.layout.quantized:
        for state in states:
            slot.state[state.name].copy_(values[state.name])
        return
    # An element with one state that is not finite starts afresh in all of them.
    finite = torch.stack([values[state.name].isfinite() for state in states]).all(dim=0)
    for state in states:
        x = torch.where(finite, values[state.name], 0.0)
        codes, absmax = quantize_blockwise(x, map_for(state.signed), slot.layout.grid.block_size)
        slot.state[codes_key(state)].copy_(codes)
        slot.state[absmax_key(state)].copy_(absmax)
