// One KV head of one page, from raw keys and values to its records (docs/format.md, "Encoding").
// Vectors hold one channel of kLanes tokens, so that sums over channels need no shuffles.
// Included inside a namespace, after formats_body.h.

// Rows of kLanes tokens, times a factor per channel if there is one, to channels: turned [dim]. Rows
// past `live` are zeros.
template <Format kFormat>
inline void turn(const uint8_t* rows, int64_t stride, int live, const float* factor, int dim,
                 Floats* turned) {
  for (int i = 0; i < dim; i += kLanes) {
    Floats x[kLanes], y[kLanes];
    const Floats f = factor ? load<Floats>(factor + i) : spread(1.0f);
    for (int t = 0; t < kLanes; t++)
      x[t] = t < live ? read<kFormat>(rows + t * stride + (int64_t)i * bytes_of(kFormat)) * f : Floats{};
    // Every step rotates the address (token, channel) of all numbers by one bit.
    for (int step = 1; step < kLanes; step *= 2) {
      for (int k = 0; k < kLanes / 2; k++)
        Lanes::interleave(x[k], x[k + kLanes / 2], y[2 * k], y[2 * k + 1]);
      for (int k = 0; k < kLanes; k++) x[k] = y[k];
    }
    for (int k = 0; k < kLanes; k++) turned[i + k] = x[k];
  }
}

// x @ H.T for H of docs/format.md: a block of `order`, then Sylvester's doubling.
inline void hadamard(Floats* x, int dim, int order, const float* block) {
  if (order > 1) {
    Floats y[kMaxOrder];
    for (int at = 0; at < dim; at += order) {
      for (int i = 0; i < order; i++) {
        y[i] = Floats{};
        for (int j = 0; j < order; j++) y[i] += x[at + j] * block[i * order + j];
      }
      for (int i = 0; i < order; i++) x[at + i] = y[i];
    }
  }
  for (int half = order; half < dim; half *= 2)
    for (int at = 0; at < dim; at += 2 * half)
      for (int i = at; i < at + half; i++) {
        const Floats a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

struct Sums {
  Floats square, product, levels;  // <x, x>, <x, c>, <c, c>
};

// Codes of kLanes tokens: 16 channels to a word of 2-bit magnitudes and one of signs.
template <int kSizes>
inline Sums quantise(const Floats* x, int dim, Words* crumbs, Words* signs) {
  Sums sums{};
  for (int i = 0; i < dim; i++) sums.square += x[i] * x[i];
  // The root mean square times the midpoints between levels; an all but zero token has code 0.
  const Floats mean = sums.square / (float)dim;
  Floats rms{};
  for (int t = 0; t < kLanes; t++) rms[t] = __builtin_sqrtf(mean[t]);
  rms = rms > 0.0f ? rms : spread(__builtin_inff());
  constexpr float kLevels[4] = {kSizes == 4 ? 13.0f / 53 : 0.5f, kSizes == 4 ? 40.0f / 53 : 1.5f,
                                71.0f / 53, 114.0f / 53};
  Floats threshold[kSizes - 1];
  for (int k = 0; k + 1 < kSizes; k++) threshold[k] = rms * ((kLevels[k] + kLevels[k + 1]) / 2);
  for (int i = 0; i < dim; i += 16) {
    Words crumb{}, sign{};
    for (int j = 0; j < 16; j++) {
      const Floats v = x[i + j];
      const Floats size = (Floats)((Words)v & 0x7FFFFFFF);
      Floats level = spread(kLevels[0]);
      Words code{};
      for (int k = 0; k + 1 < kSizes; k++) {
        const Words above = (Words)(size > threshold[k]);
        level = above ? spread(kLevels[k + 1]) : level;
        code -= above;
      }
      sums.product += size * level;
      sums.levels += level * level;
      const Words positive = (Words)(v >= 0.0f);
      // Two levels a sign: codes from the lowest to the highest.
      if (kSizes == 2) code = positive ? code + 2 : 1 - code;
      crumb |= code << (2 * j);
      sign |= (positive & 1) << j;
    }
    crumbs[i / 16] = crumb;
    signs[i / 16] = sign;
  }
  return sums;
}

inline Floats ratio(Floats numerator, Floats denominator) {
  return denominator > 0.0f ? numerator / denominator : Floats{};
}

// Bytes of positive scales, and their base.
inline float put_scales(const float* scales, int n, uint8_t* to) {
  constexpr float kLargest = 1.9375f;
  float top = 0;
  for (int t = 0; t < n; t++) top = scales[t] > top ? scales[t] : top;
  const float base = top / kLargest;
  for (int t = 0; t < n; t++) {
    const float part = base > 0 && scales[t] > 0 ? scales[t] / base : 0;
    const int code = (to_half(part < kLargest ? part : kLargest) + 32) >> 6;
    to[t] = (uint8_t)(code < 255 ? code : 255);
  }
  return base;
}

inline void put(const Words* words, int dim, int bytes, int token, uint8_t* to) {
  for (int i = 0; i < dim / 16; i++) {
    const uint32_t word = words[i][token];
    __builtin_memcpy(to + i * bytes, &word, bytes);
  }
}

template <Format kFormat>
void encode_values(const EncodeRecord& record) {
  const Layout& layout = *record.layout;
  const int dim = layout.dim;
  Floats x[kMaxDim];
  Words crumbs[kMaxDim / 16], signs[kMaxDim / 16];
  for (int start = 0; start < record.live; start += kLanes) {
    const int live = record.live - start < kLanes ? record.live - start : kLanes;
    turn<kFormat>(record.values + start * record.value_stride, record.value_stride, live,
                  record.value_factor, dim, x);
    hadamard(x, dim, record.order, record.block);
    const Sums sums = layout.value_bits == 3 ? quantise<4>(x, dim, crumbs, signs)
                                             : quantise<2>(x, dim, crumbs, signs);
    store(record.scales + start, ratio(sums.square, sums.product));
    for (int t = 0; t < live; t++) {
      uint8_t* token = record.payload + (start + t) * layout.token;
      put(crumbs, dim, 4, t, token + layout.values);
      if (layout.value_bits == 3) put(signs, dim, 2, t, token + layout.value_signs);
    }
  }
  const float base = put_scales(record.scales, record.live, record.payload + layout.value_scale);
  __builtin_memcpy(record.index + layout.value_base, &base, 4);
}

// The mean of a page in 8 bits: `mean` [dim] becomes what those stand for.
inline void put_mean(const Layout& layout, float* mean, uint8_t* index) {
  float top = 0;
  for (int i = 0; i < layout.dim; i++) {
    const float size = __builtin_fabsf(mean[i]);
    top = size > top ? size : top;
  }
  const float step = top / 127;
  for (int i = 0; i < layout.dim; i++) {
    float code = step > 0 ? __builtin_nearbyintf(mean[i] / step) : 0;
    code = code > -127 ? code : -127;  // also what is not a number
    code = code < 127 ? code : 127;
    index[layout.mean + i] = (uint8_t)(int8_t)code;
    mean[i] = code * step;
  }
  __builtin_memcpy(index + layout.mean_step, &step, 4);
}

template <Format kFormat>
void encode_keys(const EncodeRecord& record) {
  const Layout& layout = *record.layout;
  const int dim = layout.dim;
  Floats* rotated = (Floats*)record.scratch;
  Floats sum[kMaxDim];
  for (int i = 0; i < dim; i++) sum[i] = Floats{};
  for (int start = 0; start < record.live; start += kLanes) {
    const int live = record.live - start < kLanes ? record.live - start : kLanes;
    Floats* x = rotated + start / kLanes * dim;
    turn<kFormat>(record.keys + start * record.key_stride, record.key_stride, live,
                  record.constants, dim, x);
    hadamard(x, dim, record.order, record.block);
    for (int i = 0; i < dim; i++) sum[i] += x[i];
  }
  float mean[kMaxDim];
  for (int i = 0; i < dim; i++) mean[i] = total(sum[i]) / (float)(record.live > 1 ? record.live : 1);
  put_mean(layout, mean, record.index);

  Words crumbs[kMaxDim / 16], signs[kMaxDim / 16];
  for (int start = 0; start < record.live; start += kLanes) {
    const int live = record.live - start < kLanes ? record.live - start : kLanes;
    Floats* x = rotated + start / kLanes * dim;
    for (int i = 0; i < dim; i++) x[i] -= mean[i];
    const Sums sums = quantise<4>(x, dim, crumbs, signs);
    store(record.scales + start, ratio(sums.product, sums.levels));
    for (int t = 0; t < live; t++) {
      put(signs, dim, 2, t, record.index + layout.codes + (int64_t)(start + t) * (dim / 8));
      put(crumbs, dim, 4, t, record.payload + (start + t) * layout.token + layout.magnitudes);
    }
  }
  const float base = put_scales(record.scales, record.live, record.index + layout.key_scale);
  __builtin_memcpy(record.index + layout.key_base, &base, 4);
}

template <Format kFormat>
void encode_both(const EncodeRecord& record) {
  encode_keys<kFormat>(record);
  encode_values<kFormat>(record);
}

void encode(const EncodeRecord& record) {
  switch (record.format) {
    case kFloat32: return encode_both<kFloat32>(record);
    case kBFloat16: return encode_both<kBFloat16>(record);
    case kFloat16: return encode_both<kFloat16>(record);
  }
}
