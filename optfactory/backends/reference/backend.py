"""The portable backend: the rule texts as plain torch operations, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optfactory.backends.base import LAST_STEP, Findings, Stage, steps_problem
from optfactory.backends.reference.options import clip_factor, stays, store, stored_value
from optfactory.backends.reference.program import torch_trust_ratio, torch_update
from optfactory.backends.reference.states import decoded, encode, needed_scales
from optfactory.step.plan import Bucket, BucketKey
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

    def update(self, bucket: Bucket) -> Iterator[Findings]:
        if bucket.must_skip():
            return
        work = _work_of(bucket)
        if bucket.key.options.clips:
            sums = torch.stack([_square_sum(one.gradient.float()) for one in work])[:, None]
            yield Findings(Stage.GRADIENTS, sums, [])
            for one, total in zip(work, sums[:, 0].float(), strict=True):
                one.factor = clip_factor(one.slot, total, one.scalars)
        if bucket.key.needs_statistics:
            yield from _measure(bucket.key, work)
        for one in work:
            one.slot.state["step"].add_(1)
            _update(one)


@dataclass
class _Work:
    """One parameter's part of a step.

    Attributes:
        factor: of the gradient.
        ratio: the trust ratio.
        scales: float32 [states, scales here], where they are not those of blocks that are all here.
    """

    slot: Slot
    gradient: Tensor
    scalars: Scalars
    factor: Tensor | float = 1.0
    ratio: Tensor | float = 1.0
    scales: Tensor | None = None


def _work_of(bucket: Bucket) -> list[_Work]:
    rows, indices = bucket.scalar_rows([s.state["step"].item() + 1 for s in bucket.slots])
    tables = [dict(zip(bucket.key.rule.all_scalars, row, strict=True)) for row in rows]
    return [
        _Work(slot, gradient, tables[index])
        for slot, gradient, index in zip(bucket.slots, bucket.gradients, indices, strict=True)
    ]


def _measure(key: BucketKey, work: Sequence[_Work]) -> Iterator[Findings]:
    """What must be known of whole tensors; the update computes its values again."""
    shares = key.options.tensor_wise or key.options.cuts_blocks
    has_ratio = key.rule.trust_ratio is not None
    sums = []
    for one in work:
        p, values, _ = _values(one)
        if has_ratio:
            sums.append(torch.stack([_square_sum(p), _square_sum(values["u"])]))
        if shares:
            one.scales = needed_scales(one.slot, _finite(one.slot, values))
    maxima = [(n, one.scales) for n, one in enumerate(work) if one.scales is not None]
    found = Findings(Stage.TENSORS, torch.stack(sums) if has_ratio else None, maxima)
    yield found
    for number, one in enumerate(work):
        if found.sums is not None:
            p_norm, u_norm = found.sums[number].sqrt().float()
            named = {"p_norm": p_norm, "u_norm": u_norm}
            one.ratio = torch_trust_ratio(key.rule)({**named, **one.scalars})["ratio"]


def _values(work: _Work) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The parameter in float32, its new states and direction, and which elements stay out."""
    slot, rule = work.slot, work.slot.layout.rule
    options = slot.layout.options
    p, raw = stored_value(slot), work.gradient.float()
    g = raw * work.factor if options.clips else raw
    g = -g if options.maximizes else g
    old = _load_states(slot)
    values = torch_update(rule)({"p": p, "g": g, **old, **work.scalars})
    stay = stays(raw, options)
    if stay is not None:
        values["u"] = torch.where(stay, 0.0, values["u"])
        kept = {
            name: torch.zeros_like(x) if options.nonfinite == "reset" else x
            for name, x in old.items()
        }
        values |= {name: torch.where(stay, kept[name], values[name]) for name in old}
    return p, values, stay


def _update(work: _Work) -> None:
    p, values, stay = _values(work)
    scalars = work.scalars
    step = scalars["step_size"] * work.ratio
    new = _moved(p, values["u"], step, scalars["decay"], work.slot)
    store(work.slot, new if stay is None else torch.where(stay, p, new), scalars)
    _store_states(work, values)


def _moved(p: Tensor, u: Tensor, step: Tensor | float, decay: float, slot: Slot) -> Tensor:
    """The parameter after a step; bitsandbytes rounds it once more before the decay."""
    if slot.layout.options.bitsandbytes:
        return (p - step * u).to(slot.local.dtype).float() * decay
    return p * decay - step * u


def _square_sum(x: Tensor) -> Tensor:
    # MPS has no float64; elsewhere the sum of squares must not lose small elements.
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return norm.square()


def _load_states(slot: Slot) -> dict[str, Tensor]:
    states = slot.layout.rule.states
    if not slot.layout.quantized:
        return {state.name: slot.state[state.name] for state in states}
    return {state.name: decoded(slot, state) for state in states}


def _finite(slot: Slot, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New states; an element with one that is not finite starts afresh in all of them."""
    names = [state.name for state in slot.layout.rule.states]
    finite = torch.stack([values[name].isfinite() for name in names]).all(dim=0)
    return {name: torch.where(finite, values[name], 0.0) for name in names}


def _store_states(work: _Work, values: Mapping[str, Tensor]) -> None:
    slot = work.slot
    if not slot.layout.quantized:
        for state in slot.layout.rule.states:
            slot.state[state.name].copy_(values[state.name])
        return
    finite = _finite(slot, values)
    for number, state in enumerate(slot.layout.rule.states):
        scales = None if work.scales is None else work.scales[number]
        encode(slot, state, finite[state.name], scales)
