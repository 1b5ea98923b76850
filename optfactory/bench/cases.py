"""Which tensors are stepped. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shapes = tuple[tuple[int, ...], ...]

# torch's name of a dtype -> bytes of an element
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One set of tensors, and what tables call it."""

    name: str
    text: str
    shapes: Shapes

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(map(math.prod, self.shapes))


def gpt2_small() -> Shapes:
    """The parameter shapes of GPT-2 small, 124,439,808 elements in 148 tensors."""
    width = 768
    norm: Shapes = ((width,), (width,))
    attention: Shapes = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp: Shapes = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *(norm + attention + norm + mlp) * 12, *norm)


def llama_7b() -> Shapes:
    """The parameter shapes of Llama 7B, 6,738,415,616 elements in 291 tensors."""
    width, hidden, tokens = 4096, 11008, 32000
    attention: Shapes = ((width, width),) * 4
    mlp: Shapes = ((hidden, width), (width, hidden), (hidden, width))
    norms: Shapes = ((width,), (width,))
    return ((tokens, width), *(attention + mlp + norms) * 32, (width,), (tokens, width))


CASES = {
    case.name: case
    for case in (
        Case("large", "one tensor of 33.5 M elements", ((8192, 4096),)),
        Case("gpt2", "GPT-2 small, 124 M elements", gpt2_small()),
        Case("small", "1000 tensors of 64 and 200 of 64x64", ((64,),) * 1000 + ((64, 64),) * 200),
        Case("1m", "one tensor of 1 M elements", ((1024, 1024),)),
        Case("100m", "one tensor of 101 M elements", ((12288, 8192),)),
        Case("1b", "one tensor of 1.01 B elements", ((32768, 30720),)),
        Case("llama7b", "Llama 7B", llama_7b()),
        Case(
            "small2000",
            "1000 tensors of 64, 500 of 64x64, 300 of 1024 and 200 of 128x256",
            ((64,),) * 1000 + ((64, 64),) * 500 + ((1024,),) * 300 + ((128, 256),) * 200,
        ),
        Case("tiny", "a few tensors, to try the command", ((64,),) * 10 + ((128, 256),) * 4),
    )
}


def fitting(case: Case, dtype: str, room: float) -> Case:
    """The first tensors of a case for which `room` bytes are enough.

    Parameters, gradients, torch's states in their dtype, and a candidate's in float32.
    """
    each = 4 * DTYPES[dtype] + 8
    count = 0
    for shape in case.shapes:
        room -= each * math.prod(shape)
        if room < 0:
            break
        count += 1
    if count == len(case.shapes):
        return case
    text = f"{case.text}, of which the first {count} of {len(case.shapes)} tensors fit"
    return Case(case.name, text, case.shapes[:count])
