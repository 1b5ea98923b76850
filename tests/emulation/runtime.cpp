// Runs the threads of a block as fibers. A thread runs until it waits for others or ends, and which
// one runs next is random, so that what is right only by luck goes wrong here: a reader without a
// barrier sees the poison or the old value, a writer without one destroys what others still need.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "host.h"
#include "warp.h"

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned char kGuard = 0x5a;
// As floats NaN and the largest numbers, as indices -1 and 2^31: no sum or maximum hides both.
constexpr unsigned char kPoisons[] = {0xff, 0x7f};

struct Random {
  EmulatedWord state;

  EmulatedWord next() {  // splitmix64
    EmulatedWord z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned limit) { return unsigned((next() >> 32) * limit >> 32); }
  void shuffle(unsigned* first, unsigned count) {
    for (unsigned i = count; i > 1; --i) std::swap(first[i - 1], first[below(i)]);
  }
};

EmulatedLaunch launch;
Random random_numbers;
Stacks stacks;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<unsigned> runnable;  // the first runnable_count are in use
unsigned runnable_count, in_barrier, exited, current;
bool newest_first;
unsigned char poison;
Context main_context;
std::string failure;

// ---- failures ------------------------------------------------------------------------------

void set_failure(int line, const std::string& what, bool in_thread) {
  failure = std::string(launch.kernel) + ", block " + std::to_string(blockIdx.x);
  if (in_thread) failure += ", thread " + std::to_string(current);
  if (line > 0) failure += ", line " + std::to_string(line);
  failure += ": " + what + " (launch seed " + std::to_string(launch.seed) + ")";
}

// The fibers stay where they are; the next launch starts on their stacks anew.
[[noreturn]] void leave_thread() {
  switch_context(threads[current].context, main_context);
  __builtin_unreachable();
}

[[noreturn]] void fail_on_bad_access(const void* address) {
  char text[96];
  std::snprintf(text, sizeof text, "invalid access to address %p, or the stack is full", address);
  set_failure(0, text, true);
  leave_thread();
}

std::string doing(const Thread& thread) {
  const std::string at = " at line " + std::to_string(thread.line);
  if (thread.state == State::kExited) return "exited";
  if (thread.state == State::kInBarrier) return "in __syncthreads" + at;
  char mask[32];
  std::snprintf(mask, sizeof mask, "(mask 0x%08x)", thread.mask);
  return std::string("in ") + kOperationNames[int(thread.operation)] + mask + at;
}

std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const size_t first = i;
    while (i + 1 < numbers.size() && numbers[i + 1] == numbers[i] + 1) ++i;
    text += (text.empty() ? "" : ",") + std::to_string(numbers[first]);
    if (i > first) text += "-" + std::to_string(numbers[i]);
    if (text.size() > 80) return text + ",...";
  }
  return text;
}

std::string what_all_do() {
  std::map<std::string, std::vector<unsigned>> doers;
  for (unsigned t = 0; t < launch.threads; ++t) {
    if (threads[t].state != State::kRunnable) doers[doing(threads[t])].push_back(t);
  }
  std::string text;
  for (const auto& [what, numbers] : doers) {
    text += (text.empty() ? "" : "; ") + what + ": " + ranges(numbers);
  }
  return text;
}

[[noreturn]] void fail_with_threads(int line, const char* what) {
  set_failure(line, std::string(what) + " [" + what_all_do() + "]", line > 0);
  leave_thread();
}

// ---- shared memory -------------------------------------------------------------------------

void poison_shared(const SharedObject& object) {
  std::memset(object.guarded, kGuard, kGuardBytes);
  std::memset(object.guarded + kGuardBytes, poison, object.bytes);
  std::memset(object.guarded + kGuardBytes + object.bytes, kGuard, kGuardBytes);
}

void check_shared(const SharedObject& object) {
  const unsigned char* behind = object.guarded + kGuardBytes + object.bytes;
  for (unsigned long i = 0; i < kGuardBytes && failure.empty(); ++i) {
    const std::string distance = std::to_string(i + 1) + " bytes ";
    const std::string name = std::string("shared memory '") + object.name + "'";
    if (behind[i] != kGuard) {
      set_failure(0, name + " was written " + distance + "behind its end", false);
    } else if (object.guarded[kGuardBytes - 1 - i] != kGuard) {
      set_failure(0, name + " was written " + distance + "before its start", false);
    }
  }
}

// ---- scheduling ----------------------------------------------------------------------------

void make_runnable(unsigned thread) {
  threads[thread].state = State::kRunnable;
  runnable[runnable_count++] = thread;
}

// Runs others until the current thread is runnable and its turn comes.
void run_another() {
  if (runnable_count == 0) {
    if (exited == launch.threads) leave_thread();
    fail_with_threads(0, "deadlock: all threads that have not exited wait");
  }
  const unsigned chosen = newest_first ? runnable_count - 1 : random_numbers.below(runnable_count);
  const unsigned next = runnable[chosen], previous = current;
  runnable[chosen] = runnable[--runnable_count];
  if (next == previous) return;
  current = threadIdx.x = next;
  switch_context(threads[previous].context, threads[next].context);
}

void thread_main() {
  launch.run(launch.call);
  threads[current].state = State::kExited;
  ++exited;
  if (in_barrier > 0) fail_with_threads(0, "a thread exited while others wait in __syncthreads");
  Warp& warp = warps[current / kWarpSize];
  const unsigned lane = 1u << current % kWarpSize;
  warp.missing |= lane;
  for (unsigned i = 0; i < warp.count; ++i) {
    if (warp.meetings[i].mask & lane) fail_with_threads(0, "a lane exited that others wait for");
  }
  run_another();
  __builtin_unreachable();
}

void start_block() {
  runnable_count = in_barrier = exited = 0;
  newest_first = random_numbers.below(2) != 0;
  poison = kPoisons[random_numbers.below(2)];
  for (SharedObject* o = *launch.shared; o != nullptr; o = o->next) poison_shared(*o);
  for (unsigned t = 0; t < launch.threads; ++t) {
    unsigned char* top = stacks.top(t);
    prepare_context(threads[t].context, top - kUsableStack, top, thread_main);
    make_runnable(t);
  }
  random_numbers.shuffle(runnable.data(), runnable_count);
  for (unsigned w = 0; w < warps.size(); ++w) {
    const unsigned lanes = launch.threads - w * kWarpSize;
    warps[w].count = 0;
    warps[w].missing = lanes < kWarpSize ? ~0u << lanes : 0;
  }
}

void run_block() {
  start_block();
  current = threadIdx.x = runnable[--runnable_count];
  switch_context(main_context, threads[current].context);
}

}  // namespace

// ---- what kernels and Python call ----------------------------------------------------------

EmulatedWord emulator_warp(WarpOperation operation, unsigned mask, EmulatedWord value,
                           unsigned source_lane, int line) {
  const unsigned self = current, lane = self % kWarpSize, first = self - lane;
  Warp& warp = warps[self / kWarpSize];
  Thread& thread = threads[self];
  thread.line = line;
  thread.operation = operation;
  thread.mask = mask;
  thread.source_lane = source_lane;
  thread.word = value;
  thread.state = State::kInWarp;
  if (!(mask >> lane & 1)) fail_with_threads(line, "the mask does not name the calling lane");
  if (mask & warp.missing) fail_with_threads(line, "the mask names a lane that does not run");
  if (is_shuffle(operation) && !(mask >> source_lane & 1)) {
    fail_with_threads(line, "a shuffle reads a lane that its mask does not name");
  }
  Meeting& meeting = meet(warp, operation, mask, lane);
  if (meeting.arrived == mask) {
    meeting = warp.meetings[--warp.count];
    complete(&threads[first], mask, operation);
    const unsigned before = runnable_count;
    for_lanes(mask, [&](unsigned i) { make_runnable(first + i); });
    if (newest_first) random_numbers.shuffle(&runnable[before], runnable_count - before);
  }
  run_another();
  return threads[self].word;
}

void emulator_block_barrier(int line) {
  Thread& thread = threads[current];
  thread.line = line;
  thread.state = State::kInBarrier;
  if (exited > 0) fail_with_threads(line, "__syncthreads, but some threads have exited");
  ++in_barrier;
  static int common_line;
  if (in_barrier == 1) common_line = line;
  if (line != common_line) fail_with_threads(line, "threads meet in different __syncthreads");
  if (in_barrier == launch.threads) {
    in_barrier = 0;
    for (unsigned t = 0; t < launch.threads; ++t) make_runnable(t);
    if (newest_first) random_numbers.shuffle(runnable.data(), runnable_count);
  }
  run_another();
}

void emulator_register_shared(SharedObject* object, SharedObject** head) {
  object->next = *head;
  *head = object;
  poison_shared(*object);
}

void emulator_fail(int line, const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  set_failure(line, text, true);
  leave_thread();
}

const char* emulator_launch(const EmulatedLaunch* wanted) {
  launch = *wanted;
  random_numbers.state = launch.seed;
  failure.clear();
  blockDim.x = launch.threads;
  gridDim.x = launch.blocks;
  threads.resize(launch.threads);
  runnable.resize(launch.threads);
  warps.resize((launch.threads + kWarpSize - 1) / kWarpSize);
  if (!stacks.reserve(launch.threads)) return "no memory for the stacks of the threads";

  std::vector<unsigned> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0u);
  random_numbers.shuffle(order.data(), launch.blocks);
  const BadAccessTrap trap(fail_on_bad_access);
  for (const unsigned block : order) {
    blockIdx.x = block;
    run_block();
    for (SharedObject* o = *launch.shared; o != nullptr; o = o->next) {
      if (failure.empty()) check_shared(*o);
    }
    if (!failure.empty()) return failure.c_str();
  }
  return nullptr;
}
