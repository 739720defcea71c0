// Numbers of a model's dtype, to and from float32. Included inside a namespace, after kernels_body.h.

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Words widened(const uint8_t* from) {
  return __builtin_convertvector(load<Halves>(from), Words);
}

template <Format kFormat>
inline Floats read(const uint8_t* from) {
  if (kFormat == kFloat32) return load<Floats>(from);
  const Words bits = widened(from);
  if (kFormat == kBFloat16) return (Floats)(bits << 16);
  // The exponent's bias differs by 112; a multiplication also gets subnormal numbers right.
  const Floats size = (Floats)((bits & 0x7FFF) << 13) * spread(0x1p112f);
  const Words special = (Words)((bits & 0x7C00) == 0x7C00) & 0x7F800000;
  return (Floats)((Words)size | special | (bits & 0x8000) << 16);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// IEEE half, ties to even.
inline uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
  // Below the normal numbers, adding 1/2 leaves the mantissa in its last bits.
  if (size < 0x38800000) return (uint16_t)(sign | (bits_of(__builtin_fabsf(x) + 0.5f) - bits_of(0.5f)));
  const uint32_t half = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
  return (uint16_t)(sign | half);
}

inline uint16_t to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline int bytes_of(Format format) { return format == kFloat32 ? 4 : 2; }

void write(const float* from, Format format, int n, uint8_t* to) {
  if (format == kFloat32) {
    __builtin_memcpy(to, from, 4 * (int64_t)n);
    return;
  }
  for (int i = 0; i < n; i++) {
    const uint16_t half = format == kFloat16 ? to_half(from[i]) : to_bfloat(from[i]);
    __builtin_memcpy(to + 2 * i, &half, 2);
  }
}
