// The lanes of a warp, and how they meet in shuffles and votes.
#pragma once

#include "context.h"
#include "runtime.h"

constexpr unsigned kWarpSize = 32;
constexpr const char* kOperationNames[] = {
    "__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync",  "__ballot_sync",
    "__any_sync",  "__all_sync",      "__reduce_max_sync", "__syncwarp"};

enum class State { kRunnable, kInBarrier, kInWarp, kExited };

struct Thread {
  Context context;
  State state;
  int line;
  WarpOperation operation;
  unsigned mask;
  unsigned source_lane;
  EmulatedWord word;  // what the thread gives to a warp's operation, then what it gets
};

// Lanes that meet in one operation; lanes of other masks may be elsewhere.
struct Meeting {
  WarpOperation operation;
  unsigned mask;
  unsigned arrived;
};

struct Warp {
  Meeting meetings[kWarpSize];
  unsigned count;
  unsigned missing;  // lanes that exited or never were
};

inline bool is_shuffle(WarpOperation operation) { return operation <= WarpOperation::kShuffleDown; }

inline Meeting& meet(Warp& warp, WarpOperation operation, unsigned mask, unsigned lane) {
  unsigned i = 0;
  while (i < warp.count &&
         (warp.meetings[i].mask != mask || warp.meetings[i].operation != operation)) {
    ++i;
  }
  if (i == warp.count) warp.meetings[warp.count++] = {operation, mask, 0};
  warp.meetings[i].arrived |= 1u << lane;
  return warp.meetings[i];
}

template <typename Visit>
void for_lanes(unsigned mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(unsigned(__builtin_ctz(mask)));
}

// Results are formed before any lane goes on, because its next operation replaces its word.
inline void complete(Thread* lanes, unsigned mask, WarpOperation operation) {
  if (is_shuffle(operation)) {
    EmulatedWord words[kWarpSize];
    for_lanes(mask, [&](unsigned lane) { words[lane] = lanes[lane].word; });
    for_lanes(mask, [&](unsigned lane) { lanes[lane].word = words[lanes[lane].source_lane]; });
    return;
  }
  EmulatedWord largest = 0;
  unsigned ballot = 0;
  for_lanes(mask, [&](unsigned lane) {
    largest = lanes[lane].word > largest ? lanes[lane].word : largest;
    ballot |= unsigned(lanes[lane].word & 1) << lane;
  });
  EmulatedWord result = ballot;
  if (operation == WarpOperation::kReduceMax) result = largest;
  if (operation == WarpOperation::kAny) result = ballot != 0;
  if (operation == WarpOperation::kAll) result = ballot == mask;
  for_lanes(mask, [&](unsigned lane) { lanes[lane].word = result; });
}
