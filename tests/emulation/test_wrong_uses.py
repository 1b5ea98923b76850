"""What no kernel may do is an error that tells kernel, block, thread and line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulation.arguments import address, integer
from tests.emulation.driver import EmulatedDriver, EmulatedModule, EmulationError
from tests.emulation.guarded import Guarded
from tests.unit.harness import needs_compiler

pytestmark = needs_compiler

CPU = torch.device("cpu")

# With how = 0 nothing is wrong.
ORDER = r"""
extern "C" __global__ void order(int how, float* out) {
  const unsigned all = 0xffffffffu, i = threadIdx.x;
  float value = i;
  if (how == 1 && i == 77) return;
  __syncthreads();
  if (how == 2 && i < 16) value = __shfl_xor_sync(all, value, 2);
  if (how == 3 && i < 100) __syncthreads();
  if (how == 4 && i == 9) value = __shfl_xor_sync(0xfffffdffu, value, 2);
  if (how == 5 && i < 16) value = __shfl_xor_sync(0x0000ffffu, value, 16);
  if (how == 6 && i < 32) value = i == 0 ? __any_sync(all, 1) : __shfl_sync(all, value, 3);
  if (how == 7 && i == 40) value = __shfl_sync(0x00000300u, value, 9);
  __syncthreads();
  if (how == 8 && i == 33) return;
  value = __shfl_down_sync(all, value, 1);
  out[i] = value;
}
"""
EXITED = "(exited while others wait in __syncthreads|some threads have exited).*exited: 77"
LEFT = "(a lane exited that others wait for|names a lane that does not run).*exited: .*33"
ORDER_MESSAGES = {
    1: EXITED,
    2: r"deadlock.*in __shfl_xor_sync\(mask 0xffffffff\) at line LINE: 0-15; in __syncthreads",
    3: r"different __syncthreads.*in __syncthreads at line LINE: ",
    4: r"thread 9, line LINE: the mask does not name the calling lane",
    5: r"line LINE: a shuffle reads a lane that its mask does not name",
    6: r"deadlock.*__any_sync\(mask 0xffffffff\) at line LINE: 0; in __shfl_sync.*LINE: 1-31;",
    7: r"deadlock.*in __shfl_sync\(mask 0x00000300\) at line LINE: 40; in __syncthreads",
    8: LEFT,
}

MEMORY = r"""
struct Small { float values[16]; };
struct Mixed { int index; float factor; double sum; };

static __device__ int depth_of(volatile int* n) {
  volatile int frame[64];
  frame[0] = *n;
  return *n == 0 ? 0 : depth_of(n) + frame[0];
}

extern "C" __global__ void memory(int how, float* x, int n, const float* nothing) {
  OPT_SHARED(Small, small);
  float* values = small.values;
  const int i = threadIdx.x;
  if (i < 16) values[i] = 0.0f;
  if (how == 1 && i == 3) values[16] = 1.0f;
  if (how == 2 && i == 3) values[-2] = 1.0f;
  if (how == 3) small.values[i] = 1.0f;
  if (how == 4 && i == 2) x[0] = nothing[n];
  if (how == 5 && i == 2) *x = *nothing;
  if (how == 6 && i == 2) x[0] = reinterpret_cast<const float*>(0x10000)[0];
  if (how == 7 && i == 2) x[0] = depth_of(&n);
  if (how == 8) x[i] = (n + i + 2147483647) > n;
  if (how == 9) x[i] = 1 << (n + i);
  if (how == 10) x[i] = n / i;
  if (how == 11) x[i] = int(3e9f * n);
  if (how == 12) x[i + 17] = 1.0f;
  if (how == 13 && i == 0) x[-1] = 1.0f;
}

extern "C" __global__ void never_written(Mixed* out, int write) {
  OPT_SHARED(Mixed, mixed);
  if (threadIdx.x == 0) out[blockIdx.x] = mixed;
  if (threadIdx.x == 0 && write) mixed = {1, 1.0f, 1.0};
}

extern "C" __global__ void vectors(int how, const float4* x, const uint2* u, float* out) {
  if (how == 0) { const float4 v = *x; *out = v.x + v.w; }
  if (how == 1) { const float4 v = __ldg(x); *out = v.x + v.w; }
  if (how == 2) *out = x->y;
  if (how == 3) { const uint2 v = __ldcs(u); *out = v.x; }
  if (how == 4) { const uint2 v = u[0]; *out = v.y; }
  if (how == 5) __stcs(reinterpret_cast<float4*>(out), make_float4(1, 2, 3, 4));
  if (how == 6) *reinterpret_cast<float4*>(out) = make_float4(1, 2, 3, 4);
  if (how == 7) *reinterpret_cast<float2*>(out) = {1, 2};
}
"""
MEMORY_MESSAGES = {
    1: "shared memory 'small' was written 1 bytes behind its end",
    2: "shared memory 'small' was written 5 bytes before its start",
    3: r"line LINE: array index \d+ is out of bounds",
    4: "thread 2: invalid access to address 0x4,",
    5: "thread 2, line LINE: access through a null pointer",
    6: "thread 2: invalid access to address 0x10000,",
    7: "thread 2: invalid access to address .*, or the stack is full",
    8: r"line LINE: signed integer overflow \(add\)",
    9: r"line LINE: shift by a negative number or by the type's width",
    10: "line LINE: integer division by zero",
    11: "line LINE: a float that does not fit the integer type",
}


def expected(source: str, kernel: str, how: int, message: str) -> str:
    lines = enumerate(source.splitlines(), 1)
    line = next(i for i, text in lines if text.startswith(f"  if (how == {how}"))
    return rf"^{kernel}, block \d.*{message.replace('LINE', str(line))}.*launch seed \d+"


@pytest.fixture(scope="module")
def order() -> EmulatedModule:
    return EmulatedDriver().module(ORDER, "order", 512, CPU)


@pytest.fixture(scope="module")
def memory() -> EmulatedModule:
    return EmulatedDriver().module(MEMORY, "memory", 32, CPU)


@pytest.mark.parametrize("how", ORDER_MESSAGES)
def test_threads_that_do_not_meet(how: int, order: EmulatedModule) -> None:
    out = torch.zeros(512)
    for _ in range(6):
        with pytest.raises(
            EmulationError, match=expected(ORDER, "order", how, ORDER_MESSAGES[how])
        ):
            order.launch("order", 1, [integer(how), address(out)])
        order.launch("order", 1, [integer(0), address(out)])  # nothing is left of the failure
        assert out[0] == 1.0


def launch_memory(module: EmulatedModule, how: int, x: torch.Tensor) -> None:
    module.launch("memory", 2, [integer(how), address(x), integer(1), np.array(0, np.uint64)])


@pytest.mark.parametrize("how", MEMORY_MESSAGES)
def test_wrong_accesses_and_undefined_arithmetic(how: int, memory: EmulatedModule) -> None:
    x = torch.zeros(32)
    message = expected(MEMORY, "memory", how, MEMORY_MESSAGES[how])
    launch_memory(memory, 0, x)
    for _ in range(2):
        with pytest.raises(EmulationError, match=message):
            launch_memory(memory, how, x)
    launch_memory(memory, 0, x)


def test_shared_memory_is_poisoned_for_every_block(memory: EmulatedModule) -> None:
    mixed = np.dtype([("index", "i4"), ("factor", "f4"), ("sum", "f8")])
    for write in (0, 1):
        out = np.zeros(40, mixed)
        memory.launch("never_written", 40, [np.array(out.ctypes.data, np.uint64), integer(write)])
        assert np.all((out["index"] == -1) | (out["index"] > 2**30))
        for number in ("factor", "sum"):
            assert np.all(np.isnan(out[number]) | (out[number] > 1e38))
            assert 0 < np.isnan(out[number]).sum() < 40


@pytest.mark.parametrize("how", range(8))
def test_misaligned_vectors(how: int, memory: EmulatedModule) -> None:
    guarded = Guarded()
    for offset in (0, 1):
        x = guarded.copy("x", torch.ones(8), offset)
        u = guarded.copy("u", torch.ones(8, dtype=torch.int32), offset)
        out = guarded.empty("out", (8,), torch.float32, offset if how > 4 else 0)
        arguments = [integer(how), address(x), address(u), address(out)]
        if offset == 0:
            memory.launch("vectors", 1, arguments)
            assert out[0].item() in (1.0, 2.0)
        else:
            with pytest.raises(EmulationError, match=r"thread .* misaligned address 0x\w+[4c]: "):
                memory.launch("vectors", 1, arguments)
    guarded.check()


@pytest.mark.parametrize("offset", [0, 1])
def test_guards_around_tensors(offset: int, memory: EmulatedModule) -> None:
    for how, numel, message in (
        (12, 49, None),
        (12, 48, "'x' was written 1 bytes behind its end"),
        (12, 15, "'x' was written 9 bytes behind its end"),
        (13, 48, "'x' was written 1 bytes before its start"),
    ):
        guarded = Guarded()
        x = guarded.empty("x", (numel,), torch.float32, offset)
        codes = guarded.empty("codes", (7, 1), torch.uint8, offset)
        assert x.isnan().all()
        assert codes.eq(0xA5).all()
        guarded.check()
        launch_memory(memory, how, x)
        if message is None:
            guarded.check()
        else:
            with pytest.raises(AssertionError, match=message):
                guarded.check()
