"""Scratch memory is what was counted, and batches stay within their limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optfactory.matrix.orthogonalize import Orthogonalization, orthogonalize
from optfactory.matrix.packing import Room, StackBatch, pack
from optfactory.matrix.scratch import scratch_bytes
from optfactory.matrix.stacks import Stack
from tests.matrix.harness import MUON, POLAR_EXPRESS, ROUNDED, SHAPES

GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
ways = pytest.mark.parametrize("how", [MUON, POLAR_EXPRESS, ROUNDED], ids=["5", "8", "bfloat16"])


def allocated(work: Callable[[], object]) -> int:
    """The most bytes of torch's CPU allocator that work held at once."""
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    level = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


@ways
@pytest.mark.parametrize("shape", [*SHAPES, (520, 530), (300, 520)], ids=str)
def test_nothing_is_allocated_beside_the_scratch(
    shape: tuple[int, int], how: Orthogonalization
) -> None:
    x, out = torch.randn(3, *shape[::-1]).bfloat16().mT, torch.empty(3, *shape)
    scratch = torch.empty(scratch_bytes(3, shape, how.dtype), dtype=torch.uint8)
    # Each matrix has its norm, alone and in a vector.
    assert allocated(lambda: orthogonalize(x, how, out=out, scratch=scratch)) <= 3 * 2 * 4


@ways
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scratch_is_not_passed(shape: tuple[int, int], how: Orthogonalization) -> None:
    x, size = torch.randn(3, *shape), scratch_bytes(3, shape, how.dtype)
    memory = torch.full((size + 128,), 77, dtype=torch.uint8)
    result = orthogonalize(x, how, scratch=memory[64 : 64 + size])
    assert (memory[:64] == 77).all()
    assert (memory[64 + size :] == 77).all()
    assert torch.equal(result, orthogonalize(x, how))


def test_bytes_are_those_of_the_matrix_and_its_squares() -> None:
    matrix, square = 768 * 3072, 768 * 768
    assert scratch_bytes(1, (768, 3072), torch.float32) == 4 * (matrix + 4 * square)
    # Rounded copies: bfloat16 where products take it, and as float32 where they do not.
    both = matrix + square
    assert scratch_bytes(1, (3072, 768), torch.bfloat16) == 4 * (matrix + 2 * square) + 6 * both


def packed_of(
    shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32, limit: int | None = None
) -> list[StackBatch]:
    """The batches of parameters of one matrix each."""
    stacks, dtypes = [Stack(1, *shape) for shape in shapes], [dtype] * len(shapes)
    return pack(Room(stacks, dtypes, torch.device("cpu")), [None] * len(shapes), limit)


def test_a_batch_has_the_size_of_the_largest_matrix_by_default() -> None:
    largest = 4 * 768 * 3072 + scratch_bytes(1, (3072, 768), torch.float32)
    packed = packed_of(GPT2)
    assert max(batch.nbytes for batch in packed) == largest
    # Products of one 768x768 take the room of three, and the largest and its own that of twelve.
    assert [len(b.members) for b in packed if GPT2[b.members[0]] == (768, 768)] == [9, 3]
    assert [len(b.members) for b in packed if GPT2[b.members[0]] == (3072, 768)] == [1] * 12


def test_a_limit_packs_more_or_single_matrices() -> None:
    assert len(packed_of(GPT2, limit=2**40)) == 4
    assert len(packed_of(GPT2, limit=0)) == 48
    assert packed_of([]) == []


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30),
    st.integers(0, 200_000),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_batches_hold_every_matrix_once_within_the_limit(
    shapes: list[tuple[int, int]], limit: int, dtype: torch.dtype
) -> None:
    packed = packed_of(shapes, dtype, limit)
    assert sorted(index for batch in packed for index in batch.members) == list(range(len(shapes)))
    for batch in packed:
        (shape,) = {shapes[index] for index in batch.members}
        assert list(batch.members) == sorted(batch.members)
        assert batch.nbytes <= limit or len(batch.members) == batch.together == 1
        own = 4 * len(batch.members) * shape[0] * shape[1]
        inner = scratch_bytes(batch.together, shape, dtype)
        assert own + inner <= batch.nbytes < own + inner + 64
