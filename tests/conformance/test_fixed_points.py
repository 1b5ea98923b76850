"""8- and 16-bit states come to where 32-bit ones do, for gradients early and late, large and small.

With the nearest codes an average stands still as soon as its increments are less than half the
distance of two codes: a second moment with beta2 = 0.999 at a few hundredths of its value, where
the gradient came late and the block's greatest element is large.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer, get_optimizer_info
from optfactory.state.codec import dequantize_blockwise
from optfactory.state.codecs import EIGHT_BIT
from optfactory.state.quantmap import map_for
from tests.families import FAMILIES, states_of

SIZES = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.011])
ELEMENTS, STEPS, LATE = 4096, 2000, 600
NEAREST = [f for f in FAMILIES if get_optimizer_info(f).defaults["state_rounding"] == "nearest"]
# ADOPT's momentum averages g / sqrt(v), whose mean is greater where v is noisy.
BOUNDS = {("adopt", "exp_avg"): 0.06}
RANDOM = [family for family in FAMILIES if family not in NEAREST and states_of(family)]


def final_states(name: str, **asked: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The values of the states, and which elements have had no gradient at first."""
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(8).repeat(ELEMENTS // 16)
    gradient = SIZES.repeat(ELEMENTS // 8) * signs
    late = torch.arange(ELEMENTS) // 16 % 2 == 1
    gradient[::256] = 1.0
    p = torch.zeros(2, ELEMENTS // 2, requires_grad=True)
    optimizer = build_optimizer(name, [p], lr=1e-3, **asked)
    for step in range(STEPS):
        g = gradient * (1.5 if step % 2 else 0.5)
        p.grad = (torch.where(late, 0.0, g) if step < LATE else g).view(2, -1)
        optimizer.step()
    found = {}
    for spec in states_of(optimizer.config):
        state = optimizer.state[p]
        if spec.name in state:
            found[spec.name] = state[spec.name].double().flatten()
        else:
            codes, scales = (state[key] for key in EIGHT_BIT.keys(spec))
            values = dequantize_blockwise(codes, scales, map_for(spec.signed))
            found[spec.name] = values.double().flatten()
    return found, late


@pytest.mark.parametrize(
    ("family", "bits"),
    [*((family, 8) for family in RANDOM), *((f, 16) for f in FAMILIES if states_of(f))],
)
def test_states_agree_on_the_average(family: str, bits: int) -> None:
    """Within 2 %, whatever the size of a gradient, its sign, and when it began."""
    asked = {"min_8bit_size": 1} if bits == 8 else {}
    narrow, late = final_states(f"{family}{bits}bit", seed=1, **asked)
    wide, _ = final_states(f"{family}32bit")
    for name, expected in wide.items():
        ratios = narrow[name] / expected
        for began in (False, True):
            for positive in (False, True):
                chosen = (late == began) & ((expected >= 0) == positive)
                mean = float(ratios[chosen].mean()) if chosen.any() else 1.0
                bound = BOUNDS.get((family, name), 0.02)
                assert abs(mean - 1) < bound, f"{name}, late {began}, {positive}: {mean}"


@pytest.mark.parametrize("family", NEAREST)
def test_nearest_codes_stall_and_random_ones_do_not(family: str) -> None:
    """What the docs say of the families that round as bitsandbytes does."""
    wide, late = final_states(f"{family}32bit")
    nearest, _ = final_states(f"{family}8bit", min_8bit_size=1)
    asked = {"state_rounding": "stochastic", "seed": 1, "min_8bit_size": 1}
    moved, _ = final_states(f"{family}8bit", **asked)
    ratios = {
        kind: float((found["exp_avg_sq"] / wide["exp_avg_sq"])[late].mean())
        for kind, found in (("nearest", nearest), ("stochastic", moved))
    }
    assert ratios["nearest"] < 0.1
    assert abs(ratios["stochastic"] - 1) < 0.02
