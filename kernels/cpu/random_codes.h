// 8-bit codes rounded at random, kStride elements at a time; element.cuh defines what is done.

#if RANDOM_CODES

// Makes of the nearest codes of kStride elements such that are rounded at random.
OPT_FN void round_codes(const float* x, float scale, bool is_signed, const QuantizationMap& map,
                        uint32_t key, int64_t element, uint8_t* codes) {
  Ints code[kVectors], others[kVectors];
  Floats nearest[kVectors], other[kVectors];
  widen<kVectors>(codes, code);
  decode_vectors(code, scale, is_signed, map, nearest);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Floats value = load<Floats>(x + v * kWidth);
    others[v] = other_code(code[v], value > nearest[v], is_signed, value);
  }
  decode_vectors(others, scale, is_signed, map, other);
  // As random_bits(); the upper half of elements' numbers changes once in 2^32 of them.
  const auto upper = [&](int64_t of) { return mix(uint32_t(uint64_t(of) >> 32) ^ key); };
  const uint32_t low = uint32_t(element);
  const Uints here = Uints{} + upper(element), next = Uints{} + upper(element + kStride);
  const Uints first = (Uints)lane_numbers() + low;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Uints number = first + uint32_t(v * kWidth);
    const Uints random = mix((number < low ? next : here) ^ number);
    const Floats uniform = __builtin_convertvector((Ints)(random >> 8), Floats);
    const Floats value = load<Floats>(x + v * kWidth);
    code[v] = takes_other(value, nearest[v], other[v], uniform) ? others[v] : code[v];
  }
  write_codes<0>(code, codes);
}

#endif
