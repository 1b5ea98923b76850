// States rounded at random, kStride elements at a time; element.cuh defines the random bits.

#if DRAWS_FOR_STATES

// What the random bits of a block's elements depend on.
struct Noise {
  uint32_t key = 0;
  uint32_t high = 0;    // of random_bits(), for the first one
  int64_t element = 0;  // number of the first one in the whole tensor

  OPT_FN Noise of(uint32_t param_key, int64_t element) {
    const uint32_t key = codes_key(param_key);
    return {key, high_bits(key, element), element};
  }
};

// Where elements' numbers reach the next 2^32, which hardly ever is.
OPT_NOINLINE void draw_one_by_one(uint32_t key, int64_t element, uint32_t* words) {
  for (int i = 0; i < kStride; ++i) words[i] = random_bits(key, element + i);
}

// The random bits of a stride, from element i of the block on.
OPT_FN void draw(const Noise& noise, int i, Uints* words) {
  const int64_t first = noise.element + i, last = first + kStride - 1;
  const Uints low = (Uints)lane_numbers() + uint32_t(first);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) words[v] = mix((low + uint32_t(v * kWidth)) ^ noise.high);
  if (__builtin_expect((noise.element ^ last) >> 32 != 0, 0)) {
    alignas(64) uint32_t each[kStride];
    draw_one_by_one(noise.key, first, each);
    for (int v = 0; v < kVectors; ++v) words[v] = load<Uints>(each + v * kWidth);
  }
}

#if QUANTIZED && RANDOM_CODES

// The positions of optfactory/state/positions.py for kVectors vectors of magnitudes, in units of
// 2^-23.
OPT_FN void find_positions(const Floats* size, bool is_signed, const Lines& lines,
                           Uints* position) {
  using K = Kind<Floats>;
  const Table step = table_of(lines.step), start = table_of(lines.start);
  const Table bend = table_of(lines.bend);
  const Floats third = K::splat(kThird);
  Ints line[kVectors];
  Floats m[kVectors];
  find_lines(size, lines, line);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    m[v] = rule::fma(lookup(step, line[v]), size[v], lookup(start, line[v]));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    m[v] = lesser(m[v], rule::fma(m[v], third, lookup(bend, line[v])));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    if (is_signed) {
      m[v] = lesser(m[v], rule::fma(K::splat(kFirstSigned), size[v], K::splat(0.5f)));
    } else if (!FLOORS) {
      const Floats first = rule::fma(K::splat(kFirstUnsigned), size[v], K::splat(0.75f));
      m[v] = size[v] < kLeastPosition ? first : m[v];
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v)
    position[v] = shifted_left((Uints)(bits_of(m[v]) - (126 << 23)), line[v] + (is_signed ? 0 : 1));
}

// Writes the codes of kStride elements; the upper bits of `random` count most.
template <bool kLifts>
OPT_FN void encode_by_positions(const float* x, const Coding& coding, bool is_signed,
                                const Lines& lines, const Uints* random, uint8_t* codes) {
  Floats y[kVectors], size[kVectors];
  Uints position[kVectors];
  Ints k[kVectors];
  find_sizes<kLifts>(x, coding, is_signed, y, size);
  find_positions(size, is_signed, lines, position);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    k[v] = (Ints)((position[v] + (random[v] >> 9)) >> 23);
    if (is_signed)
      k[v] = with_sign(k[v], bits_of(y[v]));
    else if (FLOORS)
      k[v] = floored(k[v], x + v * kWidth);
  }
  write_numbers(k, is_signed, codes);
}

// Makes of the nearest codes of kStride elements such that are rounded at random, by tables.
OPT_FN void round_codes(const float* x, float scale, bool is_signed, const QuantizationMap& map,
                        const Uints* random, uint8_t* codes) {
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
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    const Floats uniform = __builtin_convertvector((Ints)(random[v] >> 8), Floats);
    const Floats value = load<Floats>(x + v * kWidth);
    code[v] = takes_other(value, nearest[v], other[v], uniform) ? others[v] : code[v];
  }
  write_codes<0>(code, codes);
}

#endif

#else
struct Noise {
  OPT_FN Noise of(uint32_t, int64_t) { return {}; }
};
OPT_FN void draw(const Noise&, int, Uints*) {}
#endif
