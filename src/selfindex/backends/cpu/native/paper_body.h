// The paper preset's pages (docs/format.md): attention to their tokens, and one KV head of one page from
// raw keys and values. Included inside a namespace, after encode_body.h.

// kLanes channels of a token, from channel i on.
inline Floats grouped(const uint8_t* crumbs, float scale, float zero, int i) {
  uint32_t packed = 0;
  __builtin_memcpy(&packed, crumbs + i / 4, kLanes / 4);
  Words down;
  for (int j = 0; j < kLanes; j++) down[j] = 2 * j;
  const Words code = (Words{} + packed) >> down & 3;
  return __builtin_convertvector((Ints)code, Floats) * scale + zero;
}

inline Floats grouped_signed(const uint8_t* crumbs, const uint8_t* signs, float scale, float zero, int i) {
  uint32_t packed = 0;
  __builtin_memcpy(&packed, signs + i / 8, kLanes > 8 ? kLanes / 8 : 1);
  if (kLanes < 8) packed >>= i % 8;
  Words up;
  for (int j = 0; j < kLanes; j++) up[j] = 31 - j;
  const Words negative = ~((Words{} + packed) << up) & 0x80000000u;
  return (Floats)((Words)grouped(crumbs, scale, zero, i) ^ negative);
}

inline int groups_of(int dim) { return (dim + kPaperGroup - 1) / kPaperGroup; }

template <int kRows>
inline void grouped_dots_rows(const GroupedTokens& tokens, const float* row, float* dots) {
  const int dim = tokens.dim, groups = groups_of(dim);
  for (int t = 0; t < tokens.n; t++) {
    const float *scale = tokens.scale + t * groups, *zero = tokens.zero + t * groups;
    Floats sum[kRows] = {};
    for (int i = 0; i < dim; i += kLanes) {
      const int group = i / kPaperGroup;
      const Floats x = grouped_signed(tokens.crumbs[t], tokens.signs[t], scale[group], zero[group], i);
      for (int r = 0; r < kRows; r++) sum[r] += x * load<Floats>(row + r * dim + i);
    }
    for (int r = 0; r < kRows; r++) dots[r * kTile + t] = total(sum[r]);
  }
}

void grouped_dots(const GroupedTokens& tokens, const float* row, int rows, float* dots) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) grouped_dots_rows<4>(tokens, row + r * tokens.dim, dots + r * kTile);
  row += r * tokens.dim;
  dots += r * kTile;
  switch (rows - r) {
    case 3: return grouped_dots_rows<3>(tokens, row, dots);
    case 2: return grouped_dots_rows<2>(tokens, row, dots);
    case 1: return grouped_dots_rows<1>(tokens, row, dots);
    default: return;
  }
}

template <int kRows>
inline void grouped_sums_rows(const GroupedTokens& tokens, const float* weight, int64_t weight_stride,
                              float* sums, int64_t sums_stride) {
  const int dim = tokens.dim, groups = groups_of(dim);
  for (int i = 0; i < dim; i += kLanes) {
    const int group = i / kPaperGroup;
    Floats sum[kRows];
    for (int r = 0; r < kRows; r++) sum[r] = load<Floats>(sums + r * sums_stride + i);
    for (int t = 0; t < tokens.n; t++) {
      const int at = t * groups + group;
      const Floats x = grouped(tokens.crumbs[t], tokens.scale[at], tokens.zero[at], i);
      for (int r = 0; r < kRows; r++) sum[r] += x * weight[r * weight_stride + t];
    }
    for (int r = 0; r < kRows; r++) store(sums + r * sums_stride + i, sum[r]);
  }
}

void grouped_sums(const GroupedTokens& tokens, const float* weight, int64_t weight_stride, int rows,
                  float* sums, int64_t sums_stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    grouped_sums_rows<4>(tokens, weight + r * weight_stride, weight_stride, sums + r * sums_stride, sums_stride);
  weight += r * weight_stride;
  sums += r * sums_stride;
  switch (rows - r) {
    case 3: return grouped_sums_rows<3>(tokens, weight, weight_stride, sums, sums_stride);
    case 2: return grouped_sums_rows<2>(tokens, weight, weight_stride, sums, sums_stride);
    case 1: return grouped_sums_rows<1>(tokens, weight, weight_stride, sums, sums_stride);
    default: return;
  }
}

void grouped_widen(const GroupedTokens& tokens, const float* factor, const float* add, float* to) {
  const int dim = tokens.dim, groups = groups_of(dim);
  for (int t = 0; t < tokens.n; t++) {
    const float *scale = tokens.scale + t * groups, *zero = tokens.zero + t * groups;
    for (int i = 0; i < dim; i += kLanes) {
      const int group = i / kPaperGroup;
      Floats x = tokens.signs
                     ? grouped_signed(tokens.crumbs[t], tokens.signs[t], scale[group], zero[group], i)
                     : grouped(tokens.crumbs[t], scale[group], zero[group], i);
      if (factor) x = x * load<Floats>(factor + i) + load<Floats>(add + i);
      store(to + (int64_t)t * dim + i, x);
    }
  }
}

inline Floats within(Floats x, float low, float high) {
  x = x < low ? spread(low) : x;
  return x > high ? spread(high) : x;
}

// Halves nearest to x, and what they stand for.
inline Floats halves(Floats x, uint16_t* to) {
  for (int t = 0; t < kLanes; t++) to[t] = to_half(x[t]);
  return read<kFloat16>((const uint8_t*)to);
}

// 2-bit codes of kLanes tokens between the ends of each group (codec/paper.py, `_quantise`), of which
// `live` are written: to `codes`, `scales` and `zeros` of every token, `token` and `next` bytes apart.
inline void put_grouped(const Floats* x, int dim, int live, uint8_t* codes, int64_t token, uint8_t* scales,
                        uint8_t* zeros, int64_t next) {
  constexpr float kMost = 65504.0f;  // the largest half
  const int groups = groups_of(dim);
  Words crumbs[kMaxDim / 16];
  for (int group = 0; group < groups; group++) {
    const int first = group * kPaperGroup, last = first + kPaperGroup < dim ? first + kPaperGroup : dim;
    Floats low = x[first], high = low;
    Words broken{};
    for (int i = first; i < last; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      broken |= (Words)(x[i] != x[i]);
    }
    // Extremes are not numbers where a channel is not.
    low = (Floats)((Words)low | broken);
    high = (Floats)((Words)high | broken);
    const Ints mirrored = (low < -kMost) & (high < -low);
    const Floats start = mirrored ? high : low, end = mirrored ? low : high;
    uint16_t scale[kLanes], zero[kLanes];
    const Floats from = within(start, -kMost, kMost);
    const Floats step = halves(within((end - from) / 3.0f, -kMost, kMost), scale), origin = halves(from, zero);
    for (int t = 0; t < live; t++) {
      __builtin_memcpy(scales + t * next + 2 * group, scale + t, 2);
      __builtin_memcpy(zeros + t * next + 2 * group, zero + t, 2);
    }
    for (int i = first; i < last; i += 16) {
      Words crumb{};
      for (int j = 0; j < 16; j++) {
        Floats code = step != 0.0f ? (x[i + j] - origin) / step : Floats{};
        code = code > 0.0f ? code : Floats{};  // also what is not a number
        code = code < 3.0f ? code : spread(3.0f);
        // 1.5 * 2**23: adding it rounds to an integer, in the last bits.
        crumb |= ((Words)(code + 12582912.0f) & 3) << (2 * j);
      }
      crumbs[i / 16] = crumb;
    }
  }
  for (int t = 0; t < live; t++) put(crumbs, dim, 4, t, codes + t * token);
}

template <Format kFormat>
void encode_paper_of(const EncodeRecord& record) {
  const Layout& layout = *record.layout;
  const int dim = layout.dim, next = layout.halves();
  const float *mean = record.constants, *alpha = mean + dim;
  Floats x[kMaxDim];
  Words signs[kMaxDim / 16];
  for (int start = 0; start < record.live; start += kLanes) {
    const int live = record.live - start < kLanes ? record.live - start : kLanes;
    uint8_t *token = record.payload + start * layout.token, *halves = record.payload + start * next;
    turn<kFormat>(record.keys + start * record.key_stride, record.key_stride, live, nullptr, dim, x);
    for (int i = 0; i < dim; i += 16) {
      Words sign{};
      for (int j = 0; j < 16; j++) {
        const Floats centred = x[i + j] - mean[i + j];
        sign |= ((Words)(centred >= 0.0f) & 1) << j;
        const Floats size = (Floats)((Words)centred & 0x7FFFFFFF);
        x[i + j] = alpha[i + j] > 0 ? size / alpha[i + j] : Floats{};
      }
      signs[i / 16] = sign;
    }
    for (int t = 0; t < live; t++)
      put(signs, dim, 2, t, record.index + layout.codes + (int64_t)(start + t) * (dim / 8));
    put_grouped(x, dim, live, token + layout.magnitudes, layout.token, halves + layout.key_scale,
                halves + layout.key_zero, next);
    turn<kFormat>(record.values + start * record.value_stride, record.value_stride, live, nullptr, dim, x);
    put_grouped(x, dim, live, token + layout.values, layout.token, halves + layout.value_scale,
                halves + layout.value_zero, next);
  }
}

void encode_paper(const EncodeRecord& record) {
  switch (record.format) {
    case kFloat32: return encode_paper_of<kFloat32>(record);
    case kBFloat16: return encode_paper_of<kBFloat16>(record);
    case kFloat16: return encode_paper_of<kFloat16>(record);
  }
}

template <Format kFormat>
void channel_sums_of(const uint8_t* tokens, int64_t stride, int64_t n, int dim, float* sums) {
  for (int64_t t = 0; t < n; t++)
    for (int i = 0; i < dim; i += kLanes)
      store(sums + i, load<Floats>(sums + i) + read<kFormat>(tokens + t * stride + i * bytes_of(kFormat)));
}

void channel_sums(const uint8_t* tokens, Format format, int64_t stride, int64_t n, int dim, float* sums) {
  switch (format) {
    case kFloat32: return channel_sums_of<kFloat32>(tokens, stride, n, dim, sums);
    case kBFloat16: return channel_sums_of<kBFloat16>(tokens, stride, n, dim, sums);
    case kFloat16: return channel_sums_of<kFloat16>(tokens, stride, n, dim, sums);
  }
}

typedef float Four __attribute__((vector_size(16)));

template <Format kFormat>
void code_sums_of(const uint8_t* tokens, int64_t stride, int64_t n, int dim, const float* mean, float* alpha,
                  float* sums, int32_t* members) {
  float centred[kLanes];
  for (int64_t t = 0; t < n; t++)
    for (int i = 0; i < dim; i += kLanes) {
      const Floats x = read<kFormat>(tokens + t * stride + i * bytes_of(kFormat)) - load<Floats>(mean + i);
      const Floats size = (Floats)((Words)x & 0x7FFFFFFF), most = load<Floats>(alpha + i);
      store(alpha + i, size > most ? size : most);
      store(centred, x);
      unsigned positive = Lanes::at_least(centred, 0.0f);
      for (int j = 0; j < kLanes; j += 4, positive >>= 4) {
        const int code = (i + j) / 4 * kGroupEntries + (positive & 15);
        store(sums + 4 * code, load<Four>(sums + 4 * code) + load<Four>(centred + j));
        members[code]++;
      }
    }
}

void code_sums(const uint8_t* tokens, Format format, int64_t stride, int64_t n, int dim, const float* mean,
               float* alpha, float* sums, int32_t* members) {
  switch (format) {
    case kFloat32: return code_sums_of<kFloat32>(tokens, stride, n, dim, mean, alpha, sums, members);
    case kBFloat16: return code_sums_of<kBFloat16>(tokens, stride, n, dim, mean, alpha, sums, members);
    case kFloat16: return code_sums_of<kFloat16>(tokens, stride, n, dim, mean, alpha, sums, members);
  }
}
