"""Options together: each still does what it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import CAUTIOUS, beside, known_to, suited
from tests.numerics.harness import DTYPES, Twin, gradient, own_parameters
from tests.options.tools import SHAPES, assert_resumes, families, trained

COMBINATIONS: dict[str, dict[str, Any]] = {
    "clip_skip_kahan": {
        "percentile_clipping": 20, "skip_zeros": True, "param_rounding": "kahan",
        "weight_decay": 0.1, "lr": 0.01, "maximize": True,
    },
    "whole_symmetric_floorless": {
        "optim_bits": 8, "block_wise": False, "signed_map": "symmetric",
        "second_moment_floor": False, "min_8bit_size": 1, "maximize": True,
    },
    "whole_clip_skip_stochastic": {
        "optim_bits": 8, "block_wise": False, "percentile_clipping": 10,
        "nonfinite": "skip_element", "param_rounding": "stochastic", "seed": 5, "lr": 0.01,
    },
    "blocks_symmetric_clip_skip_kahan": {
        "optim_bits": 8, "signed_map": "symmetric", "block_size": 128, "percentile_clipping": 50,
        "skip_zeros": True, "nonfinite": "skip_element", "param_rounding": "kahan", "lr": 0.01,
    },
    "amsgrad_clip_skip_stochastic": {
        "amsgrad": True, "percentile_clipping": 5, "skip_zeros": True,
        "param_rounding": "stochastic", "seed": 0, "lr": 0.01,
    },
    "cautious_clip_skip_whole": {
        "cautious": True, "optim_bits": 8, "block_wise": False, "percentile_clipping": 20,
        "skip_zeros": True, "nonfinite": "skip_element", "maximize": True, "min_8bit_size": 1,
    },
    "cautious_decay_kahan": {
        "cautious": True, "cautious_weight_decay": True, "optim_bits": 8, "lr": 0.01,
        "param_rounding": "kahan",
    },
    "compat_clip_whole": {
        "compat": "bitsandbytes", "optim_bits": 8, "block_wise": False, "percentile_clipping": 5,
        "adam_w_mode": True, "weight_decay": 0.1, "lr": 0.01,
    },
}  # fmt: skip
LAMB: dict[str, dict[str, Any]] = {
    "compat_clip_whole": {"trust_ratio": "clip", "max_unorm": 0.5},
    "whole_symmetric_floorless": {"trust_ratio_bounds": (0.3, 0.6)},
}


def _asked(family: str, combination: str) -> dict[str, Any]:
    extra = LAMB.get(combination, {}) if family == "lamb" else {}
    known = known_to(family, COMBINATIONS[combination])
    for field in CAUTIOUS.keys() & known.keys():
        known |= beside(family, field) or {}
    return known | extra


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("combination", COMBINATIONS)
@families
def test_follows_the_reference(family: str, combination: str, dtype: str, backend: str) -> None:
    asked = _asked(family, combination)
    if dtype == "fp32" and "param_rounding" in asked:
        asked = {key: asked[key] for key in asked if key not in ("param_rounding", "seed")}
    shapes = suited(family, SHAPES)
    twin = Twin(family, own_parameters(family, DTYPES[dtype], shapes), **asked)
    for step in range(3):
        grads = [
            ((0.5, 4.0, 1.0)[step] * gradient(shape, torch.float32, 9 * step + i)).to(DTYPES[dtype])
            for i, shape in enumerate(shapes)
        ]
        if asked.get("nonfinite") and step == 1:
            grads[0][7] = float("nan")
            grads[1][3, 299] = float("inf")
        twin.step(step, grads)


@pytest.mark.parametrize("combination", COMBINATIONS)
@families
def test_resumes_bit_for_bit(family: str, combination: str, backend: str) -> None:
    assert_resumes(family, torch.bfloat16, **_asked(family, combination))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_paged_state_gives_the_same_bits(combination: str, backend: str) -> None:
    """Tensors of 100,000 elements and more, with what else the options keep."""
    asked = _asked("adamw", combination)
    runs = [
        trained("adamw", torch.bfloat16, [(320, 400)], steps=2, is_paged=paged, **asked)
        for paged in (False, True)
    ]
    assert runs[0] == runs[1]
