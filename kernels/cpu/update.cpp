// The CPU kernel: one call per bucket and pass, work split into chunks of blocks over threads.
//
// optfactory.rules.codegen puts before this text: prelude.cuh, the macros PARAM, GRAD (dtypes),
// STATES (number of states), BLOCK (elements of a block), QUANTIZED (whether states share scales),
// TRUST_RATIO, RATIO_OF_GRADIENT and those of element.cuh, the struct Scalars, kSigned[SLOTS] and
// kFormats[SLOTS], the rule texts as update_rule() and trust_ratio(), and then element.cuh and the
// other files of this folder.
//
// Results do not depend on the number of threads: elements are independent, and norms are summed
// per chunk and then over chunks in a fixed order.

// ---- one block -------------------------------------------------------------------------------

#if QUANTIZED
// A first or a short block: rare enough to be compiled once, for any length.
OPT_NOINLINE void update_alone(const Step& step, const Operands& o, const float* scales, int n,
                               Pending& next, Pending& ready, Extremes* extremes) {
  flush(step, ready);
  update_strides<false>(step, o, scales, n, next, ready, extremes);
}

OPT_FN void update_block(const Tensor& t, const Place& at, const Step& step,
                         const float* new_scales, Workspace& work) {
  Pending& next = work.pending[work.turn];
  Pending& ready = work.pending[work.turn ^= 1];
  Extremes extremes[STATES];
  Magnitudes found[STATES];
  float scales[STATES];
  const Operands o = operands(t, at, work.buffers);
  read_scales(t, at, scales);
  if (at.n == BLOCK && ready.is_usual()) {
    update_strides<true>(step, o, scales, BLOCK, next, ready, extremes);
    ready.n = 0;
  } else {
    update_alone(step, o, scales, at.n, next, ready, extremes);
  }
  write_back(t, at, step.key, o, work.buffers);
  find_magnitudes(extremes, next.x, at.n, found);
  next.n = at.n;
  next.noise = Noise::of(step.key, at.element);
  for (int j = 0; j < STATES; ++j) {
    next.codes[j] = t.state[j] + bytes_of(j, at.first);
    if (!is_scaled(kFormats[j])) continue;
    const float scale = TENSOR_WISE   ? new_scales[j]
                        : CUTS_BLOCKS ? t.new_scales[t.scales * j + at.block]
                                      : scale_of(j, found[j], step.maps[j]);
    if (!SCALES_FIRST) t.absmax[j][at.block] = scale;
    next.codings[j] = Coding::of(scale, multiplies_by_reciprocal(j));
  }
}

OPT_FN void finish(const Step& step, Workspace& work) {
  for (Pending& pending : work.pending) flush(step, pending);
}
#else
OPT_FN void update_block(const Tensor& t, const Place& at, const Step& step, const float*,
                         Workspace& work) {
  const Operands o = operands(t, at, work.buffers);
  update_strides(o, at.n, step, Noise::of(step.key, at.element));
  write_back(t, at, step.key, o, work.buffers);
}

OPT_FN void finish(const Step&, Workspace&) {}
#endif

// ---- passes ----------------------------------------------------------------------------------

// Runs body(chunk index, chunk, tensor, workspace) on all chunks, over the bucket's threads. Each
// takes many neighbours at first, through which the hardware's prefetching runs ahead, and single
// ones at the end, so that none waits for another for long.
template <class Body>
OPT_FN void for_each_chunk(const Bucket& bucket, Body body) {
  const int threads = int(bucket.threads);
#pragma omp parallel for schedule(guided, 1) num_threads(threads) if (threads > 1)
  for (int64_t c = 0; c < bucket.chunk_count; ++c) {
    const Chunk& chunk = bucket.chunks[c];
    OPT_WORKSPACE(work);
    body(c, chunk, bucket.tensors[chunk.tensor], work);
  }
}

// Runs body(place) on the blocks of a chunk.
template <class Body>
OPT_FN void for_each_block(const Tensor& t, const Chunk& chunk, Body body) {
#if CUTS_BLOCKS
  for (int64_t i = chunk.first_block; i < chunk.end_block; ++i) {
    const Part& part = t.parts[i];
    body(Place{part.first, part.block, int(part.n), part.element, i});
  }
#else
  const int64_t per_row = (t.cols + BLOCK - 1) / BLOCK;
  int64_t row = chunk.first_block / per_row, col = chunk.first_block % per_row * BLOCK;
  for (int64_t block = chunk.first_block; block < chunk.end_block; ++block) {
    const int64_t first = row * t.cols + col, left = t.cols - col;
    const int64_t element = t.element + row * t.stride + col;
    body(Place{first, block, int(left < BLOCK ? left : BLOCK), element, 0});
    col += BLOCK;
    if (col >= t.cols) row += 1, col = 0;
  }
#endif
}

// A tensor's sum over its chunks, in order.
OPT_FN double sum_of(const Bucket& bucket, const Tensor& t, int k) {
  double sum = 0.0;
  for (int64_t c = t.first_chunk; c < t.first_chunk + t.chunks; ++c)
    sum += bucket.partial_sums[kSums * c + k];
  return sum;
}

#if HAS_RATIO || SCALES_FIRST
// From the statistics of chunks those of tensors.
OPT_FN void gather(const Bucket& bucket) {
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    const Tensor& t = bucket.tensors[i];
    for (int k = 0; HAS_RATIO && k < kSums; ++k) bucket.sums[kSums * i + k] = sum_of(bucket, t, k);
    for (int j = 0; TENSOR_WISE && j < STATES; ++j) {
      float scale = 0.0f;
      for (int64_t c = t.first_chunk; c < t.first_chunk + t.chunks; ++c)
        scale = rule::max(scale, bucket.partial_scales[STATES * c + j]);
      bucket.scales[STATES * i + j] = scale;
    }
  }
}
#endif

extern "C" {

// The size of the tables' rows, for the caller to check that both sides agree.
int64_t optfactory_tensor_fields() { return sizeof(Tensor) / 8; }
int64_t optfactory_bucket_fields() { return sizeof(Bucket) / 8; }
int64_t optfactory_scalar_fields() { return sizeof(Scalars) / sizeof(float); }

// Reports each tensor's step, and whether all are counts.
int64_t optfactory_read_steps(const double* const* steps, double* values, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = *steps[i];
    good = good && values[i] >= 0.0 && values[i] < 0x1p53;
  }
  return good;
}

// Reports the number of each tensor's coming step, and counts these steps.
void optfactory_next_steps(const double* const* steps, double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = *steps[i] + 1.0;
}
void optfactory_advance(double* const* steps, const double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) *steps[i] = values[i];
}

#if CLIPS
// Squared norms of the gradients.
void optfactory_square_gradients(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t, Workspace& work) {
    Squares squares;
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      block_norm(t, at, squares, work.buffers.g);
    });
    bucket->partial_sums[kSums * c] = squares.sum();
  });
  for (int64_t i = 0; i < bucket->tensor_count; ++i)
    bucket->sums[i] = sum_of(*bucket, bucket->tensors[i], 0);
}

// From each tensor's history of norms the factor of its gradient.
void optfactory_clip(const Bucket* bucket) {
  for (int64_t i = 0; i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
    const Scalars& scalars = bucket->scalars[t.scalars];
    bucket->factors[i] = 1.0f;
    if (!note_norm(t.history, float(bucket->sums[i]), scalars)) continue;
    float clip = bits_float(kInfinityBits);
    for (int j = 0; j < kHistory; ++j) {
      const float candidate = rank_candidate(t.history, j, scalars);
      clip = candidate < clip ? candidate : clip;
    }
    bucket->factors[i] = clip_factor(t.history, clip, scalars);
  }
}
#endif

#if RATIO_OF_GRADIENT
void optfactory_norms(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t, Workspace& work) {
    Statistics statistics;
    const Step step = make_step(*bucket, chunk);
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      block_norms(t, at, step, statistics, work);
    });
    statistics.write_sums(bucket->partial_sums + kSums * c);
  });
  gather(*bucket);
}
#endif

#if NEEDS_STATISTICS
void optfactory_statistics(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t c, const Chunk& chunk, const Tensor& t, Workspace& work) {
    Statistics statistics;
    const Step step = make_step(*bucket, chunk);
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      block_statistics(t, at, step, statistics, work);
    });
    statistics.write_sums(bucket->partial_sums + kSums * c);
    for (int j = 0; TENSOR_WISE && j < STATES; ++j)
      bucket->partial_scales[STATES * c + j] = statistics.scales[j];
  });
  gather(*bucket);
}

#endif

#if HAS_RATIO
void optfactory_finalize(const Bucket* bucket) {
  for (int64_t i = 0; i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
    const Scalars& scalars = bucket->scalars[t.scalars];
    bucket->ratios[i] = tensor_ratio(bucket->sums + kSums * i, t.elements, scalars);
  }
}
#endif

void optfactory_update(const Bucket* bucket) {
  for_each_chunk(*bucket, [&](int64_t, const Chunk& chunk, const Tensor& t, Workspace& work) {
    const float* new_scales = TENSOR_WISE ? bucket->scales + STATES * chunk.tensor : nullptr;
    const Step step = make_step(*bucket, chunk);
    for_each_block(t, chunk, [&](const Place& at) __attribute__((always_inline)) {
      update_block(t, at, step, new_scales, work);
    });
    finish(step, work);
  });
  // Only now, because all of a block, wherever its parts are, is decoded with the old scale.
  for (int64_t i = 0; SCALES_FIRST && i < bucket->tensor_count; ++i) {
    const Tensor& t = bucket->tensors[i];
    for (int j = 0; j < STATES; ++j) {
      if (!is_scaled(kFormats[j])) continue;
      const float* scales =
          CUTS_BLOCKS ? t.new_scales + t.scales * j : bucket->scales + STATES * i + j;
      for (int64_t k = 0; k < (CUTS_BLOCKS ? t.scales : 1); ++k) t.absmax[j][k] = scales[k];
    }
  }
}

}  // extern "C"
