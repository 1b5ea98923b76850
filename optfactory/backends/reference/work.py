"""One parameter's step on the portable backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optfactory.backends.reference.options import (
    bits_of_state,
    clip_factor,
    code_bits,
    rounded_at_random,
    same_signs,
    stays,
    store,
    stored_value,
)
from optfactory.backends.reference.program import torch_trust_ratio, torch_update
from optfactory.rules.language import StateSpec, norms_of
from optfactory.state.codec import (
    block_scales,
    decode,
    dequantize,
    encode,
    scattered_scales,
    spread,
)
from optfactory.state.random_codes import encode_at_random
from optfactory.step.slots import Slot


@dataclass(frozen=True)
class Computed:
    """What the rule makes of a parameter: its value before, states and direction behind it.

    `u` is the direction, `measured` what a trust ratio's norm is of.
    """

    p: Tensor
    values: dict[str, Tensor]
    u: Tensor
    measured: Tensor
    stay: Tensor | None


@dataclass
class Work:
    """A parameter's step, pass by pass.

    The rule is run anew in each pass: what all parameters of a bucket compute would need many times
    their memory.

    Attributes:
        slot, gradient, scalars: the parameter, and what the step reads.
        factor: of the gradient.
        ratio: of the step's size, or what the rule reads.
        scales: those of the new state that have been found beforehand: [states, scales].
    """

    slot: Slot
    gradient: Tensor
    scalars: Mapping[str, float]
    factor: Tensor | None = None
    ratio: Tensor | float = 1.0
    scales: Tensor | None = None

    def sum_of_gradient(self) -> Tensor:
        """The sum of its squares."""
        return torch.sum(self.gradient.to(_wide(self.gradient)).square())

    def clip(self, squares: Tensor) -> None:
        """Follow from the whole gradient's sum of squares by what it is multiplied."""
        self.factor = clip_factor(self.slot, squares, self.scalars)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The sums of p^2, u^2 and what agrees; the scales that new states need, if shared."""
        found, options = self._compute(), self.slot.layout.options
        sums: list[Tensor] = []
        if self._has_ratio and not self._reads_ratio:
            sums += _squares(found.p, found.measured)
        if options.cautious:
            agreeing = (found.measured > 0) | (found.measured < 0)
            sums.append(agreeing.sum().to(_wide(found.p)))
        scales = torch.empty(0, dtype=torch.float32, device=found.p.device)
        if options.scales_first:
            states = self._finite_states(found.values)
            numbers = self._numbers()
            count, layout = self._scale_count, self.slot.layout
            scales = torch.cat(
                [
                    scattered_scales(x, numbers, count, codec.map(state, options), options)
                    if codec.scaled
                    else torch.zeros(count, dtype=torch.float32, device=x.device)
                    for (state, codec), x in zip(layout.stored, states.values(), strict=True)
                ]
            )
        empty = torch.empty(0, dtype=_wide(found.p), device=found.p.device)
        return torch.stack(sums) if sums else empty, scales

    def norms(self) -> Tensor:
        """The sums of p^2 and g^2, of gradients as the rule gets them."""
        raw = self.gradient.float()
        stay = stays(raw, self.slot.layout.options)
        g = self._rule_gradient(raw)
        return torch.stack(
            _squares(stored_value(self.slot), torch.where(stay, 0.0, g) if stay is not None else g)
        )

    def complete(self, sums: Tensor, scales: Tensor) -> None:
        """Take what `statistics` found in all parts of the tensor."""
        if len(sums):
            self.find_ratio(sums)
        if len(scales):
            self.scales = scales.view(len(self.slot.layout.rule.states), -1)

    def find_ratio(self, sums: Tensor) -> None:
        """Follow from sums over the whole tensor its ratio; `tensor_ratio` of the kernels."""
        layout = self.slot.layout
        share = torch.ones_like(sums[0])
        if layout.options.cautious:
            share = math.prod(layout.shape) / (sums[-1] + 1.0)
        self.ratio = share.float()
        if self._has_ratio:
            values = (sums[0].sqrt().float(), (share * sums[1].sqrt()).float())
            norms = dict(zip(norms_of(layout.rule), values, strict=True))
            self.ratio = (
                share.float() * torch_trust_ratio(layout.rule)({**norms, **self.scalars})["ratio"]
            )

    def update(self) -> None:
        """Write the parameter and its states."""
        found = self._compute()
        step = self.scalars["step_size"] * (1.0 if self._reads_ratio else self.ratio)
        new = self._moved(found, step)
        stay = found.stay
        store(self.slot, new if stay is None else torch.where(stay, found.p, new), self.scalars)
        self._store_states(found.values)

    def _compute(self) -> Computed:
        rule, options = self.slot.layout.rule, self.slot.layout.options
        p, raw = stored_value(self.slot), self.gradient.float()
        g, old = self._rule_gradient(raw), self._load_states()
        ratio = {"ratio": self.ratio} if self._reads_ratio else {}
        values = torch_update(rule)({"p": p, "g": g, **old, **self.scalars, **ratio})
        stay = stays(raw, options)
        u = measured = self._direction(values["u"], g, stay)
        if self._measured != "u":
            measured = self._direction(values[self._measured], g, stay)
        if stay is not None:
            kept = {
                name: torch.zeros_like(x) if options.nonfinite == "reset" else x
                for name, x in old.items()
            }
            values |= {name: torch.where(stay, kept[name], values[name]) for name in old}
        return Computed(p, values, u, measured, stay)

    @property
    def _has_ratio(self) -> bool:
        return self.slot.layout.rule.trust_ratio is not None

    @property
    def _reads_ratio(self) -> bool:
        """Whether the rule reads its ratio, so that steps are not scaled by it."""
        return self.slot.layout.rule.ratio_of == "g"

    @property
    def _measured(self) -> str:
        """What the rule calls that whose norm is taken."""
        return "u" if self._reads_ratio else self.slot.layout.rule.ratio_of

    def _rule_gradient(self, raw: Tensor) -> Tensor:
        """The gradient that the rule gets."""
        g = raw if self.factor is None else raw * self.factor
        return -g if self.slot.layout.options.maximizes else g

    def _direction(self, u: Tensor, g: Tensor, stay: Tensor | None) -> Tensor:
        """A direction without elements that stay, or, if cautious, disagree with the gradient."""
        if self.slot.layout.options.cautious:
            u = u * same_signs(u, g)
        return u if stay is None else torch.where(stay, 0.0, u)

    def _moved(self, found: Computed, step: Tensor | float) -> Tensor:
        """The parameter after a step; bitsandbytes rounds it once more before the decay."""
        p, u, decay = found.p, found.u, self.scalars["decay"]
        if self.slot.layout.options.cautious_decay:
            return torch.where(same_signs(-u, p), p, p * decay) - step * u
        if self.slot.layout.options.bitsandbytes:
            return (p - step * u).to(self.slot.local.dtype).float() * decay
        return p * decay - step * u

    # ---- states ---------------------------------------------------------------------------------

    @property
    def _scale_count(self) -> int:
        """The number of scales that each state of codes has here."""
        keys = [codec.keys(state) for state, codec in self.slot.layout.stored if codec.scaled]
        return self.slot.state[keys[0][1]].numel()

    def _numbers(self) -> Tensor:
        """Which scale each element has, where these are not those of the local block grid."""
        layout, device = self.slot.layout, self.slot.local.device
        if layout.options.tensor_wise or layout.piece is None:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            return zero.expand(layout.local_shape)
        fragments = layout.piece.fragments
        numbers = torch.repeat_interleave(fragments[:, 2], fragments[:, 1])
        return numbers.to(device).view(layout.local_shape)

    def _load_states(self) -> dict[str, Tensor]:
        layout, stored = self.slot.layout, self.slot.state
        cut = layout.quantized and layout.options.scales_first
        numbers = self._numbers() if cut else None
        values = {}
        for state, codec in layout.stored:
            if not codec.scaled:
                values[state.name] = stored[state.name].float()
                continue
            elements, scales = (stored[key] for key in codec.keys(state))
            codes = codec.unpack(elements, layout.local_shape)
            meaning = codec.map(state, layout.options)
            if numbers is None:
                values[state.name] = dequantize(codes, scales, meaning, layout.local_grid)
            else:
                values[state.name] = decode(codes, scales.flatten()[numbers], meaning)
        return values

    def _finite_states(self, values: Mapping[str, Tensor]) -> dict[StateSpec, Tensor]:
        """New states; an element with one that is not finite starts afresh in all of them."""
        states = self.slot.layout.rule.states
        finite = torch.stack([values[state.name].isfinite() for state in states]).all(dim=0)
        return {state: torch.where(finite, values[state.name], 0.0) for state in states}

    def _store_states(self, values: Mapping[str, Tensor]) -> None:
        layout, options = self.slot.layout, self.slot.layout.options
        words = code_bits(self.slot, self.scalars) if options.draws_for_states else None
        if layout.quantized:
            values = {spec.name: x for spec, x in self._finite_states(values).items()}
        for index, (state, codec) in enumerate(layout.stored):
            x = values[state.name]
            if codec.scaled:
                at_random = codec.always_random or options.random_codes
                self._store_codes(index, x, words if at_random else None)
                continue
            if codec.dtype == torch.bfloat16 and words is not None:
                x = rounded_at_random(x, codec.dtype, bits_of_state(words, index, 16))
            self.slot.state[state.name].copy_(x)

    def _store_codes(self, index: int, x: Tensor, words: Tensor | None) -> None:
        """Write a state of codes: the nearest ones, or by random bits."""
        layout, options = self.slot.layout, self.slot.layout.options
        state, codec = layout.stored[index]
        meaning, keys = codec.map(state, options), codec.keys(state)
        if self.scales is None:
            found = block_scales(x, meaning, layout.local_grid, options)
            scales = spread(found, layout.local_grid).reshape(x.shape)
        else:
            found = self.scales[index].view(layout.tensors[keys[1]].shape)
            scales = self.scales[index][self._numbers()]
        if words is None:
            codes = encode(x, scales, meaning, options)
        else:
            random = bits_of_state(words, index, meaning.random_bits)
            codes = encode_at_random(x, scales, meaning, options, random)
        elements = self.slot.state[keys[0]]
        elements.copy_(codec.pack(codes, elements.shape))
        self.slot.state[keys[1]].copy_(found)


def _wide(x: Tensor) -> torch.dtype:
    """Where sums must not lose small elements; MPS has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _squares(*tensors: Tensor) -> list[Tensor]:
    """Sums of squares; the root of such a square is the norm itself."""
    return [torch.linalg.vector_norm(x, dtype=_wide(x)).square() for x in tensors]
