// The CUDA kernels: one launch per bucket and pass, whatever the number of tensors.
//
// optfactory.rules.codegen puts before this text: prelude.cuh, formats.cuh, the macros PARAM, GRAD,
// STATES (number of states), SLOTS (at least one, as CUDA has no empty arrays), BLOCK (elements of
// a block), QUANTIZED, TRUST_RATIO, RATIO_OF_GRADIENT and those of element.cuh, the struct Scalars,
// kSigned[SLOTS] and kFormats[SLOTS], and the rule texts as update_rule() and trust_ratio(); then
// scaling.cuh, element.cuh, master.cuh, memory.cuh, maps.cuh, codec.cuh, tables.cuh, elements.cuh.
//
// A grid of a few blocks of threads per multiprocessor walks over all chunks of the bucket. A
// thread updates kVector elements of one block of elements, and BLOCK / kVector neighbouring
// threads (a team) share the scale of its 8-bit state. Results depend neither on the grid nor on
// its order: elements are independent, and norms are summed per chunk and then over chunks in a
// fixed order.

// A tensor's sum over its chunks in a fixed order, which the first thread gets.
OPT_FN double sum_of_chunks(const Bucket& bucket, const Tensor& tensor, SumBuffer& buffer, int k) {
  double sum = 0.0, none = 0.0;
  for (int64_t c = threadIdx.x; c < tensor.chunks; c += THREADS)
    sum += bucket.partial_sums[kSums * (tensor.first_chunk + c) + k];
  sum_over_threads(buffer, &sum, &none);
  return sum;
}

OPT_FN bool is_skipped(const Bucket& bucket) {
  return bucket.found_inf && *bucket.found_inf != 0.0f;
}

// ---- passes -------------------------------------------------------------------------------------

// The rule on element i of a thread: new states, and the direction u or what is measured.
template <bool kStore, bool kMeasures>
OPT_FN float apply_rule(const Work& work, Values& x, int i, bool stay) {
  float states[SLOTS];
#pragma unroll
  for (int j = 0; j < STATES; ++j) states[j] = x.states[j][i];
  const float g = rule_gradient(x.g[i], work.factor);
  const float u =
      update_rule<kStore, kMeasures>(x.p[i], g, stay, states, work.ratio, *work.scalars);
  const bool keep = !QUANTIZED || are_finite(states);
#pragma unroll
  for (int j = 0; kStore && j < STATES; ++j) x.states[j][i] = keep ? states[j] : 0.0f;
  return cautious(u, g);
}

// Writes the sums of a chunk: of two squares, and of elements that agree with their gradients.
OPT_FN void write_sums(const Bucket& bucket, int64_t chunk, SumBuffer& buffer, double p, double x,
                       double agreeing) {
  double* const sums = bucket.partial_sums + kSums * chunk;
  double none = 0.0;
  if (TRUST_RATIO) sum_over_threads(buffer, &p, &x);
  if (CAUTIOUS) sum_over_threads(buffer, &agreeing, &none);
  if (threadIdx.x != 0) return;
  if (TRUST_RATIO) sums[0] = p, sums[1] = x;
  if (CAUTIOUS) sums[kSquares] = agreeing;
}

extern "C" {

#if CLIPS
__global__ void __launch_bounds__(THREADS, 2) optfactory_square_gradients(const Bucket bucket) {
  OPT_SHARED(SumBuffer, sums);
  for (int64_t c = bucket.begin_chunk + blockIdx.x; c < bucket.end_chunk; c += gridDim.x) {
    double g_sum = 0.0, none = 0.0;
    for_each_block(bucket, bucket.chunks[c], [&](const Work& work, const Place& at) {
      float g[kVector];
      read_gradient(bucket, work, at, g);
#pragma unroll
      for (int i = 0; i < kVector; ++i) g_sum += double(g[i]) * double(g[i]);
    });
    sum_over_threads(sums, &g_sum, &none);
    if (threadIdx.x == 0) bucket.partial_sums[kSums * c] = g_sum;
  }
}

__global__ void __launch_bounds__(THREADS, 2) optfactory_sum_gradients(const Bucket bucket) {
  OPT_SHARED(SumBuffer, sums);
  for (int64_t t = blockIdx.x; t < bucket.tensor_count; t += gridDim.x) {
    const double sum = sum_of_chunks(bucket, bucket.tensors[t], sums, 0);
    if (threadIdx.x == 0) bucket.sums[t] = sum;
  }
}

// From each tensor's history of norms the factor of its gradient.
__global__ void __launch_bounds__(THREADS, 2) optfactory_clip(const Bucket bucket) {
  if (is_skipped(bucket) || threadIdx.x >= kWarp) return;
  for (int64_t t = blockIdx.x; t < bucket.tensor_count; t += gridDim.x) {
    const Tensor& tensor = bucket.tensors[t];
    const Scalars& scalars = bucket.scalars[bucket.scalar_row[t]];
    const float sum = float(bucket.sums[t]);
    const int noted = threadIdx.x == 0 && note_norm(tensor.history, sum, scalars);
    __syncwarp();  // the other lanes read what the first one notes
    const bool clips = __any_sync(kAllLanes, noted);
    uint32_t least = kInfinityBits;  // patterns of numbers that are not negative are ordered
    for (int j = threadIdx.x; clips && j < kHistory; j += kWarp) {
      const uint32_t candidate = float_bits(rank_candidate(tensor.history, j, scalars));
      least = least < candidate ? least : candidate;
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, least, lanes);
      least = least < other ? least : other;
    }
    if (threadIdx.x == 0)
      bucket.factors[t] = clips ? clip_factor(tensor.history, bits_float(least), scalars) : 1.0f;
  }
}
#endif

#if RATIO_OF_GRADIENT
// Norms of parameters and of gradients as rules get them.
__global__ void __launch_bounds__(THREADS, 2) optfactory_norms(const Bucket bucket) {
  OPT_SHARED(SumBuffer, sums);
  for (int64_t c = bucket.begin_chunk + blockIdx.x; c < bucket.end_chunk; c += gridDim.x) {
    double p_sum = 0.0, g_sum = 0.0;
    for_each_block(bucket, bucket.chunks[c], [&](const Work& work, const Place& at) {
      Elements elements;
      Values x;
      read<false>(bucket, work, at, elements);
      decode_operands(bucket, elements, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double g = stays(x.g[i]) ? 0.0f : rule_gradient(x.g[i], work.factor);
        p_sum += double(x.p[i]) * double(x.p[i]);
        g_sum += g * g;
      }
    });
    write_sums(bucket, c, sums, p_sum, g_sum, 0.0);
  }
}
#endif

#if NEEDS_STATISTICS
__global__ void __launch_bounds__(THREADS, 2) optfactory_statistics(const Bucket bucket) {
  OPT_SHARED(Shared, shared);
  OPT_SHARED(SumBuffer, sums);
  load_maps(shared, bucket.maps);
  int turn = 0;
  for (int64_t c = bucket.begin_chunk + blockIdx.x; c < bucket.end_chunk; c += gridDim.x) {
    double p_sum = 0.0, u_sum = 0.0, agreeing = 0.0;
    uint32_t scales[SLOTS] = {};
    for_each_block(bucket, bucket.chunks[c], [&](const Work& work, const Place& at) {
      Elements elements;
      Values x;
      read<true>(bucket, work, at, elements);
      decode(shared, bucket, elements, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool exists = position(at, i) < at.n, counts = exists && !stays(x.g[i]);
        const double u = apply_rule<SCALES_FIRST, true>(work, x, i, stays(x.g[i]));
        p_sum += exists ? double(x.p[i]) * double(x.p[i]) : 0.0;
        u_sum += counts ? u * u : 0.0;
        agreeing += counts && (u > 0.0 || u < 0.0) ? 1.0 : 0.0;
      }
#if TENSOR_WISE
#pragma unroll
      for (int j = 0; j < STATES; ++j) {
        const uint32_t own = scale_of(shared, at, j, x.states[j]);
        scales[j] = scales[j] > own ? scales[j] : own;
      }
#endif
#if CUTS_BLOCKS
      uint32_t own[SLOTS];
#pragma unroll
      for (int j = 0; j < STATES; ++j) own[j] = scale_of(shared, at, j, x.states[j]);
      max_over_team(shared, turn++, own);
      for (int j = 0; at.lane == 0 && at.n > 0 && j < STATES; ++j)
        work.own_scales[int64_t(STATES) * at.part + j] = bits_float(own[j]);
#endif
    });
#if TENSOR_WISE
    max_over_threads(shared, turn++, scales);
    if (threadIdx.x == 0)
      for (int j = 0; j < STATES; ++j) bucket.partial_scales[STATES * c + j] = scales[j];
#endif
    if (!RATIO_OF_GRADIENT) write_sums(bucket, c, sums, p_sum, u_sum, agreeing);
  }
}
#endif

#if HAS_RATIO || TENSOR_WISE
// From the statistics of chunks those of tensors.
__global__ void __launch_bounds__(THREADS, 2) optfactory_gather(const Bucket bucket) {
  OPT_SHARED(Shared, shared);
  OPT_SHARED(SumBuffer, sums);
  int turn = 0;
  for (int64_t t = blockIdx.x; t < bucket.tensor_count; t += gridDim.x) {
    const Tensor& tensor = bucket.tensors[t];
    for (int k = 0; HAS_RATIO && k < kSums; ++k) {
      const double sum = sum_of_chunks(bucket, tensor, sums, k);
      if (threadIdx.x == 0) bucket.sums[kSums * t + k] = sum;
    }
#if TENSOR_WISE
    uint32_t scales[SLOTS] = {};
    for (int64_t c = threadIdx.x; c < tensor.chunks; c += THREADS) {
      for (int j = 0; j < STATES; ++j) {
        const uint32_t other = bucket.partial_scales[STATES * (tensor.first_chunk + c) + j];
        scales[j] = scales[j] > other ? scales[j] : other;
      }
    }
    max_over_threads(shared, turn++, scales);
    if (threadIdx.x == 0)
      for (int j = 0; j < STATES; ++j) bucket.scales[STATES * t + j] = bits_float(scales[j]);
#endif
  }
}
#endif

#if HAS_RATIO
__global__ void __launch_bounds__(THREADS, 2) optfactory_finalize(const Bucket bucket) {
  for (int64_t t = int64_t(blockIdx.x) * THREADS + threadIdx.x; t < bucket.tensor_count;
       t += int64_t(gridDim.x) * THREADS) {
    const Scalars& scalars = bucket.scalars[bucket.scalar_row[t]];
    bucket.ratios[t] = tensor_ratio(bucket.sums + kSums * t, bucket.tensors[t].elements, scalars);
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
    for_each_block(bucket, chunk, [&](const Work& work, const Place& at) {
      Elements elements;
      Values x;
      read<true>(bucket, work, at, elements);
      decode(shared, bucket, elements, x);
      const float step = -work.scalars->step_size * (RATIO_OF_GRADIENT ? 1.0f : work.ratio);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool stay = stays(x.g[i]);
        const float u = apply_rule<true, false>(work, x, i, stay);
        x.p[i] = stay ? x.p[i] : moved(x.p[i], u, step, *work.scalars);
      }
      encode_params(work, at, x.p, elements);
      encode_states(shared, work, at, turn++, x, elements);
      write(bucket, work, at, elements);
    });
  }
}

#if SCALES_FIRST
// Stores the new scales; only now, because all of a block, wherever its parts are, is decoded with
// the old one.
__global__ void __launch_bounds__(THREADS, 2) optfactory_commit(const Bucket bucket) {
  if (is_skipped(bucket)) return;
  for (int64_t t = blockIdx.x; t < bucket.tensor_count; t += gridDim.x) {
    const Tensor& tensor = bucket.tensors[t];
    const int64_t count = CUTS_BLOCKS ? tensor.scales : 1;
    const float* scales = CUTS_BLOCKS ? tensor.new_scales : bucket.scales + STATES * t;
    for (int64_t i = threadIdx.x; i < count * STATES; i += THREADS)
      if (float* const own = bucket.states[t].absmax[i / count]) own[i % count] = scales[i];
  }
}
#endif

}  // extern "C"
