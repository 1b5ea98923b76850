// What a kernel's library and the emulator's runtime share. No standard header is included: CUDA
// sources define their own int64_t and must not find names that NVRTC would not give them.
#pragma once

using EmulatedWord = unsigned long long;

struct EmulatedIndex {
  unsigned x;  // grids and blocks have one dimension, so that a use of y or z does not compile
};

// A __shared__ object of one library, with the guard bytes before and behind it.
struct SharedObject {
  const char* name;
  unsigned char* guarded;  // kGuardBytes, `bytes` of the object, kGuardBytes
  unsigned long bytes;
  SharedObject* next;
};

constexpr unsigned long kGuardBytes = 256;

enum class WarpOperation : int {
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
  kReduceMax,
  kSyncWarp,
};

struct EmulatedLaunch {
  const char* kernel;
  unsigned blocks;
  unsigned threads;
  EmulatedWord seed;
  void (*run)(const void* call);  // one thread of the kernel
  const void* call;
  SharedObject* const* shared;  // the head of the library's list, which grows during the launch
};

extern "C" {
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

// Runs all blocks. Returns null, or what went wrong, valid until the next launch.
const char* emulator_launch(const EmulatedLaunch* launch);

// The rest is called by the threads of a kernel; `line` is theirs. Those that wait for other
// threads return when these have arrived.
void emulator_block_barrier(int line);
EmulatedWord emulator_warp(WarpOperation operation, unsigned mask, EmulatedWord value,
                           unsigned source_lane, int line);
void emulator_register_shared(SharedObject* object, SharedObject** head);

// Gives the launch up and never returns to the thread.
[[noreturn]] void emulator_fail(int line, const char* format, ...);
}
