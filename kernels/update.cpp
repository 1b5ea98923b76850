// The CPU kernel: one call per bucket and pass, work split into chunks of blocks over threads.
//
// optfactory.codegen puts before this text: prelude.cuh, cpu_codec.h, the macros PARAM, GRAD
// (dtypes), STATES (number of states), BLOCK (elements of a block), QUANTIZED, TRUST_RATIO, the
// struct Scalars, kSigned[STATES], and the rule texts as update_rule() and trust_ratio().
//
// Results do not depend on the number of threads: elements are independent, and norms are summed
// per chunk and then over chunks in a fixed order.

static_assert(BLOCK <= kMaxBlock, "the codec's buffer must hold a block");

#if QUANTIZED
using Stored = uint8_t;
#else
using Stored = float;
#endif

// ---- tables shared with optfactory/backends/cpu.py: every field is 8 bytes -------------------

struct Tensor {
  PARAM* p;
  const GRAD* g;
  const int64_t* p_view;  // null if row-major contiguous, else [ndim, sizes..., strides...]
  const int64_t* g_view;
  int64_t rows;  // blocks run inside rows
  int64_t cols;
  int64_t scalars;      // its row in Bucket::scalars
  int64_t first_chunk;  // its chunks are first_chunk .. first_chunk + chunks - 1
  int64_t chunks;
  void* state[STATES];  // float32, or uint8 codes
  float* absmax[STATES];
};

struct Chunk {
  int64_t tensor;
  int64_t first_block;
  int64_t end_block;
};

struct Bucket {
  const Tensor* tensors;
  const Chunk* chunks;
  const Scalars* scalars;
  double* partial_sums;  // [chunks][2]: sums of p^2 and u^2
  float* ratios;         // [tensors]
  int64_t tensor_count;
  int64_t chunk_count;
  int64_t threads;
  QuantizationMap maps[STATES];
};

// ---- reading and writing one block of at most BLOCK elements ---------------------------------

constexpr int kMaxDims = 64;  // as in torch

// Calls visit(i, offset in memory) for n elements of a strided tensor, in row-major order.
template <class Visit>
OPT_FN void for_each_strided(const int64_t* view, int64_t first, int n, Visit visit) {
  const int64_t ndim = view[0];
  const int64_t* sizes = view + 1;
  const int64_t* strides = sizes + ndim;
  int64_t index[kMaxDims], offset = 0, rest = first;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    offset += index[d] * strides[d];
    rest /= sizes[d];
  }
  for (int i = 0; i < n; ++i) {
    visit(i, offset);
    for (int64_t d = ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

// Block elements as float32: the memory itself where it already is that, else the filled buffer.
OPT_FN float* load(float* base, const int64_t* view, int64_t first, int n, float* buffer) {
  if (!view) return base + first;
  for_each_strided(view, first, n, [&](int i, int64_t offset) { buffer[i] = base[offset]; });
  return buffer;
}
template <class T>
OPT_FN float* load(T* base, const int64_t* view, int64_t first, int n, float* buffer) {
  if (view) {
    for_each_strided(view, first, n,
                     [&](int i, int64_t offset) { buffer[i] = to_float(base[offset]); });
    return buffer;
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) buffer[i] = to_float(base[first + i]);
  return buffer;
}

// Writes a block back unless it was changed in place.
template <class T>
OPT_FN void write_back(T* base, const int64_t* view, int64_t first, int n, const float* block) {
  if (view) {
    for_each_strided(view, first, n,
                     [&](int i, int64_t offset) { store(base + offset, block[i]); });
    return;
  }
  if (static_cast<const void*>(base + first) == block) return;
#pragma omp simd
  for (int i = 0; i < n; ++i) store(base + first + i, block[i]);
}

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

// Points states[j] at the block's state: the memory itself at 32 bits, decoded buffers at 8 bits.
OPT_FN void load_states(const Bucket& bucket, const Tensor& t, const Place& at,
                        float (*buffers)[BLOCK], float** states) {
  for (int j = 0; j < STATES; ++j) {
#if QUANTIZED
    const uint8_t* codes = static_cast<const uint8_t*>(t.state[j]) + at.first;
    decode(codes, t.absmax[j][at.block], bucket.maps[j], at.n, buffers[j]);
    states[j] = buffers[j];
#else
    states[j] = static_cast<float*>(t.state[j]) + at.first;
#endif
  }
}

OPT_FN void store_states(const Bucket& bucket, const Tensor& t, const Place& at, float** states) {
#if QUANTIZED
  for (int j = 0; j < STATES; ++j) {
    uint8_t* codes = static_cast<uint8_t*>(t.state[j]) + at.first;
    t.absmax[j][at.block] = encode(states[j], kSigned[j], bucket.maps[j], at.n, codes);
  }
#endif
}

OPT_FN void update_block(const Bucket& bucket, const Tensor& t, const Place& at,
                         const Scalars& scalars, float ratio) {
  float p_buffer[BLOCK], g_buffer[BLOCK], state_buffers[STATES][BLOCK];
  float* states[STATES];
  prefetch(t, at);
  float* p = load(t.p, t.p_view, at.first, at.n, p_buffer);
  const float* g = load(const_cast<GRAD*>(t.g), t.g_view, at.first, at.n, g_buffer);
  load_states(bucket, t, at, state_buffers, states);
  const float step = -scalars.step_size * ratio;
#pragma omp simd
  for (int i = 0; i < at.n; ++i) {
    const float u = update_rule<true>(p[i], g[i], states, i, scalars);
    p[i] = rule::fma(step, u, p[i] * scalars.decay);
  }
  store_states(bucket, t, at, states);
  write_back(t.p, t.p_view, at.first, at.n, p);
}

// Running sums of squares of a chunk. Each lane sums every kLanes-th element of a block, and the
// lanes are added up in order at the end: the same bits for every instruction set.
constexpr int kLanes = 16;
struct SquareSums {
  double p[kLanes];
  double u[kLanes];
};

OPT_FN void block_statistics(const Bucket& bucket, const Tensor& t, const Place& at,
                             const Scalars& scalars, SquareSums& sums) {
  float p_buffer[BLOCK], g_buffer[BLOCK], state_buffers[STATES][BLOCK];
  float* states[STATES];
  prefetch(t, at);
  const float* p = load(t.p, t.p_view, at.first, at.n, p_buffer);
  const float* g = load(const_cast<GRAD*>(t.g), t.g_view, at.first, at.n, g_buffer);
  load_states(bucket, t, at, state_buffers, states);
  const auto add = [&](int i, int lane) __attribute__((always_inline)) {
    const double u = update_rule<false>(p[i], g[i], states, i, scalars);
    sums.p[lane] += double(p[i]) * double(p[i]);
    sums.u[lane] += u * u;
  };
  int i = 0;
  for (; i + kLanes <= at.n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i < at.n; ++i, ++lane) add(i, lane);
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

extern "C" {

// The size of the tables' rows, for the caller to check that both sides agree.
int64_t optfactory_tensor_fields() { return sizeof(Tensor) / 8; }
int64_t optfactory_bucket_fields() { return sizeof(Bucket) / 8; }
int64_t optfactory_scalar_fields() { return sizeof(Scalars) / sizeof(float); }

// Adds 1 to each tensor's step and reports the new values.
void optfactory_advance(float* const* steps, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = *steps[i] += 1.0f;
}

#if TRUST_RATIO
void optfactory_statistics(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t) {
    SquareSums sums = {};
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      block_statistics(*bucket, t, at, bucket->scalars[t.scalars], sums);
    });
    double* total = bucket->partial_sums + 2 * c;
    total[0] = total[1] = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) {
      total[0] += sums.p[lane];
      total[1] += sums.u[lane];
    }
  });
}

void optfactory_finalize(const Bucket* bucket) {
  for (int64_t i = 0; i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
    double p_sum = 0.0, u_sum = 0.0;
    for (int64_t c = t.first_chunk; c < t.first_chunk + t.chunks; ++c) {
      p_sum += bucket->partial_sums[2 * c];
      u_sum += bucket->partial_sums[2 * c + 1];
    }
    const Scalars& scalars = bucket->scalars[t.scalars];
    bucket->ratios[i] = trust_ratio(float(std::sqrt(p_sum)), float(std::sqrt(u_sum)), scalars);
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
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      update_block(*bucket, t, at, bucket->scalars[t.scalars], ratio);
    });
  });
}

}  // extern "C"
