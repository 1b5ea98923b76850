"""What would be wrong in a kernel, its tests notice: bugs are planted into the real source."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from optfactory.backends.cuda import backend as cuda
from optfactory.rules.codegen import KernelVariant, cuda_source
from tests.emulation.bench import Bench
from tests.emulation.harness import CASES, PAIRS, Shape, emulator, needs_fma
from tests.emulation.views import Fences, Views
from tests.unit.harness import needs_compiler

pytestmark = [needs_compiler, needs_fma]

ADAM_32, ADAM_8, LAMB_8 = "adam-adam-None-32", "adam-adam-None-8", "lamb-lamb-lamb-8"
SHAPES: list[Shape] = [(257,), (4097,), (33, 300), (6000,)]
SEEDS = range(4)

# What a check says: a driver's or a guard's message, or that results differ.
OUTSIDE = "bytes (behind its end|before its start)|invalid access"
MISALIGNED = "misaligned address"
DIFFERENT = "differ|off by|wrong codes|scales|is not finite|elements wrong"


def run_bench(label: str, seed: int, block_size: int = 256, blocks: int = 3) -> None:
    """Two steps compared with the reference and the native backend."""
    asked = {"block_size": block_size} if block_size != 256 else {}
    bench = Bench(CASES[label], PAIRS["fp32"], SHAPES, emulator(seed, blocks)[0], **asked)
    for step in range(2):
        before = bench.before()
        bench.new_gradients(step)
        bench.step()
        bench.compare(before)


def adam_32(seed: int) -> None:
    run_bench(ADAM_32, seed)


def adam_8(seed: int) -> None:
    run_bench(ADAM_8, seed)


def small_blocks(seed: int) -> None:
    """Teams of eight threads."""
    run_bench(ADAM_8, seed, block_size=64)


def large_blocks(seed: int) -> None:
    """Teams of four warps."""
    run_bench(ADAM_8, seed, block_size=1024)


def lamb_8(seed: int) -> None:
    """A single block of threads has all chunks and all tensors."""
    run_bench(LAMB_8, seed, blocks=1)


def views(seed: int) -> None:
    """Strided tensors against contiguous ones."""
    pair = Views("adam8bit", PAIRS["fp32"])
    pair.new_gradients(0)
    pair.step(emulator(seed)[0])


def fences(seed: int) -> None:
    """Tensors that end before inaccessible memory."""
    Fences("adam8bit", torch.float32, "behind").step(emulator(seed)[0], 0)


@dataclass(frozen=True)
class Plant:
    """A piece of source, what replaces it (wherever it is), and how that shows.

    With `always` it shows whatever the seed, so that no order of threads hides it.
    """

    check: Callable[[int], None]
    old: str
    new: str
    shows: str
    always: bool = True


BARRIER = "  __syncthreads();\n"
ALIGNED = "reinterpret_cast<unsigned long long>(address) % alignof(Pack<T>) == 0"
WRITE_GUARD = "if (position(at, i) >= at.n) continue;\n      const int64_t element"
# Not where a team has no block: that would be far behind all guards.
WRITE_BEHIND = WRITE_GUARD.replace("at.n)", "at.n + (at.n > 0))")
LAST_MAP = "load_map(shared.unsigned_map, maps.words[1]);\n"
TEAM_MAX = "shared.team_max[turn & 1][j][warp] = values[j];\n  }\n"
SUMS = "buffer.values[1][threadIdx.x / kWarp] = sums[1];\n  }\n"
SUMS_BEFORE = "  __syncthreads();  // the first thread may still read the sums of the call before\n"
STATE_ALIGNED = "at.vectorized & is_aligned(work.states->state[j] + at.first)"
LOSE_STATE = "const Stored lost [[maybe_unused]] ="

PLANTS = {
    # Outside of tensors.
    "writes one behind": Plant(adam_8, WRITE_GUARD, WRITE_BEHIND, OUTSIDE),
    "writes one behind, 32 bits": Plant(adam_32, WRITE_GUARD, WRITE_BEHIND, OUTSIDE),
    "reads one behind": Plant(
        fences, "exists = position(at, i) < at.n", "exists = position(at, i) <= at.n", OUTSIDE
    ),
    "scales of blocks that are not there": Plant(
        adam_8, "at.lane == 0 && at.n > 0", "at.lane == 0", OUTSIDE
    ),
    "tail as long as a block": Plant(adam_8, "left < BLOCK ? int(left) : BLOCK", "BLOCK", OUTSIDE),
    "packs beyond a tail": Plant(
        adam_32, "& ((at.lane + 1) * kVector <= at.n)", "& (at.lane * kVector < at.n)", OUTSIDE
    ),
    # Alignment.
    "all is aligned": Plant(adam_8, ALIGNED, "true", MISALIGNED),
    "all is aligned, 32 bits": Plant(adam_32, ALIGNED, "true", MISALIGNED),
    "codes are aligned": Plant(adam_8, STATE_ALIGNED, "at.vectorized", MISALIGNED),
    "gradients are aligned": Plant(adam_32, "& is_aligned(work.g + at.first)", "", MISALIGNED),
    # Barriers.
    "no barrier behind the maps": Plant(
        adam_8, LAST_MAP + BARRIER, LAST_MAP, f"{DIFFERENT}|array index"
    ),
    "no barrier in a team": Plant(large_blocks, TEAM_MAX + BARRIER, TEAM_MAX, DIFFERENT),
    "one buffer for all turns": Plant(large_blocks, "[turn & 1]", "[0]", DIFFERENT),
    "no barrier before sums are read": Plant(lamb_8, SUMS + BARRIER, SUMS, DIFFERENT),
    "no barrier before sums are replaced": Plant(lamb_8, SUMS_BEFORE, "", DIFFERENT, always=False),
    # Reductions.
    "teams of a whole warp": Plant(
        small_blocks, "if (kTeam >= kWarp) {", "if (kTeam >= 1) {", DIFFERENT
    ),
    "every other lane of a team": Plant(
        small_blocks, "lanes *= 2) {\n", "lanes *= 4) {\n", DIFFERENT
    ),
    "the first team's maximum": Plant(
        large_blocks, "threadIdx.x / kTeam * (kTeam / kWarp)", "0", DIFFERENT
    ),
    "half of a warp's sum": Plant(lamb_8, "lanes = kWarp / 2;", "lanes = kWarp / 4;", DIFFERENT),
    "not all warps' sums": Plant(lamb_8, "warp < kWarps;", "warp < kWarps - 1;", DIFFERENT),
    "the first tensor's norms": Plant(lamb_8, "(tensor.first_chunk + c)", "c", DIFFERENT),
    "the first tensor's ratio": Plant(lamb_8, "ratios[chunk.tensor]", "ratios[0]", DIFFERENT),
    # What is not written, or not where it belongs.
    "parameters are not written": Plant(adam_8, "write_pack(work.p, at, e.p);", "", DIFFERENT),
    "scales are not written": Plant(
        adam_8, "work.states->absmax[j][at.block] = e.scales[j];", ";", DIFFERENT
    ),
    "states of tails are not written": Plant(
        adam_32, "work.states->state[j][element] =", LOSE_STATE, DIFFERENT
    ),
    "chunks are left out": Plant(adam_8, "c += gridDim.x", "c += 2 * gridDim.x", DIFFERENT),
    "blocks run over rows": Plant(adam_8, "left = work.cols - col;", "", f"{OUTSIDE}|{DIFFERENT}"),
    "views are written as if contiguous": Plant(
        views, "work.p[offset_of(p_view, element)] =", "work.p[element] =", f"{OUTSIDE}|{DIFFERENT}"
    ),
    "views are read as if contiguous": Plant(
        views, "work.g[offset_of(g_view, element)]", "work.g[element]", DIFFERENT
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, bug: Plant) -> None:
    def planted(variant: KernelVariant) -> str:
        source = cuda_source(variant)
        assert bug.old in source, "the source has changed: plant this bug anew"
        return source.replace(bug.old, bug.new)

    monkeypatch.setattr(cuda, "cuda_source", planted)


def noticed(bug: Plant, seed: int) -> str:
    """What the check says of a bug; nothing if it passes."""
    try:
        bug.check(seed)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("label", PLANTS)
def test_a_planted_bug_is_noticed(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = PLANTS[label]
    plant(monkeypatch, bug)
    messages = [noticed(bug, seed) for seed in SEEDS]
    assert all(messages) if bug.always else any(messages)
    for message in filter(None, messages):
        assert re.search(bug.shows, message), message


@pytest.mark.parametrize("check", dict.fromkeys(bug.check for bug in PLANTS.values()))
def test_the_checks_pass_without_bugs(check: Callable[[int], None]) -> None:
    for seed in SEEDS:
        check(seed)
