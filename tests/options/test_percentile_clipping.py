"""percentile_clipping: gradients scaled to a percentile of the tensor's last hundred norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from tests.families import suited
from tests.numerics.harness import DTYPES, Twin, array, bits, gradient, own_parameters, parameters
from tests.options.tools import (
    SHAPES,
    SMALL,
    assert_refused,
    assert_resumes,
    assert_threads_do_not_matter,
    families,
    seen,
    trained,
    widths,
    without,
)

SQUARED_NORMS = (1.0, 4.0, 0.25, 9.0)


def _grads(shapes: list[tuple[int, ...]], dtype: torch.dtype, step: int) -> list[torch.Tensor]:
    """Gradients whose norms differ by more than a decade from step to step."""
    size = (0.05, 1.0, 0.2, 3.0, 0.01, 0.5)[step % 6]
    return [
        (size * gradient(shape, torch.float32, 10 * step + i)).to(dtype)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
@widths
@families
def test_follows_the_reference(family: str, width: int, percentile: int, backend: str) -> None:
    asked = {"optim_bits": width, "percentile_clipping": percentile}
    twin = Twin(family, own_parameters(family, torch.float32, SHAPES), **asked)
    for step in range(5):
        twin.step(step, _grads(suited(family, SHAPES), torch.float32, step))
    if width == 8:
        twin.count.check()


@pytest.mark.parametrize("dtype", DTYPES)
@families
def test_every_dtype_of_gradients(family: str, dtype: str, backend: str) -> None:
    for width in (32, 8):
        shapes = suited(family, [*SMALL, (70, 65)])
        asked = {"optim_bits": width, "percentile_clipping": 10, "weight_decay": 0.1}
        twin = Twin(family, own_parameters(family, DTYPES[dtype], shapes), **asked)
        for step in range(4):
            twin.step(step, _grads(shapes, DTYPES[dtype], step))


@pytest.mark.parametrize("shape", [(64,), (70, 64)])
def test_the_printed_example(shape: tuple[int, ...], backend: str) -> None:
    """With betas of 0 the first moment is the gradient that the rule sees."""
    p = torch.zeros(shape, requires_grad=True)
    optimizer = build_optimizer("adam", [p], betas=(0.0, 0.0), percentile_clipping=5)
    direction = gradient(shape, torch.float32, 1).double()
    direction /= direction.norm()
    for squared, want in zip(SQUARED_NORMS, (1, 0.5, 1, 1 / 3), strict=True):
        g = (direction * squared**0.5).float()
        p.grad = g.clone()
        optimizer.step()
        assert (bits(p.grad) == bits(g)).all()  # the gradient itself is not changed
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], g * want, rtol=1e-6, atol=0)
    history = array(optimizer.state[p]["gnorm_vec"])
    np.testing.assert_allclose(history[:7], [1, 1, 4, 0.25, 9, 1, 1], rtol=1e-6)
    assert history.shape == (100,)


def test_the_history_wraps_after_a_hundred_steps(backend: str) -> None:
    shapes = [(3,), (2, 2)]
    twin = Twin("adam", parameters(torch.float32, shapes), percentile_clipping=30)
    for step in range(210):
        twin.step(step, _grads(shapes, torch.float32, step))
    for p in twin.params:
        assert np.unique(array(twin.optimizer.state[p]["gnorm_vec"])).size == 100


@families
def test_a_hundred_is_off(family: str, backend: str) -> None:
    for width in (32, 8):
        off = trained(family, optim_bits=width)
        assert trained(family, optim_bits=width, percentile_clipping=100) == off
        assert not any(key.endswith("gnorm_vec") for key in off)


@families
def test_norms_below_the_percentile_change_nothing(family: str, backend: str) -> None:
    """Shrinking gradients are never clipped at rank 99: only the history is there."""
    for width in (32, 8):
        runs = []
        for asked in ({}, {"percentile_clipping": 99}):
            params = parameters(torch.float32, SMALL)
            optimizer = build_optimizer(family, params, optim_bits=width, **asked)
            _train_shrinking(optimizer, params)
            runs.append(seen(optimizer))
        assert runs[1] != runs[0]
        assert without(runs[1], "gnorm_vec") == runs[0]


def _train_shrinking(optimizer: Optimizer2State, params: list[torch.Tensor]) -> None:
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = 0.5**step * gradient(tuple(p.shape), torch.float32, i)
        optimizer.step()


@widths
def test_tensors_are_clipped_each_by_its_own_norms(width: int, backend: str) -> None:
    """Only the tensor with the growing gradient is scaled down."""
    asked = {"optim_bits": width, "percentile_clipping": 50}
    runs = []
    for growth in (1.0, 10.0):
        params = parameters(torch.float32, [(20, 300), (30, 200)])
        optimizer = build_optimizer("adam", params, **asked)
        for step in range(3):
            for i, p in enumerate(params):
                g = gradient(tuple(p.shape), torch.float32, i)
                p.grad = g * (growth**step if i else 1.0)
            optimizer.step()
        runs.append(seen(optimizer))
    assert all(runs[0][key] == runs[1][key] for key in runs[0] if key.startswith("p0"))
    assert runs[0]["p1.gnorm_vec"] != runs[1]["p1.gnorm_vec"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20])
@widths
def test_a_norm_that_is_not_finite_is_not_noted(width: int, bad: float, backend: str) -> None:
    """1e20 is finite, but its square is none in float32."""
    asked = {"optim_bits": width, "percentile_clipping": 20}
    if not np.isfinite(bad):
        asked["nonfinite"] = "skip_element"
    shapes = [(20, 300)]
    twin = Twin("adamw", parameters(torch.float32, shapes), **asked)
    for step in range(5):
        grads = _grads(shapes, torch.float32, step)
        if step == 2:
            grads[0][3, 5] = bad
            before = bits(twin.optimizer.state[twin.params[0]]["gnorm_vec"])
        twin.step(step, grads)
        after = twin.optimizer.state[twin.params[0]]["gnorm_vec"]
        assert torch.isfinite(after).all()
        if step == 2:
            assert (bits(after) == before).all()


@pytest.mark.parametrize("first", [0.0, float("nan")])
@widths
def test_a_first_step_without_a_norm_stops_nothing(width: int, first: float, backend: str) -> None:
    """A history of zeros would be a limit of zero: the first norm above 0 is its beginning."""
    asked = {"optim_bits": width, "percentile_clipping": 5, "nonfinite": "skip_element"}
    twin = Twin("adam", parameters(torch.float32, [(20, 300)]), **asked)
    for step in range(4):
        grads = _grads([(20, 300)], torch.float32, step)
        if step < 2:
            grads[0].fill_(first)
        before = twin.params[0].detach().clone()
        twin.step(step, grads)
        assert torch.equal(twin.params[0], before) == (step < 2)
    assert twin.optimizer.state[twin.params[0]]["gnorm_vec"].all()


def test_norms_are_those_behind_a_gradient_scaler(backend: str) -> None:
    """A scaler that hands over its factor: clipping sees the gradient divided by it."""
    runs = []
    for factor in (1.0, 1024.0):
        params = parameters(torch.float32, SMALL)
        optimizer = build_optimizer("adam", params, percentile_clipping=10)
        for step in range(4):
            for p, g in zip(params, _grads(SMALL, torch.float32, step), strict=True):
                p.grad = g * factor
            if factor != 1:
                optimizer.grad_scale = torch.tensor(factor)
                optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
        runs.append(seen(optimizer))
    assert runs[0] == runs[1]


@widths
def test_same_bits_for_any_number_of_threads(width: int, backend: str) -> None:
    asked = {"optim_bits": width, "percentile_clipping": 0}
    assert_threads_do_not_matter("lamb", [(100_001,), (70, 64)], **asked)


@widths
@families
def test_resumes_bit_for_bit(family: str, width: int, backend: str) -> None:
    whole = assert_resumes(family, optim_bits=width, percentile_clipping=3)
    assert "p0.gnorm_vec" in whole


@pytest.mark.parametrize("value", [-1, 101, 2.5, "most", float("nan")])
@families
def test_refused_values(family: str, value: object) -> None:
    assert_refused("percentile_clipping", family, percentile_clipping=value)
