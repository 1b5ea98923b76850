"""Which tensors are stepped."""

import math
from dataclasses import replace

import pytest
import torch

from optfactory.bench.cases import CASES, DTYPES, fitting
from optfactory.bench.measure import make_parameters


def test_cases_have_the_sizes_they_claim():
    assert CASES["large"].elements == 2**25
    assert CASES["gpt2"].elements == 124_439_808
    assert len(CASES["gpt2"].shapes) == 148
    assert CASES["llama7b"].elements == 6_738_415_616
    assert len(CASES["llama7b"].shapes) == 291
    assert CASES["small"].shapes.count((64,)) == 1000
    assert CASES["small"].shapes.count((64, 64)) == 200
    assert len(CASES["small"].shapes) == 1200
    assert len(CASES["small2000"].shapes) == 2000
    for name, size in (("1m", 1e6), ("100m", 1e8), ("1b", 1e9)):
        assert CASES[name].elements == pytest.approx(size, rel=0.05)


def test_dtypes_have_the_bytes_they_claim():
    assert {name: getattr(torch, name).itemsize for name in DTYPES} == DTYPES


def test_a_case_is_cut_to_what_fits():
    whole = CASES["llama7b"]
    assert fitting(whole, "float32", math.inf) == whole
    need = 24 * whole.elements  # 4 bytes of p, g and torch's two states, 8 of the candidate's
    assert fitting(whole, "float32", need) == whole
    part = fitting(whole, "float32", need / 2)
    assert part.shapes == whole.shapes[: len(part.shapes)]
    assert 0.45 < part.elements / whole.elements <= 0.5
    assert f"the first {len(part.shapes)} of 291 tensors fit" in part.text
    assert len(fitting(whole, "bfloat16", need / 2).shapes) > len(part.shapes)
    assert fitting(CASES["1b"], "float32", 1e9).shapes == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_have_gradients_of_their_dtype_and_are_the_same_every_time(dtype):
    case = replace(CASES["tiny"], shapes=((7,), (3, 5)))
    first, again = (make_parameters(case, dtype, "cpu") for _ in range(2))
    assert [tuple(p.shape) for p in first] == [(7,), (3, 5)]
    for p, q in zip(first, again, strict=True):
        assert p.dtype == p.grad.dtype == getattr(torch, dtype)
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        assert not torch.equal(p, p.grad)
