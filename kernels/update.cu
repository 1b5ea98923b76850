// The CUDA kernels: one launch per bucket and pass, whatever the number of tensors.
//
// optfactory.codegen puts before this text: prelude.cuh, the macros PARAM, GRAD (dtypes), STATES
// (number of states), BLOCK (elements of a block), QUANTIZED, TRUST_RATIO, the struct Scalars,
// kSigned[STATES], and the rule texts as update_rule() and trust_ratio(); then cuda_codec.cuh.
//
// A grid of a few blocks of threads per multiprocessor walks over all chunks of the bucket. A
// thread updates kVector elements of one block of elements, and BLOCK / kVector neighbouring
// threads (a team) share the scale of its 8-bit state. Results depend neither on the grid nor on
// its order: elements are independent, and norms are summed per chunk and then over chunks in a
// fixed order.

// ---- tables shared with optfactory/backends/cuda_tables.py: every field is 8 bytes ------------

struct Tensor {
  int64_t rows;  // blocks run inside rows
  int64_t cols;
  int64_t first_chunk;  // its chunks are first_chunk .. first_chunk + chunks - 1
  int64_t chunks;
};

struct StatePointers {  // a tensor's state, or the part of it that is in device memory now
  Stored* state[STATES];
  float* absmax[STATES];
};

struct Chunk {
  uint32_t tensor;
  uint32_t states;  // index of its StatePointers
  uint32_t first_block;
  uint32_t blocks;
};

struct Bucket {
  const Tensor* tensors;
  const StatePointers* states;
  const Chunk* chunks;
  int64_t begin_chunk;  // this launch's part of the chunks
  int64_t end_chunk;
  // Columns with one entry per tensor: what may change from step to step.
  PARAM* const* p;
  const GRAD* const* g;
  const int64_t* const* p_view;  // null if row-major contiguous, else [ndim, sizes..., strides...]
  const int64_t* const* g_view;
  const int64_t* scalar_row;
  const Scalars* scalars;
  double* partial_sums;  // [chunks][2]: sums of p^2 and u^2
  float* ratios;         // [tensors]
  int64_t tensor_count;
  const float* grad_scale;  // null, or the factor to divide gradients by
  const float* found_inf;   // null, or not 0 if this step must not change anything
  MapPointers maps;
};

// ---- one chunk ----------------------------------------------------------------------------------

// What a thread keeps of its chunk's tensor; what only the slow ways need is read again there.
struct Work {
  PARAM* p;
  const GRAD* g;
  const Scalars* scalars;
  const StatePointers* states;
  int64_t numel;
  int64_t cols;
  uint32_t tensor;
  bool strided;
  bool ragged;  // there are several rows, and each ends with a short block
};

OPT_FN Work open_chunk(const Bucket& bucket, const Chunk& chunk) {
  const Tensor& tensor = bucket.tensors[chunk.tensor];
  Work work;
  work.p = bucket.p[chunk.tensor];
  work.g = bucket.g[chunk.tensor];
  work.scalars = bucket.scalars + bucket.scalar_row[chunk.tensor];
  work.states = bucket.states + chunk.states;
  work.numel = tensor.rows * tensor.cols;
  work.cols = tensor.cols;
  work.tensor = chunk.tensor;
  work.strided = bucket.p_view[chunk.tensor] || bucket.g_view[chunk.tensor];
  work.ragged = tensor.rows > 1;
  return work;
}

OPT_FN Place place_of(const Work& work, uint32_t block, bool exists) {
  Place at;
  at.lane = int(threadIdx.x) % kTeam;
  at.block = block;
  at.first = int64_t(block) * BLOCK;
  int64_t left = work.numel - at.first;
  if (work.ragged) {
    const uint32_t per_row = uint32_t((work.cols + BLOCK - 1) / BLOCK);
    const uint32_t row = block / per_row;
    const int64_t col = int64_t(block - row * per_row) * BLOCK;
    at.first = row * work.cols + col;
    left = work.cols - col;
  }
  at.n = !exists ? 0 : left < BLOCK ? int(left) : BLOCK;
  at.vectorized = !work.strided & is_aligned(work.p + at.first) & is_aligned(work.g + at.first);
#pragma unroll
  for (int j = 0; j < STATES; ++j)
    at.vectorized = at.vectorized & is_aligned(work.states->state[j] + at.first);
  return at;
}

// Runs body(work, place) for every block of elements of a chunk; teams without a block take part
// with a place of no elements, since all threads meet where scales are reduced.
template <class Body>
OPT_FN void for_each_block(const Bucket& bucket, const Chunk& chunk, Body body) {
  const Work work = open_chunk(bucket, chunk);
  const uint32_t end = chunk.first_block + chunk.blocks;
  for (uint32_t first = chunk.first_block; first < end; first += kTeams) {
    const uint32_t block = first + threadIdx.x / kTeam;
    body(work, place_of(work, block, block < end));
  }
}

// A thread's elements as they are in memory.
struct Elements {
  Pack<PARAM> p;
  Pack<GRAD> g;
  Pack<Stored> states[STATES];
  float scales[STATES];  // of 8-bit states, by which they are decoded
};

// All reads come before the first use, so that they wait for memory together. Elements that the
// block does not have are zero: they then add nothing to norms and scales.
OPT_FN void read(const Bucket& bucket, const Work& work, const Place& at, Elements& e) {
  if (is_full(at)) {
    e.p = read_pack(work.p, at);
    e.g = read_pack(work.g, at);
#pragma unroll
    for (int j = 0; j < STATES; ++j) e.states[j] = read_pack(work.states->state[j], at);
  } else {
    const int64_t* p_view = bucket.p_view[work.tensor];
    const int64_t* g_view = bucket.g_view[work.tensor];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool exists = position(at, i) < at.n;
      const int64_t element = at.first + position(at, i);
      set(e.p, i, exists ? work.p[offset_of(p_view, element)] : PARAM{});
      set(e.g, i, exists ? work.g[offset_of(g_view, element)] : GRAD{});
#pragma unroll
      for (int j = 0; j < STATES; ++j)
        set(e.states[j], i, exists ? work.states->state[j][element] : zero_of(kSigned[j]));
    }
  }
#if QUANTIZED
#pragma unroll
  for (int j = 0; j < STATES; ++j) e.scales[j] = at.n > 0 ? work.states->absmax[j][at.block] : 0.0f;
#endif
}

OPT_FN void write(const Bucket& bucket, const Work& work, const Place& at, const Elements& e) {
  if (is_full(at)) {
    write_pack(work.p, at, e.p);
#pragma unroll
    for (int j = 0; j < STATES; ++j) write_pack(work.states->state[j], at, e.states[j]);
  } else {
    const int64_t* p_view = bucket.p_view[work.tensor];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (position(at, i) >= at.n) continue;
      const int64_t element = at.first + position(at, i);
      work.p[offset_of(p_view, element)] = get(e.p, i);
#pragma unroll
      for (int j = 0; j < STATES; ++j) work.states->state[j][element] = get(e.states[j], i);
    }
  }
#if QUANTIZED
  if (at.lane == 0 && at.n > 0) {
#pragma unroll
    for (int j = 0; j < STATES; ++j) work.states->absmax[j][at.block] = e.scales[j];
  }
#endif
}

// A thread's elements as the rule sees them.
struct Values {
  float p[kVector];
  float g[kVector];
  float states[STATES][kVector];
};

OPT_FN void decode(const Shared& shared, const Bucket& bucket, const Elements& e, Values& x) {
  unpack(e.p, x.p);
  unpack(e.g, x.g);
  if (bucket.grad_scale) {
    const float factor = 1.0f / *bucket.grad_scale;
#pragma unroll
    for (int i = 0; i < kVector; ++i) x.g[i] *= factor;
  }
#pragma unroll
  for (int j = 0; j < STATES; ++j)
    decode_state(shared, kSigned[j], e.states[j], e.scales[j], x.states[j]);
}

// All threads of the block must call it; `turn` counts the calls.
OPT_FN void encode(Shared& shared, const Place& at, int turn, Values& x, Elements& e) {
  pack_floats(x.p, e.p);
#if QUANTIZED
  uint32_t scales[STATES];
#pragma unroll
  for (int j = 0; j < STATES; ++j) {
    if (!is_full(at)) {  // what the rule made of missing elements must not enter the scale
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        x.states[j][i] = position(at, i) < at.n ? x.states[j][i] : 0.0f;
    }
    scales[j] = own_scale(shared, kSigned[j], x.states[j]);
  }
  max_over_team(shared, turn, scales);
#pragma unroll
  for (int j = 0; j < STATES; ++j) e.scales[j] = bits_float(scales[j]);
#endif
#pragma unroll
  for (int j = 0; j < STATES; ++j)
    encode_state(shared, kSigned[j], x.states[j], e.scales[j], e.states[j]);
}

OPT_FN bool is_skipped(const Bucket& bucket) {
  return bucket.found_inf && *bucket.found_inf != 0.0f;
}

// ---- passes -------------------------------------------------------------------------------------

extern "C" {

#if TRUST_RATIO
__global__ void __launch_bounds__(THREADS, 2) optfactory_statistics(const Bucket bucket) {
  OPT_SHARED(Shared, shared);
  OPT_SHARED(SumBuffer, sums);
  load_maps(shared, bucket.maps);
  for (int64_t c = bucket.begin_chunk + blockIdx.x; c < bucket.end_chunk; c += gridDim.x) {
    double p_sum = 0.0, u_sum = 0.0;
    for_each_block(bucket, bucket.chunks[c], [&](const Work& work, const Place& at) {
      Elements elements;
      Values x;
      float* states[STATES];
      read(bucket, work, at, elements);
      decode(shared, bucket, elements, x);
#pragma unroll
      for (int j = 0; j < STATES; ++j) states[j] = x.states[j];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (position(at, i) >= at.n) continue;
        const double u = update_rule<false>(x.p[i], x.g[i], states, i, *work.scalars);
        p_sum += double(x.p[i]) * double(x.p[i]);
        u_sum += u * u;
      }
    });
    sum_over_threads(sums, &p_sum, &u_sum);
    if (threadIdx.x == 0) {
      bucket.partial_sums[2 * c] = p_sum;
      bucket.partial_sums[2 * c + 1] = u_sum;
    }
  }
}

__global__ void __launch_bounds__(THREADS, 2) optfactory_finalize(const Bucket bucket) {
  OPT_SHARED(SumBuffer, sums);
  for (int64_t t = blockIdx.x; t < bucket.tensor_count; t += gridDim.x) {
    const Tensor& tensor = bucket.tensors[t];
    double p_sum = 0.0, u_sum = 0.0;
    for (int64_t c = threadIdx.x; c < tensor.chunks; c += THREADS) {
      p_sum += bucket.partial_sums[2 * (tensor.first_chunk + c)];
      u_sum += bucket.partial_sums[2 * (tensor.first_chunk + c) + 1];
    }
    sum_over_threads(sums, &p_sum, &u_sum);
    if (threadIdx.x == 0) {
      const Scalars& scalars = bucket.scalars[bucket.scalar_row[t]];
      bucket.ratios[t] = trust_ratio(float(::sqrt(p_sum)), float(::sqrt(u_sum)), scalars);
    }
  }
}
#endif

__global__ void __launch_bounds__(THREADS, 2) optfactory_update(const Bucket bucket) {
  OPT_SHARED(Shared, shared);
  if (is_skipped(bucket)) return;
  load_maps(shared, bucket.maps);
  int turn = 0;
  for (int64_t c = bucket.begin_chunk + blockIdx.x; c < bucket.end_chunk; c += gridDim.x) {
    const Chunk chunk = bucket.chunks[c];
#if TRUST_RATIO
    const float ratio = bucket.ratios[chunk.tensor];
#else
    const float ratio = 1.0f;
#endif
    for_each_block(bucket, chunk, [&](const Work& work, const Place& at) {
      Elements elements;
      Values x;
      float* states[STATES];
      read(bucket, work, at, elements);
      decode(shared, bucket, elements, x);
      const float step = -work.scalars->step_size * ratio;
#pragma unroll
      for (int j = 0; j < STATES; ++j) states[j] = x.states[j];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float u = update_rule<true>(x.p[i], x.g[i], states, i, *work.scalars);
        x.p[i] = rule::fma(step, u, x.p[i] * work.scalars->decay);
      }
      encode(shared, at, turn++, x, elements);
      write(bucket, work, at, elements);
    });
  }
}

}  // extern "C"
