"""Threads of the emulator: what barriers and warps order works, what nothing orders goes wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from optfactory.build.cache import CACHE_VARIABLE
from optfactory.errors import KernelCompileError
from tests.emulation.arguments import address, integer
from tests.emulation.driver import EmulatedDriver, EmulatedModule, EmulationError
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(6)

RIGHT = r"""
struct Partial { float sums[16]; };
struct Row { float values[512]; };

// The sum of x in each block: within warps, then over them.
extern "C" __global__ void __launch_bounds__(512, 2)
    total(const float* x, float* out, const int n) {
  OPT_SHARED(Partial, partial);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (lane == 0) partial.sums[warp] = sum;
  __syncthreads();  // TOTAL
  if (warp == 0) {
    sum = lane < 16 ? partial.sums[lane] : 0.0f;
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane == 0) out[blockIdx.x] = sum;
  }
}

// Every element moves by one place, in shared memory.
extern "C" __global__ void rotate(float* x) {
  OPT_SHARED(Row, row);
  const int i = threadIdx.x;
  row.values[i] = x[i];
  __syncthreads();
  const float value = row.values[i];
  __syncthreads();  // ROTATE
  row.values[(i + 1) % 512] = value;
  __syncthreads();
  x[i] = row.values[i];
}

// As rotate, within warps.
extern "C" __global__ void rotate_warps(float* x) {
  OPT_SHARED(Row, row);
  const int i = threadIdx.x;
  row.values[i] = x[i];
  __syncwarp();
  const float value = row.values[i];
  __syncwarp();  // ROTATE_WARPS
  row.values[i / 32 * 32 + (i + 1) % 32] = value;
  __syncwarp();
  x[i] = row.values[i];
}

// One row for two rounds: a fast warp must not begin the second while others read the first.
extern "C" __global__ void two_rounds(float* out) {
  OPT_SHARED(Row, row);
  const int i = threadIdx.x;
  for (int round = 1; round <= 2; ++round) {
    row.values[i] = __shfl_sync(0xffffffffu, float(round * i), i % 32);
    __syncthreads();
    out[i] += row.values[511 - i];
    __syncthreads();  // TWO_ROUNDS
  }
}

// Lanes of different masks are at different places, and at the same place in different rounds.
extern "C" __global__ void masks(int* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : lane < 24 ? 0x00ff0000u : 0xff000000u;
  int value = lane;
  const int rounds = lane < 16 ? 5 : lane < 24 ? 2 : 1;
  for (int i = 0; i < rounds; ++i) value += __shfl_xor_sync(mask, value, 1);
  if (lane >= 24) value += __reduce_max_sync(0xff000000u, lane);
  value += __shfl_sync(0xffffffffu, value, 31);
  out[threadIdx.x] = value;
}

extern "C" __global__ void order_of_threads(int* next, int* out) { out[(*next)++] = threadIdx.x; }
extern "C" __global__ void order_of_blocks(int* next, int* out) {
  if (threadIdx.x == 0) out[(*next)++] = blockIdx.x;
}
"""


@pytest.fixture(scope="module")
def right() -> EmulatedModule:
    return EmulatedDriver().module(RIGHT, "right", 512, CPU)


def without(barrier: str, seed: int) -> EmulatedModule:
    source, count = re.subn(rf"__sync\w+\(\);  // {barrier}\n", "\n", RIGHT)
    assert count == 1
    return EmulatedDriver(seed).module(source, f"without_{barrier.lower()}", 512, CPU)


def run_total(module: EmulatedModule) -> bool:
    x, out = torch.arange(1000.0), torch.zeros(3)
    module.launch("total", 3, [address(x), address(out), integer(1000)])
    return out.tolist() == [499500.0] * 3


def run_rotate(module: EmulatedModule, kernel: str = "rotate") -> bool:
    x = torch.arange(512.0)
    group = 512 if kernel == "rotate" else 32
    expected = x.view(-1, group).roll(1, 1).flatten()
    module.launch(kernel, 1, [address(x)])
    return torch.equal(x, expected)


def run_rotate_warps(module: EmulatedModule) -> bool:
    return run_rotate(module, "rotate_warps")


def run_two_rounds(module: EmulatedModule) -> bool:
    out = torch.zeros(512)
    module.launch("two_rounds", 1, [address(out)])
    return torch.equal(out, 3 * torch.arange(512.0).flip(0))


RUNS = {
    "TOTAL": run_total,
    "ROTATE": run_rotate,
    "ROTATE_WARPS": run_rotate_warps,
    "TWO_ROUNDS": run_two_rounds,
}


@pytest.mark.parametrize("barrier", RUNS)
def test_kernels_with_all_barriers_are_right_in_any_order(
    barrier: str, right: EmulatedModule
) -> None:
    assert all(RUNS[barrier](right) for _ in range(20))


@pytest.mark.parametrize("barrier", RUNS)
def test_a_missing_barrier_is_found_with_any_seed(barrier: str) -> None:
    for seed in SEEDS:
        assert not RUNS[barrier](without(barrier, seed)), seed


def test_lanes_of_different_masks_do_not_wait_for_each_other(right: EmulatedModule) -> None:
    out = torch.zeros(512, dtype=torch.int32)
    right.launch("masks", 1, [address(out)])
    lanes = np.arange(32)
    pairs = lanes + (lanes ^ 1)
    values = np.select([lanes < 16, lanes < 24], [pairs * 16, pairs * 2], pairs + 31)
    assert np.array_equal(out.numpy().reshape(16, 32), np.tile(values + values[31], (16, 1)))


def orders(driver: EmulatedDriver, what: str, launches: int) -> list[list[int]]:
    module = driver.module(RIGHT, "right", 512, CPU)
    count = 512 if what == "threads" else 20
    found = []
    for _ in range(launches):
        following, out = torch.zeros(1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
        blocks = 1 if what == "threads" else count
        module.launch(f"order_of_{what}", blocks, [address(following), address(out)])
        assert sorted(out.tolist()) == list(range(count))
        found.append(out.tolist())
    return found


@pytest.mark.parametrize("what", ["threads", "blocks"])
def test_orders_are_shuffled_and_reproducible(what: str) -> None:
    first, again = (orders(EmulatedDriver(seed=3), what, 4) for _ in range(2))
    assert first == again
    assert len({tuple(order) for order in first}) == 4
    assert orders(EmulatedDriver(seed=4), what, 1)[0] != first[0]
    fixed = EmulatedDriver()
    fixed.launch_seed = 17
    assert len({tuple(order) for order in orders(fixed, what, 3)}) == 1


def test_launches_are_recorded(right: EmulatedModule) -> None:
    driver = EmulatedDriver(blocks=7)
    module = driver.module(RIGHT, "right", 512, CPU)
    with driver.on(CPU):
        run_total(module)
        run_rotate(module)
    assert driver.launches == [("total", 3), ("rotate", 1)]
    assert driver.resident_blocks(CPU) == 7
    assert not driver.capturing(CPU)


PARAMETERS = r"""
struct Bucket { double scale; int count; float* out; };
// extern "C" __global__ void commented_out(int a) {}
extern "C" __global__ void nothing() {}
extern "C" __global__ void __launch_bounds__(64, 2) fill(const Bucket bucket,
                                                         unsigned char code) {
  for (int i = threadIdx.x; i < bucket.count; i += blockDim.x) bucket.out[i] = bucket.scale + code;
}
"""
BUCKET = np.dtype([("scale", "f8"), ("count", "i4"), ("out", "u8")], align=True)


def test_parameters_are_passed_by_value_and_checked() -> None:
    module = EmulatedDriver().module(PARAMETERS, "parameters", 64, CPU)
    out = torch.zeros(100)
    bucket, code = np.zeros(1, BUCKET), np.array(3, np.uint8)
    bucket[0] = (0.5, 100, out.data_ptr())
    module.launch("nothing", 2, [])
    module.launch("fill", 1, [bucket, code])
    assert out.eq(3.5).all()
    packed = bucket.astype(np.dtype([(n, BUCKET[n]) for n in BUCKET.names]))
    wrong = [
        ([packed, code], "argument 0 of fill has 24 bytes, got 20"),
        ([bucket, integer(3)], "argument 1 of fill has 1 bytes, got 4"),
        ([bucket], "fill takes 2 arguments, got 1"),
        ([bucket, np.zeros(2, np.uint8)], "single values"),
    ]
    for arguments, message in wrong:
        with pytest.raises(EmulationError, match=message):
            module.launch("fill", 1, arguments)
    with pytest.raises(EmulationError, match="no kernel commented_out"):
        module.launch("commented_out", 1, [integer(0)])
    with pytest.raises(EmulationError, match="at least one block"):
        module.launch("nothing", 0, [])


def test_a_source_that_does_not_compile_says_where() -> None:
    with pytest.raises(KernelCompileError, match=r"bad\.cu:2:\d+: error: .*unknown_function"):
        EmulatedDriver().module("\nint f() { return unknown_function(); }", "bad", 32, CPU)


BUILD = """
import torch
from tests.emulation.driver import EmulatedDriver
source = 'extern "C" __global__ void nothing() {}'
EmulatedDriver().module(source, "shared", 32, torch.device("cpu")).launch("nothing", 1, [])
"""


def test_processes_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    started = [subprocess.Popen([sys.executable, "-c", BUILD], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert len(list(tmp_path.glob("shared-emulated-*.so"))) == 1
    assert not list(tmp_path.glob("build-*"))
