// How the elements of a state are stored; optfactory/state/codecs.py says what the formats are.

enum Format {
  kFloat32,
  kBfloat16,  // rounded at random, as all below kMap8
  kMap8,  // codes of a dynamic map of 256 values; elements of a block share a scale, from here on
  kE4m3,  // small floats: sign, 4 bits of exponent and 3 of mantissa
  kE5m3,  // neither sign nor zero
  kE2m1,  // of 4 bits, two in a byte, the first in the upper half
  kE3m1,  // neither sign nor zero
};

OPT_FN constexpr int bits_of_format(Format format) {
  return format == kFloat32 ? 32 : format == kBfloat16 ? 16 : format < kE2m1 ? 8 : 4;
}

// The bytes of an even number of elements; compilers would not see that bits divide.
OPT_FN constexpr int64_t bytes_of_format(Format format, int64_t elements) {
  return bits_of_format(format) < 8 ? elements / 2 : elements * (bits_of_format(format) / 8);
}

OPT_FN constexpr bool is_scaled(Format format) { return format >= kMap8; }

// ---- small floats; optfactory/state/minifloats.py is the definition ---------------------------

template <Format kFormat>
struct Minifloat {
  static constexpr bool kHasSign = kFormat == kE4m3 || kFormat == kE2m1;
  static constexpr int kExponent = kFormat == kE4m3   ? 4
                                   : kFormat == kE5m3 ? 5
                                   : kFormat == kE2m1 ? 2
                                                      : 3;
  static constexpr int kMantissa = kFormat == kE4m3 || kFormat == kE5m3 ? 3 : 1;
  static constexpr int kCut = 23 - kMantissa;                // bits of float32 that are lost
  static constexpr uint32_t kFirstNormal = 1u << kMantissa;  // a code, if there is a sign
  // Of the exponent, less than that of float32; the largest number is below 2, and e4m3 has a NaN.
  static constexpr uint32_t kBias = 127 - ((1 << kExponent) - 1);
  static constexpr float kLargest = kFormat == kE4m3 ? 1.75f : kFormat == kE5m3 ? 1.875f : 1.5f;
  static constexpr uint32_t kLast = (kFormat == kE4m3 ? 0x7e : (1u << (kExponent + kMantissa)) - 1);
};

// The number of a code. Subnormal ones are told from the least normal one, added and taken away:
// float32 numbers that are subnormal themselves would be slow, or zero where users flush them.
template <Format kFormat, class F>
OPT_FN F minifloat_value(typename Kind<F>::Word code) {
  using M = Minifloat<kFormat>;
  using Word = typename Kind<F>::Word;
  if constexpr (!M::kHasSign) {
    return floats_of((code << M::kCut) + (M::kBias << 23));
  } else {
    constexpr int kBits = M::kExponent + M::kMantissa;
    const Word magnitude = code & ((1u << kBits) - 1), none = Word{};
    const auto small = magnitude < M::kFirstNormal;
    const Word exponent = small ? none + ((M::kBias + 1) << 23) : none + (M::kBias << 23);
    const F above = floats_of((magnitude << M::kCut) + exponent);
    const F least = Kind<F>::splat(bits_float((M::kBias + 1) << 23));
    const F size = above - rule::where(small, least, F{});
    return floats_of(words_of(size) | (code >> kBits & 1u) << 31);
  }
}

// Quotients are by so much too large that the greatest of a block, whatever the roundings on its
// way, takes the last code.
constexpr float kQuotientsBy = 0x1.000004p0f;

// The code of a magnitude by its scale, which is rounded up with the probability of what is cut
// off, by as many random bits. It may lie behind the largest one's.
template <Format kFormat, class F>
OPT_FN typename Kind<F>::Word minifloat_code(F size, typename Kind<F>::Word added) {
  using M = Minifloat<kFormat>;
  using Word = typename Kind<F>::Word;
  const Word none = Word{};
  if constexpr (!M::kHasSign) {
    constexpr uint32_t kLeast = M::kBias << 23;
    const Word bits = words_of(size);
    return ((bits > kLeast ? bits : none + kLeast) + added - kLeast) >> M::kCut;
  } else {
    constexpr uint32_t kLeast = (M::kBias + 1) << 23;
    const F least = Kind<F>::splat(bits_float(kLeast));
    const auto small = size < least;
    const Word bits = words_of(size + rule::where(small, least, F{}));
    const Word shift = small ? none + (1u << 23) : none;
    return (bits + added - (M::kBias << 23) - shift) >> M::kCut;
  }
}
