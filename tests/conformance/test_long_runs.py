"""Long runs with narrow state: as low a loss as at 32 bits, and no giant steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.widths import LAST, STEPS, WIDTHS, language, run, trained
from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from tests.conformance.harness import Deviation
from tests.families import states_of
from tests.numerics.harness import bits
from tests.reference import reference_of

NARROW = [
    info.name
    for info in map(get_optimizer_info, list_optimizers())
    if info.optim_bits in (4, 8, 16) and not info.is_paged
]
UNPAGED = [name for name in NARROW if name.endswith("8bit")]
PAGED = [f"paged_{name}" for name in UNPAGED]
COARSE = [n for n in list_optimizers() if get_optimizer_info(n).config_class.too_coarse]
COARSE = sorted({get_optimizer_info(name).family for name in COARSE})

# Beyond the least loss there is, what may be learned less: fp8 and 4 bits are coarser.
EXCESS = {"8bit": 0.02, "16bit": 0.02, "fp8": 0.06}


def _peak(name: str) -> float:
    info = get_optimizer_info(name)
    peak = reference_of(info.family).facts.peak_lr
    return 3 * info.defaults["lr"] if peak is None else peak


def _trained(name: str, steps: int = STEPS) -> tuple[Tensor, list[Tensor]]:
    """Losses of every step and the parameters; the matrices have the state that the name says."""
    losses, params, optimizer = trained(name, _peak(name), steps)
    stated = [bool(optimizer.state[p].keys() & NARROW_KEYS) for p in params]
    assert stated == [_width(name) in ("4bit", "8bit", "fp8")] * 4 + [False] * 2
    return losses, params


def _width(name: str) -> str:
    return next(width for width in WIDTHS if name.endswith(width))


NARROW_KEYS = {
    f"{state.name}{suffix}"
    for name in UNPAGED
    for state in states_of(name)
    for suffix in ("_q4", "_q8", "_fp8")
}


def _final_loss(name: str) -> float:
    """The last steps' mean."""
    losses, _ = _trained(name)
    assert losses[0] > 3.5
    return float(losses[-LAST:].mean())


@pytest.mark.parametrize("name", NARROW)
def test_2000_steps_end_at_the_loss_of_32_bits(name: str, deviation: Deviation) -> None:
    """Within 1 % of it, and within 2 % in what can be learned: the loss above the least one."""
    ours, wide = _final_loss(name), _final_loss(f"{get_optimizer_info(name).family}32bit")
    least = float(language()[1][-LAST:].mean())
    assert wide - least < 0.15
    deviation("final loss, relative", abs(ours - wide) / wide, 0.01)
    excess = abs(ours - wide) / (wide - least)
    deviation("final loss above the least one, relative", excess, EXCESS.get(_width(name), 1.0))


@pytest.mark.parametrize("family", COARSE)
def test_widths_that_a_family_does_not_have_are_too_coarse(family: str) -> None:
    """By as much as their error says, to a third of a percent."""
    wide = _final_loss(f"{family}32bit")
    stated = get_optimizer_info(family).config_class.too_coarse
    for width, percent in stated.items():
        found = 100 * (run(family, width, _peak(family)).loss / wide - 1)
        assert found > 1
        assert abs(found - percent) < 0.34


@pytest.mark.parametrize("name", PAGED)
def test_paged_state_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that paged names end at the same loss."""
    assert name.removeprefix("paged_") in UNPAGED
    monkeypatch.setattr("optfactory.memory.placement.PAGED_MIN_NUMEL", 1000)
    (losses, params), (other_losses, other) = (
        _trained(each, 200) for each in (name, name.removeprefix("paged_"))
    )
    assert torch.equal(losses, other_losses)
    for p, q in zip(params, other, strict=True):
        assert (bits(p) == bits(q)).all()


# One element of each block has the gradient 1, the others r: by r, the mean step of these, and the
# longest where their gradient pauses every tenth step, in learning rates. So much is known of exact
# 8-bit state whose second moment may become 0; at 32 bits all would be 1.
GIANTS = {
    1e-2: (1.00, 1.0),
    1e-3: (1.08, 1.0),
    3e-4: (10.0, 1.4e4),
    1e-4: (9.9, 6e3),
    1e-5: (8.7, 7e2),
}

ADAM_STEPS: dict[str, dict[str, Any]] = {"lamb": {"trust_ratio": "clip", "max_unorm": 0.0}}


def _steps(name: str, r: float, pauses: bool, **asked: Any) -> tuple[float, float]:
    """Mean over the small elements, and the longest step of all, of 300, in learning rates."""
    p = torch.zeros(16, 256, requires_grad=True)
    asked = ADAM_STEPS.get(get_optimizer_info(name).family, {}) | asked
    optimizer = build_optimizer(name, [p], lr=1e-3, weight_decay=0.0, **asked)
    mean = longest = 0.0
    for step in range(1, 301):
        p.grad = torch.full_like(p, 0.0 if pauses and step % 10 == 0 else r)
        p.grad[:, 0] = 1.0
        with torch.no_grad():
            p.zero_()
        optimizer.step()
        sizes = p.detach().abs() / 1e-3
        mean, longest = mean + float(sizes[:, 1:].mean()) / 300, max(longest, float(sizes.max()))
    return mean, longest


@pytest.mark.parametrize("r", GIANTS)
@pytest.mark.parametrize("name", [name for name in NARROW if not name.endswith("16bit")])
def test_no_step_is_longer_than_at_32_bits(name: str, r: float, deviation: Deviation) -> None:
    for pauses in (False, True):
        _, longest = _steps(name, r, pauses)
        limit = reference_of(get_optimizer_info(name).family).facts.longest_step
        deviation("longest step, in learning rates", longest, limit)


@pytest.mark.parametrize("asked", [{"second_moment_floor": False}, {"compat": "bitsandbytes"}])
@pytest.mark.parametrize("r", GIANTS)
def test_without_the_floor_steps_are_as_long_as_is_known(
    r: float, asked: dict[str, Any], deviation: Deviation
) -> None:
    """So that the test above measures what the floor is there for."""
    mean, longest = GIANTS[r]
    deviation("mean step, relative", abs(_steps("adam8bit", r, False, **asked)[0] / mean - 1), 0.02)
    got = _steps("adam8bit", r, True, **asked)[1]
    assert 0.5 * longest < got < 2 * longest
