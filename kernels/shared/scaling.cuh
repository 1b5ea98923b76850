// Scales of 8-bit state, and division by them; the same on CPUs and GPUs.

constexpr uint8_t kZeroCode = 127;  // of 0 in signed maps; in unsigned ones it is 0

// Without a floor, smaller numbers of an unsigned state take the code of 0 where it is computed.
constexpr float kLeastUnsigned = 1.625e-7f;

// Whether codes of a state are computed, and not looked up; see optfactory/state/quantmap.py.
OPT_FN constexpr bool are_computed(bool is_signed) {
  return is_signed ? COMPUTES_SIGNED : COMPUTES_UNSIGNED;
}

// Whether a state's numbers are divided by their scale by way of its reciprocal.
OPT_FN constexpr bool multiplies_by_reciprocal(int j) {
  return kFormats[j] != kMap8 || are_computed(kSigned[j]);
}

// Division by one number many times. To compute codes the product with the reciprocal will do,
// which is at most 1.2e-7 (relative) off.
struct Divisor {
  float lift;  // a power of two that keeps all intermediate results normal
  float divisor;
  float reciprocal;
};

OPT_FN Divisor make_divisor(float divisor, bool computed) {
  const float least = computed ? 0x1p-120f : 0x1p-70f, most = computed ? 0x1p120f : 0x1p40f;
  const float lift = divisor < least ? 0x1p80f : divisor > most ? 0x1p-80f : 1.0f;
  return {lift, divisor * lift, 1.0f / (divisor * lift)};
}

// x / scale. For codes by tables it is correctly rounded (Markstein 1990): the residual of the
// first quotient is exact, and adding it once gives the quotient an IEEE division would give.
// Not lifting is for divisors whose lift is 1.
template <bool kLifts = true, class F>
OPT_FN F divide(F x, const Divisor& by, bool computed) {
  const F lifted = kLifts ? x * by.lift : x;
  const F reciprocal = Kind<F>::splat(by.reciprocal);
  if (computed) return lifted * reciprocal;
#if RULE_FMA_IS_EXACT
  const F divisor = Kind<F>::splat(by.divisor);
  const F quotient = lifted * reciprocal;
  return rule::fma(rule::fma(-quotient, divisor, lifted), reciprocal, quotient);
#else
  return lifted / by.divisor;
#endif
}

// The scale of a block whose largest and smallest values are given as magnitudes. The signed map
// reaches +1 but only `lowest` = -0.993: dividing by it keeps the extreme negative value exact.
OPT_FN float block_scale(float positive, float negative, float lowest) {
  const float scale = rule::max(positive, negative / lowest);
  return rule::min(scale, 3.4028234663852886e38f);
}

// The largest number of a format of both signs, with which a block's greatest magnitude is stored.
OPT_FN constexpr float largest_of(Format format) {
  return format == kE4m3   ? Minifloat<kE4m3>::kLargest
         : format == kE5m3 ? Minifloat<kE5m3>::kLargest
                           : Minifloat<kE2m1>::kLargest;
}
