// What happens to one element around the rule, the same on CPUs and GPUs. optfactory.codegen
// defines the macros: MAXIMIZES, CLIPS, SKIPS_ZEROS, KEEPS_NONFINITE, RESETS_NONFINITE, STOCHASTIC,
// KAHAN, TENSOR_WISE, FLOORS, BITSANDBYTES; optfactory/options.py says what they mean.

#define SKIPS (SKIPS_ZEROS || KEEPS_NONFINITE || RESETS_NONFINITE)
#define NEEDS_STATISTICS (TRUST_RATIO || TENSOR_WISE)

// Whether an element with this gradient, as it came, stays out of the step.
OPT_FN bool stays(float g) {
  return (SKIPS_ZEROS && g == 0.0f) | ((KEEPS_NONFINITE || RESETS_NONFINITE) && !is_finite(g));
}

// The gradient that the rule gets.
OPT_FN float rule_gradient(float g, float factor) {
  const float clipped = CLIPS ? g * factor : g;
  return MAXIMIZES ? -clipped : clipped;
}

OPT_FN float rounded_to_param(float x) {
  PARAM stored;
  store(&stored, x);
  return to_float(stored);
}

// The parameter after a step; bitsandbytes rounds it once more before the decay.
OPT_FN float moved(float p, float u, float step, const Scalars& k) {
#if BITSANDBYTES
  return rounded_to_param(rule::fma(step, u, p)) * k.decay;
#else
  return rule::fma(step, u, p * k.decay);
#endif
}

// What `code_of` takes as the smallest magnitude of a map. A second moment that is not zero must
// not become zero, because its root divides the step: it takes at least the smallest value.
OPT_FN float smallest_magnitude(bool is_signed, const float* values) {
  return FLOORS && !is_signed ? values[1] : kSmallestKeyed;
}

// The code of x, y being x divided by the scale.
OPT_FN int32_t code_of(float x, float y, float scale, bool is_signed, float smallest,
                       const float* values, const int32_t* keys) {
  const int32_t code = nearest_code(y, is_signed, smallest, keys);
#if BITSANDBYTES
  if (is_signed) return fix_sign(scale > 0.0f ? code : 0, x, values[scale > 0.0f ? code : 0]);
#endif
  return is_signed || !FLOORS || x > 0.0f ? code : 0;
}

// ---- storing 16-bit parameters -----------------------------------------------------------------

OPT_FN uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Random bits that depend on seed, parameter, step and element alone.
OPT_FN uint32_t random_key(int64_t number, const Scalars& k) {
  return mix(mix(mix(uint32_t(k.seed)) ^ uint32_t(number)) ^ uint32_t(k.step));
}
OPT_FN uint32_t random_bits(uint32_t key, int64_t element) {
  return mix(mix(uint32_t(uint64_t(element) >> 32) ^ key) ^ uint32_t(element));
}

// Rounds up in magnitude with the probability of the part that is cut off.
OPT_FN void store_random(float* target, float value, uint32_t) { *target = value; }
OPT_FN void store_random(bfloat16* target, float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const uint32_t raised = (bits + (random & 0xffffu)) >> 16;
  store(target, value);
  target->bits = is_finite(value) ? uint16_t(raised) : target->bits;
}
OPT_FN void store_random(float16* target, float value, uint32_t random) {
  const uint32_t bits = float_bits(value), sign = (bits & kSignBit) >> 16;
  const uint32_t magnitude = bits & ~kSignBit;
  const uint32_t normal = (magnitude - (112u << 23) + (random & 0x1fffu)) >> 13;
  // Below 2^-14 in units of 2^-24; all numbers here are exact.
  const float units = bits_float(magnitude < (113u << 23) ? magnitude : 0u) * 0x1p24f;
  const uint32_t whole = uint32_t(units);
  const bool up = (units - float(whole)) * 0x1p16f >= 0x1p16f - float(random & 0xffffu);
  const uint32_t small = whole + (up ? 1u : 0u);
  const uint32_t chosen = magnitude < (113u << 23) ? small : normal;
  store(target, value);
  const bool finite = is_finite(value);
  target->bits = finite ? uint16_t(sign | (chosen < 0x7c00u ? chosen : 0x7c00u)) : target->bits;
}

OPT_FN void store_param(PARAM* target, float value, uint32_t key, int64_t element) {
#if STOCHASTIC
  store_random(target, value, random_bits(key, element));
#else
  store(target, value);
#endif
}

// What is lost when a value is stored as a parameter; added back before the next step (Kahan).
OPT_FN void store_loss(PARAM* target, float value) {
  const float stored = rounded_to_param(value);
  store(target, is_finite(stored) ? value - stored : 0.0f);
}

// ---- percentile clipping
// -------------------------------------------------------------------------

constexpr int kHistory = 100;

// Notes a squared norm; returns whether there is one to clip by. The first norm above 0 fills the
// whole history: zeros in it would stop the parameter for as many steps as they stay.
OPT_FN bool note_norm(float* history, float sum, const Scalars& k) {
  if (!is_finite(sum)) return false;
  int noted = 0;
  for (int i = 0; i < kHistory; ++i) noted += history[i] != 0.0f;
  for (int i = 0; noted == 0 && i < kHistory; ++i) history[i] = sum;
  history[int(k.step) % kHistory] = sum;
  return true;
}

// An entry of the history if more than `percentile` entries are not greater, else infinity: the
// least of these is the entry of that rank.
OPT_FN float rank_candidate(const float* history, int j, const Scalars& k) {
  int not_greater = 0;
  for (int i = 0; i < kHistory; ++i) not_greater += history[i] <= history[j];
  return not_greater > int(k.percentile) ? history[j] : bits_float(kInfinityBits);
}

OPT_FN float clip_factor(const float* history, float clip_sum, const Scalars& k) {
  const float norm = rule::sqrt(history[int(k.step) % kHistory]), clip = rule::sqrt(clip_sum);
  return norm > clip ? clip / norm : 1.0f;
}
