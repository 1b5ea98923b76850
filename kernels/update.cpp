// The CPU kernel: one call per bucket and pass, work split into chunks of blocks over threads.
//
// optfactory.codegen puts before this text: prelude.cuh, the macros PARAM, GRAD (dtypes), STATES
// (number of states), BLOCK (elements of a block), QUANTIZED, TRUST_RATIO and those of element.cuh,
// the struct Scalars, kSigned[STATES], element.cuh, cpu_codec.h, cpu_tables.h, and the rule texts
// as update_rule() and trust_ratio().
//
// Results do not depend on the number of threads: elements are independent, and norms are summed
// per chunk and then over chunks in a fixed order.

// ---- one block -------------------------------------------------------------------------------

struct Place {  // of a block in its tensor
  int64_t first;
  int64_t block;
  int n;
};

// Asks for a later block's data: the hardware's own prefetching does not reach past the
// computation of a block. Addresses behind a tensor's end are harmless.
constexpr int64_t kPrefetchDistance = 1024;

template <class T>
OPT_FN void prefetch(const T* base, const Place& at) {
  const char* from = reinterpret_cast<const char*>(base + at.first + kPrefetchDistance);
  for (int64_t byte = 0; byte < int64_t(at.n * sizeof(T)); byte += 64)
    __builtin_prefetch(from + byte);
}

OPT_FN void prefetch(const Tensor& t, const Place& at) {
  prefetch(t.p, at);
  prefetch(t.g, at);
  for (int j = 0; j < STATES; ++j) prefetch(static_cast<const Stored*>(t.state[j]), at);
}

// A block on the stack, or pointers into memory where that holds float32 already.
struct Block {
  float p_buffer[BLOCK], g_buffer[BLOCK], state_buffers[STATES][BLOCK];
  float* p;
  const float* g;
  float* states[STATES];
};

// The place of a block's scale.
OPT_FN int64_t scale_index(const Place& at) { return TENSOR_WISE ? 0 : at.block; }

OPT_FN void load_block(const Bucket& bucket, const Tensor& t, const Place& at, Block& block) {
  prefetch(t, at);
  block.p = load(t.p, t.p_view, at.first, at.n, block.p_buffer);
  block.g = load(const_cast<GRAD*>(t.g), t.g_view, at.first, at.n, block.g_buffer);
#if KAHAN
#pragma omp simd
  for (int i = 0; i < at.n; ++i) block.p[i] += to_float(t.loss[at.first + i]);
#endif
  for (int j = 0; j < STATES; ++j) {
#if QUANTIZED
    const uint8_t* codes = static_cast<const uint8_t*>(t.state[j]) + at.first;
    const float scale = t.absmax[j][scale_index(at)];
    decode(codes, scale, bucket.maps[j], at.n, block.state_buffers[j]);
    block.states[j] = block.state_buffers[j];
#else
    block.states[j] = static_cast<float*>(t.state[j]) + at.first;
#endif
  }
}

OPT_FN void store_states(const Bucket& bucket, const Tensor& t, const Place& at,
                         const float* new_scales, float** states) {
#if QUANTIZED
  for (int j = 0; j < STATES; ++j) {
    const QuantizationMap& map = bucket.maps[j];
    uint8_t* codes = static_cast<uint8_t*>(t.state[j]) + at.first;
#if TENSOR_WISE
    const float scale = new_scales[j];
#else
    const float scale = t.absmax[j][at.block] = scale_of(states[j], kSigned[j], map, at.n);
#endif
    encode(states[j], scale, kSigned[j], map, at.n, codes);
  }
#endif
}

// The rule on all elements of a block: new states and, if `step` is not null, new parameters.
OPT_FN void apply_rule(const Scalars& scalars, int n, float factor, const float* step,
                       Block& block) {
  float* p = block.p;
  const float* g = block.g;
  float* states[STATES];
  for (int j = 0; j < STATES; ++j) states[j] = block.states[j];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const bool stay = stays(g[i]);
    const float u = update_rule<true>(p[i], rule_gradient(g[i], factor), stay, states, i, scalars);
    if (step) p[i] = stay ? p[i] : moved(p[i], u, *step, scalars);
  }
}

OPT_FN void update_block(const Bucket& bucket, const Tensor& t, const Place& at,
                         const Scalars& scalars, float ratio, float factor,
                         const float* new_scales) {
  Block block;
  load_block(bucket, t, at, block);
  const float step = -scalars.step_size * ratio;
  apply_rule(scalars, at.n, factor, &step, block);
  store_states(bucket, t, at, new_scales, block.states);
  write_back(t, at.first, at.n, block.p, STOCHASTIC ? random_key(t.number, scalars) : 0);
}

// Running sums of squares of a chunk. Each lane sums every kLanes-th element of a block, and the
// lanes are added up in order at the end: the same bits for every instruction set.
constexpr int kLanes = 16;
struct SquareSums {
  double lanes[2][kLanes];
};

// Calls add(i, lane) for all elements of a block.
template <class Add>
OPT_FN void for_each_lane(int n, Add add) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) add(i, lane);
}

OPT_FN void block_statistics(const Bucket& bucket, const Tensor& t, const Place& at,
                             const Scalars& scalars, float factor, SquareSums& sums,
                             float* scales) {
  Block block;
  load_block(bucket, t, at, block);
#if TRUST_RATIO
  for_each_lane(at.n, [&](int i, int lane) __attribute__((always_inline)) {
    const float g = block.g[i], p = block.p[i];
    const bool stay = stays(g);
    const double u =
        update_rule<false>(p, rule_gradient(g, factor), stay, block.states, i, scalars);
    sums.lanes[0][lane] += double(p) * double(p);
    sums.lanes[1][lane] += stay ? 0.0 : u * u;
  });
#endif
#if TENSOR_WISE
  apply_rule(scalars, at.n, factor, nullptr, block);
  for (int j = 0; j < STATES; ++j)
    scales[j] = rule::max(scales[j], scale_of(block.states[j], kSigned[j], bucket.maps[j], at.n));
#endif
}

OPT_FN void block_norm(const Tensor& t, const Place& at, SquareSums& sums) {
  float g_buffer[BLOCK];
  const float* g = load(const_cast<GRAD*>(t.g), t.g_view, at.first, at.n, g_buffer);
  for_each_lane(at.n, [&](int i, int lane) __attribute__((always_inline)) {
    sums.lanes[0][lane] += double(g[i]) * double(g[i]);
  });
}

// ---- passes ----------------------------------------------------------------------------------

// Runs body(chunk index, chunk, tensor) on all chunks, over the bucket's threads.
template <class Body>
OPT_FN void for_each_chunk(const Bucket& bucket, Body body) {
  const int threads = int(bucket.threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t c = 0; c < bucket.chunk_count; ++c) {
    const Chunk& chunk = bucket.chunks[c];
    body(c, chunk, bucket.tensors[chunk.tensor]);
  }
}

// Runs body(place) on the blocks of a chunk; full blocks get a constant length.
template <class Body>
OPT_FN void for_each_block(const Tensor& t, const Chunk& chunk, Body body) {
  const int64_t per_row = (t.cols + BLOCK - 1) / BLOCK;
  for (int64_t block = chunk.first_block; block < chunk.end_block; ++block) {
    const int64_t row = block / per_row, col = block % per_row * BLOCK;
    const int64_t first = row * t.cols + col, left = t.cols - col;
    if (left >= BLOCK)
      body(Place{first, block, BLOCK});
    else
      body(Place{first, block, int(left)});
  }
}

OPT_FN void add_up(const SquareSums& sums, double* totals) {
  for (int k = 0; k < 2; ++k) {
    totals[k] = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) totals[k] += sums.lanes[k][lane];
  }
}

// A tensor's sum over its chunks, in order.
OPT_FN double sum_of(const Bucket& bucket, const Tensor& t, int k) {
  double sum = 0.0;
  for (int64_t c = t.first_chunk; c < t.first_chunk + t.chunks; ++c)
    sum += bucket.partial_sums[2 * c + k];
  return sum;
}

OPT_FN float factor_of(const Bucket& bucket, const Chunk& chunk) {
  return CLIPS ? bucket.factors[chunk.tensor] : 1.0f;
}

extern "C" {

// The size of the tables' rows, for the caller to check that both sides agree.
int64_t optfactory_tensor_fields() { return sizeof(Tensor) / 8; }
int64_t optfactory_bucket_fields() { return sizeof(Bucket) / 8; }
int64_t optfactory_scalar_fields() { return sizeof(Scalars) / sizeof(float); }

// Adds 1 to each tensor's step and reports the new values.
void optfactory_advance(float* const* steps, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = *steps[i] += 1.0f;
}

#if CLIPS
// Squared norms of the gradients, and from each tensor's history the factor of its gradient.
void optfactory_clip(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t) {
    SquareSums sums = {};
    for_each_block(
        t, chunk, [&](const Place& at) __attribute__((always_inline)) { block_norm(t, at, sums); });
    add_up(sums, bucket->partial_sums + 2 * c);
  });
  for (int64_t i = 0; i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
    const Scalars& scalars = bucket->scalars[t.scalars];
    bucket->factors[i] = 1.0f;
    if (!note_norm(t.history, float(sum_of(*bucket, t, 0)), scalars)) continue;
    float clip = bits_float(kInfinityBits);
    for (int j = 0; j < kHistory; ++j) {
      const float candidate = rank_candidate(t.history, j, scalars);
      clip = candidate < clip ? candidate : clip;
    }
    bucket->factors[i] = clip_factor(t.history, clip, scalars);
  }
}
#endif

#if NEEDS_STATISTICS
void optfactory_statistics(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t) {
    SquareSums sums = {};
    float scales[STATES] = {};
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      block_statistics(*bucket, t, at, bucket->scalars[t.scalars], factor_of(*bucket, chunk), sums,
                       scales);
    });
    add_up(sums, bucket->partial_sums + 2 * c);
#if TENSOR_WISE
    for (int j = 0; j < STATES; ++j) bucket->partial_scales[STATES * c + j] = scales[j];
#endif
  });
}

void optfactory_finalize(const Bucket* bucket) {
  for (int64_t i = 0; i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
#if TRUST_RATIO
    const float p_norm = float(std::sqrt(sum_of(*bucket, t, 0)));
    const float u_norm = float(std::sqrt(sum_of(*bucket, t, 1)));
    bucket->ratios[i] = trust_ratio(p_norm, u_norm, bucket->scalars[t.scalars]);
#endif
#if TENSOR_WISE
    for (int j = 0; j < STATES; ++j) {
      float scale = 0.0f;
      for (int64_t c = t.first_chunk; c < t.first_chunk + t.chunks; ++c)
        scale = rule::max(scale, bucket->partial_scales[STATES * c + j]);
      bucket->scales[STATES * i + j] = scale;
    }
#endif
  }
}
#endif

void optfactory_update(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t, const Chunk& chunk, const Tensor& t) {
#if TRUST_RATIO
    const float ratio = bucket->ratios[chunk.tensor];
#else
    const float ratio = 1.0f;
#endif
    const float* scales = TENSOR_WISE ? bucket->scales + STATES * chunk.tensor : nullptr;
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      update_block(*bucket, t, at, bucket->scalars[t.scalars], ratio, factor_of(*bucket, chunk),
                   scales);
    });
  });
#if TENSOR_WISE
  // Only now, because all of a tensor's blocks are decoded with the old scale.
  for (int64_t i = 0; i < bucket->tensor_count; ++i)
    for (int j = 0; j < STATES; ++j)
      bucket->tensors[i].absmax[j][0] = bucket->scales[STATES * i + j];
#endif
}

}  // extern "C"
