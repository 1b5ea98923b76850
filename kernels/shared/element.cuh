// What happens to one element around the rule, the same on CPUs and GPUs. optfactory.rules.codegen
// defines the macros: MAXIMIZES, CLIPS, SKIPS_ZEROS, KEEPS_NONFINITE, RESETS_NONFINITE, STOCHASTIC,
// KAHAN, SPLIT, MASTER, RANDOM_CODES, TENSOR_WISE, FLOORS, BITSANDBYTES, CUTS_BLOCKS, CAUTIOUS,
// CAUTIOUS_DECAY; optfactory/rules/options.py says what they mean.

#define SKIPS (SKIPS_ZEROS || KEEPS_NONFINITE || RESETS_NONFINITE)
// New scales are known before the update.
#define SCALES_FIRST (TENSOR_WISE || CUTS_BLOCKS)
// States are rounded at random: codes of dynamic maps if RANDOM_CODES, and all short floats.
#define DRAWS_FOR_STATES (RANDOM_CODES || ANY_SHORT_FLOAT)
// Random bits depend on the number of an element in the whole tensor.
#define NUMBERS_ELEMENTS (STOCHASTIC || DRAWS_FOR_STATES)
// The norm of what the rule makes is needed, and not of what it is given.
#define MEASURES_RULE (TRUST_RATIO && !RATIO_OF_GRADIENT)
#define NEEDS_STATISTICS (MEASURES_RULE || CAUTIOUS || SCALES_FIRST)
// Each tensor has a number by which its steps, or what its rule wants, are multiplied.
#define HAS_RATIO (TRUST_RATIO || CAUTIOUS)

// What passes sum up of a tensor: squares of two things, elements that agree with their gradients.
constexpr int kSquares = TRUST_RATIO ? 2 : 0;
constexpr int kSums = HAS_RATIO ? kSquares + CAUTIOUS : 1;

// Whether an element with this gradient, as it came, stays out of the step.
template <class F>
OPT_FN typename Kind<F>::Mask stays(F g) {
  typename Kind<F>::Mask stay = {};
#if SKIPS_ZEROS
  stay |= g == 0.0f;
#endif
#if KEEPS_NONFINITE || RESETS_NONFINITE
  stay |= is_finite(g) == typename Kind<F>::Mask{};
#endif
  return stay;
}

// The gradient that the rule gets.
template <class F>
OPT_FN F rule_gradient(F g, float factor) {
  const F clipped = CLIPS ? g * factor : g;
  return MAXIMIZES ? -clipped : clipped;
}

OPT_FN float rounded_to_param(float x) {
  PARAM stored;
  store(&stored, x);
  return to_float(stored);
}

// Whether all states of an element are finite. Elements of a block of 8-bit state share its scale,
// so one that is not must not destroy it: it starts afresh in all states.
template <class F>
OPT_FN typename Kind<F>::Mask are_finite(const F* states) {
  typename Kind<F>::Mask finite = is_finite(states[0]);
  for (int j = 1; j < STATES; ++j) finite &= is_finite(states[j]);
  return finite;
}

// Whether two numbers have the same sign. Their product could underflow.
template <class F>
OPT_FN typename Kind<F>::Mask same_signs(F a, F b) {
  return ((a > 0.0f) & (b > 0.0f)) | ((a < 0.0f) & (b < 0.0f));
}

// The direction without elements that disagree with the gradient (Liang et al. 2024,
// arXiv:2411.16085); by products, so that one that is not finite stays so.
template <class F>
OPT_FN F cautious(F u, F g) {
  using K = Kind<F>;
  return CAUTIOUS ? u * rule::where(same_signs(u, g), K::splat(1.0f), K::splat(0.0f)) : u;
}

#if HAS_RATIO
// A tensor's number, from its sums and how many elements it has in all processes. Cautious steps
// are as long as if all elements took part.
OPT_FN float tensor_ratio(const double* sums, int64_t elements, const Scalars& k) {
  const double share = CAUTIOUS ? double(elements) / (sums[kSquares] + 1.0) : 1.0;
#if TRUST_RATIO
  return float(share) * trust_ratio(float(::sqrt(sums[0])), float(share * ::sqrt(sums[1])), k);
#else
  return float(share);
#endif
}
#endif

// The parameter after a step; bitsandbytes rounds it once more before the decay. Cautious decay
// is only where the step shrinks the parameter too (Chen et al. 2025, arXiv:2510.12402, Alg. 1).
template <class F>
OPT_FN F moved(F p, F u, F step, const Scalars& k) {
#if BITSANDBYTES
  return Kind<F>::each(rule::fma(step, u, p), rounded_to_param) * k.decay;
#elif CAUTIOUS_DECAY
  return rule::fma(step, u, rule::where(same_signs(-u, p), p, p * k.decay));
#else
  return rule::fma(step, u, p * k.decay);
#endif
}

// ---- random bits -------------------------------------------------------------------------------

template <class Word>
OPT_FN Word mix(Word x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The step as a number, from its remainder by 2^24 and the quotient: as one float32 it would stand
// still there. Counts that no run reaches, which a state may hold all the same, are 0.
OPT_FN int step_number(const Scalars& k) {
  const bool low = k.step >= 0.0f && k.step < 0x1p24f;
  const bool high = k.step_high >= 0.0f && k.step_high < 0x1p6f;
  return low && high ? int(k.step) + (int(k.step_high) << 24) : 0;
}

// Random bits that depend on seed, parameter, step and element alone.
OPT_FN uint32_t random_key(int64_t number, const Scalars& k) {
  return mix(mix(mix(uint32_t(k.seed)) ^ uint32_t(number)) ^ uint32_t(step_number(k)));
}
OPT_FN uint32_t high_bits(uint32_t key, int64_t element) {
  return mix(uint32_t(uint64_t(element) >> 32) ^ key);
}
OPT_FN uint32_t random_bits(uint32_t key, int64_t element) {
  return mix(high_bits(key, element) ^ uint32_t(element));
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

// ---- 8-bit codes rounded at random --------------------------------------------------------------

// The random bits of states are others than those of the parameter.
OPT_FN uint32_t codes_key(uint32_t key) { return mix(key + 0x9e3779b9u); }

// What state j takes of an element's random bits: the leading ones, which decide nearly always,
// are others for each.
template <class Word>
OPT_FN Word words_of_state(Word word, int j) {
  const int by = 16 * (j & 1) + 8 * (j >> 1 & 1) + 4 * (j >> 2 & 1);
  return by == 0 ? word : word << by | word >> (32 - by);
}

// The upper half of these.
template <class Word>
OPT_FN Word half_words_of_state(Word word, int j) {
  return j == 1 ? word & 0xffffu : words_of_state(word, j) >> 16;
}

// As many of them as are cut off by rounding.
template <int kCut, class Word>
OPT_FN Word bits_of_state(Word word, int j) {
  return j == 1 ? word & ((1u << kCut) - 1) : words_of_state(word, j) >> (32 - kCut);
}

// See optfactory/state/positions.py.
constexpr float kThird = 0x1.555556p-2f;
constexpr float kFirstSigned = 0x1.bbe45ep19f, kFirstUnsigned = 0x1.7799dap19f;
constexpr float kLeastPosition = 0x1.5cf75p-22f;

// The code on the other side of a number from the nearest one, whose value is less than the number
// if `above`; itself at an end of the map. What is above 0 takes no code of 0 if FLOORS.
template <class Code, class F>
OPT_FN Code other_code(Code nearest, typename Kind<F>::Mask above, bool is_signed, F x) {
  const Code one = Code{} + 1, last = Code{} + 255;
  const Code lowest = !is_signed && FLOORS ? (x > 0.0f ? one : Code{}) : Code{};
  const Code code = nearest + (above ? one : -one);
  return code < lowest ? lowest : code > last ? last : code;
}

// Whether a number takes the other code: with the probability of its distance from the nearest
// one's value, as a part of the distance of both values, so that it is kept on the average.
// `random` is a whole number below 2^24.
template <class F>
OPT_FN typename Kind<F>::Mask takes_other(F x, F nearest, F other, F random) {
  return random * 0x1p-24f * rule::abs(other - nearest) < rule::abs(x - nearest);
}

// ---- percentile clipping ------------------------------------------------------------------------

constexpr int kHistory = 100;

// Notes a squared norm; returns whether there is one to clip by. The first norm above 0 fills the
// whole history: zeros in it would stop the parameter for as many steps as they stay.
OPT_FN bool note_norm(float* history, float sum, const Scalars& k) {
  if (!is_finite(sum)) return false;
  int noted = 0;
  for (int i = 0; i < kHistory; ++i) noted += history[i] != 0.0f;
  for (int i = 0; noted == 0 && i < kHistory; ++i) history[i] = sum;
  history[step_number(k) % kHistory] = sum;
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
  const float norm = rule::sqrt(history[step_number(k) % kHistory]), clip = rule::sqrt(clip_sum);
  return norm > clip ? clip / norm : 1.0f;
}
