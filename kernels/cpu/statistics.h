// What passes over a chunk of blocks find out before anything is written.

// Running sums of squares of a chunk. Each lane sums every kLanes-th element of a block, and the
// lanes are added up in order at the end: the same bits for every instruction set.
constexpr int kLanes = 16;
struct Squares {
  Doubles lanes[kLanes / kDoubles] = {};

  // Adds those of kStride numbers.
  OPT_MEMBER void add(const float* x) {
#pragma GCC unroll 16
    for (int i = 0; i < kStride; i += kDoubles) {
      Doubles& sum = lanes[i % kLanes / kDoubles];
      sum = plus_square(sum, load<HalfFloats>(x + i));
    }
  }

  OPT_MEMBER double sum() const {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane / kDoubles][lane % kDoubles];
    return total;
  }
};

// How many numbers of a chunk are neither 0 nor NaN.
struct Count {
  Ints lanes = {};

  // Adds those of kStride numbers.
  OPT_MEMBER void add(const float* x) {
#pragma GCC unroll 16
    for (int i = 0; i < kStride; i += kWidth) {
      const Floats own = load<Floats>(x + i);
      lanes -= (own > 0.0f) | (own < 0.0f);  // a lane that is true is -1
    }
  }

  OPT_MEMBER double sum() const {
    int64_t total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += lanes[lane];
    return double(total);
  }
};

// Statistics of a chunk: sums over parameters and directions, or gradients, how many elements of
// directions agree with their gradients, the greatest of the new states.
struct Statistics {
  Squares p, x;
  Count agreeing;
  float scales[STATES] = {};

  OPT_MEMBER void write_sums(double* sums) const {
    if (TRUST_RATIO) sums[0] = p.sum(), sums[1] = x.sum();
    if (CAUTIOUS) sums[kSquares] = agreeing.sum();
  }
};

OPT_FN void block_statistics(const Tensor& t, const Place& at, const Step& step,
                             Statistics& statistics, Workspace& work) {
  float scales[STATES];
  Extremes extremes[STATES];
  const Operands o = operands(t, at, work.buffers);
  read_scales(t, at, scales);
  for (int i = 0; i < at.n; i += kStride) {
    Strides states;
    alignas(64) float u[kStride];
    read_states(step, o, scales, i, states);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int first = i + v * kWidth;
      Floats x[STATES];
#pragma GCC unroll 4
      for (int j = 0; j < STATES; ++j) x[j] = states.x[j][v];
      const Floats own_u = apply_rule<SCALES_FIRST, false>(o, first, step.numbers, x);
      store(u + v * kWidth, without_padding(own_u, first, at.n));
#if SCALES_FIRST
#pragma GCC unroll 4
      for (int j = 0; j < STATES; ++j) {
        x[j] = without_padding(x[j], first, at.n);
        store(work.pending[0].x[j] + first, x[j]);
        extremes[j].add(x[j], kSigned[j]);
      }
#endif
    }
#if MEASURES_RULE
    statistics.p.add(o.p + i);
    statistics.x.add(u);
#endif
#if CAUTIOUS
    statistics.agreeing.add(u);
#endif
  }
#if SCALES_FIRST
  Magnitudes found[STATES];
  find_magnitudes(extremes, work.pending[0].x, at.n, found);
  for (int j = 0; j < STATES; ++j) {
    if (!is_scaled(kFormats[j])) continue;
    const float scale = scale_of(j, found[j], step.maps[j]);
    if (CUTS_BLOCKS) t.own_scales[STATES * at.part + j] = scale;
    statistics.scales[j] = rule::max(statistics.scales[j], scale);
  }
#endif
}

// Norms of parameters and of gradients as rules get them.
OPT_FN void block_norms(const Tensor& t, const Place& at, const Step& step, Statistics& statistics,
                        Workspace& work) {
  const Operands o = operands(t, at, work.buffers);
  for (int i = 0; i < at.n; i += kStride) {
    alignas(64) float g[kStride];
#pragma GCC unroll 16
    for (int v = 0; v < kStride; v += kWidth) {
      const Floats raw = load<Floats>(o.g + i + v);
      store(g + v, rule::where(stays(raw), Floats{}, rule_gradient(raw, step.numbers.factor)));
    }
    statistics.p.add(o.p + i);
    statistics.x.add(g);
  }
}

OPT_FN void block_norm(const Tensor& t, const Place& at, Squares& squares, float* g) {
  read_elements(t.g, t.g_view, at.first, at.n, g);
  for (int i = at.n; i < whole(at.n); ++i) g[i] = 0.0f;
  for (int i = 0; i < at.n; i += kStride) squares.add(g + i);
}
