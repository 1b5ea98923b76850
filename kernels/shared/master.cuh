// What is kept beside 16-bit parameters, so that no update is too small for them: what rounding
// lost (KAHAN), the lower half of a float32 master (SPLIT), or all of one (MASTER).
//
// SPLIT cuts a master's pattern m in two: the parameter has p = (m + 0x8000) >> 16, rounded half
// away from zero, and m - (p << 16) is kept, from -0x8000 to 0x7fff. So pairs and masters are one
// to one. With ties to even they could not be: an even p would have 0x10001 masters, an odd one
// 0xffff.

#define KEEPS (KAHAN || SPLIT || MASTER)

#if SPLIT
using Kept = int16_t;
#elif MASTER
using Kept = float;
#else
using Kept = PARAM;
#endif

// A master's pattern, of which there is one for each sign of a NaN: others would round to infinity.
OPT_FN uint32_t master_bits(float master) {
  const uint32_t bits = float_bits(master);
  return (bits & ~kSignBit) > kInfinityBits ? (bits & kSignBit) | 0x7fc00000u : bits;
}

OPT_FN void store_param(PARAM* target, float value, uint32_t key, int64_t element) {
#if STOCHASTIC
  store_random(target, value, random_bits(key, element));
#elif SPLIT
  target->bits = uint16_t((master_bits(value) + 0x8000u) >> 16);
#else
  store(target, value);
#endif
}

// A parameter with what is kept beside it. Who changes it from outside is heeded.
OPT_FN float completed(float p, Kept kept) {
#if SPLIT
  // Beside a parameter that was set to 0, a half below 0 would borrow from the sign.
  const uint32_t upper = float_bits(p), bits = upper + uint32_t(int32_t(kept));
  return bits_float((bits ^ upper) & kSignBit ? upper : bits);
#elif MASTER
  return float_bits(rounded_to_param(kept)) == float_bits(p) ? kept : p;
#else
  return p + to_float(kept);
#endif
}

OPT_FN void store_kept(Kept* target, float value) {
#if SPLIT
  *target = int16_t(master_bits(value));
#elif MASTER
  *target = value;
#else
  const float stored = rounded_to_param(value);
  store(target, is_finite(stored) ? value - stored : 0.0f);
#endif
}
