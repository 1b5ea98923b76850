"""The portable backend: the rule texts as plain torch operations, on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optfactory.backends.base import LAST_STEP, steps_problem
from optfactory.backends.reference.options import clip_factor, stays, store, stored_value
from optfactory.backends.reference.program import torch_trust_ratio, torch_update
from optfactory.rules.language import StateSpec, UpdateRule
from optfactory.state.codec import dequantize, quantize
from optfactory.state.layout import absmax_key, codes_key
from optfactory.state.quantmap import QuantizationMap, map_for
from optfactory.step.plan import Bucket
from optfactory.step.slots import Slot

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
            for slot in bucket.slots:
                slot.layout.check(slot.name, slot.state, slot.local.device)
            steps = [slot.state["step"].item() for slot in bucket.slots]
            if not all(0 <= step < LAST_STEP for step in steps):
                raise steps_problem(bucket, steps)

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
    layout = slot.layout
    rule, options = layout.rule, layout.options
    p, raw = stored_value(slot), gradient.float()
    g = raw * clip_factor(slot, raw, scalars) if options.clips else raw
    g = -g if options.maximizes else g
    old = _load_states(slot)
    values = torch_update(rule)({"p": p, "g": g, **old, **scalars})
    stay = stays(raw, options)
    if stay is not None:
        values["u"] = torch.where(stay, 0.0, values["u"])
        kept = {
            name: torch.zeros_like(x) if options.nonfinite == "reset" else x
            for name, x in old.items()
        }
        values |= {name: torch.where(stay, kept[name], values[name]) for name in old}
    step = scalars["step_size"] * _ratio(rule, p, values["u"], scalars)
    new = _moved(p, values["u"], step, scalars["decay"], slot)
    store(slot, new if stay is None else torch.where(stay, p, new), scalars)
    _store_states(slot, values)


def _moved(p: Tensor, u: Tensor, step: Tensor | float, decay: float, slot: Slot) -> Tensor:
    """The parameter after a step; bitsandbytes rounds it once more before the decay."""
    if slot.layout.options.bitsandbytes:
        return (p - step * u).to(slot.local.dtype).float() * decay
    return p * decay - step * u


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


def _map(slot: Slot, state: StateSpec) -> QuantizationMap:
    return map_for(state.signed, slot.layout.options.symmetric_map)


def _load_states(slot: Slot) -> dict[str, Tensor]:
    states = slot.layout.rule.states
    if not slot.layout.quantized:
        return {state.name: slot.state[state.name] for state in states}
    return {
        state.name: dequantize(
            slot.state[codes_key(state)],
            slot.state[absmax_key(state)],
            _map(slot, state),
            slot.layout.local_grid,
        )
        for state in states
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
        codes, absmax = quantize(x, _map(slot, state), slot.layout.local_grid, slot.layout.options)
        slot.state[codes_key(state)].copy_(codes)
        slot.state[absmax_key(state)].copy_(absmax)
