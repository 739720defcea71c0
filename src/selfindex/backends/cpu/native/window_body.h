// One step's attention to the full-precision tokens of a KV head, merged with the encoded part.
// Included inside a namespace, after formats_body.h.

template <Format kFormat>
void to_floats(const uint8_t* from, int n, float* to) {
  for (int i = 0; i < n; i += kLanes) store(to + i, read<kFormat>(from + (int64_t)i * bytes_of(kFormat)));
}

// weight * x of a part whose weight is 0 where nothing is in it.
inline float weight_of(float logit, float top) { return logit == -__builtin_inff() ? 0 : __builtin_expf(logit - top); }

template <Format kFormat, int kRows>
void window_rows(const WindowHead& head, int first) {
  const int dim = head.dim, n = head.length + 1, bytes = bytes_of(kFormat);
  float query[kRows][kMaxDim], sums[kRows][kMaxDim], top[kRows], mass[kRows];
  for (int r = 0; r < kRows; r++) {
    to_floats<kFormat>(head.query + (first + r) * head.query_stride, dim, query[r]);
    top[r] = -__builtin_inff();
  }
  for (int t = 0; t < n; t++) {
    const uint8_t* key = head.keys + (int64_t)t * dim * bytes;
    Floats dot[kRows] = {};
    for (int i = 0; i < dim; i += kLanes) {
      const Floats k = read<kFormat>(key + (int64_t)i * bytes);
      for (int r = 0; r < kRows; r++) dot[r] += k * load<Floats>(query[r] + i);
    }
    for (int r = 0; r < kRows; r++) {
      const float logit = total(dot[r]) * head.scaling;
      head.logits[r * n + t] = logit;
      top[r] = logit > top[r] ? logit : top[r];
    }
  }
  for (int r = 0; r < kRows; r++) mass[r] = exponentiate(head.logits + r * n, n, 1.0f, top[r]);
  for (int i = 0; i < dim; i += kLanes) {
    Floats sum[kRows] = {};
    for (int t = 0; t < n; t++) {
      const Floats v = read<kFormat>(head.values + ((int64_t)t * dim + i) * bytes);
      for (int r = 0; r < kRows; r++) sum[r] += v * head.logits[r * n + t];
    }
    for (int r = 0; r < kRows; r++) store(sums[r] + i, sum[r]);
  }
  for (int r = 0; r < kRows; r++) {
    const float* part = head.part + (int64_t)(first + r) * dim;
    const float lse = head.part_lse[first + r];
    const float sink = head.sink ? head.sink[first + r] : -__builtin_inff();
    float highest = lse > top[r] ? lse : top[r];
    highest = sink > highest ? sink : highest;
    const float near = weight_of(top[r], highest), far = weight_of(lse, highest);
    const float all = near * mass[r] + far + weight_of(sink, highest);
    for (int i = 0; i < dim; i++) sums[r][i] = (near * sums[r][i] + far * part[i]) / all;
    write(sums[r], kFormat, dim, head.output + (int64_t)(first + r) * dim * bytes);
  }
}

template <Format kFormat>
void window_of(const WindowHead& head) {
  const int64_t bytes = (int64_t)head.dim * bytes_of(kFormat);
  __builtin_memcpy(head.keys + head.length * bytes, head.new_key, bytes);
  __builtin_memcpy(head.values + head.length * bytes, head.new_value, bytes);
  int r = 0;
  for (; r + 4 <= head.groups; r += 4) window_rows<kFormat, 4>(head, r);
  switch (head.groups - r) {
    case 3: return window_rows<kFormat, 3>(head, r);
    case 2: return window_rows<kFormat, 2>(head, r);
    case 1: return window_rows<kFormat, 1>(head, r);
    default: return;
  }
}

void window(const WindowHead& head) {
  switch (head.format) {
    case kFloat32: return window_of<kFloat32>(head);
    case kBFloat16: return window_of<kBFloat16>(head);
    case kFloat16: return window_of<kFloat16>(head);
  }
}
