// Attention to the full-precision tokens of a KV head, and merging it with the encoded part.
// Included inside a namespace, after formats_body.h.

template <Format kFormat>
void floats_of(const uint8_t* from, int n, float* to) {
  for (int i = 0; i < n; i += kLanes) store(to + i, read<kFormat>(from + (int64_t)i * bytes_of(kFormat)));
}

void to_floats(const uint8_t* from, Format format, int n, float* to) {
  switch (format) {
    case kFloat32: return floats_of<kFloat32>(from, n, to);
    case kBFloat16: return floats_of<kBFloat16>(from, n, to);
    case kFloat16: return floats_of<kFloat16>(from, n, to);
  }
}

template <Format kFormat, int kRows>
void window_rows(const WindowHead& head, int first) {
  const int dim = head.dim, n = head.count, bytes = bytes_of(kFormat);
  float query[kRows][kMaxDim], top[kRows];
  for (int r = 0; r < kRows; r++) {
    floats_of<kFormat>(head.query + (first + r) * head.query_stride, dim, query[r]);
    top[r] = -__builtin_inff();
  }
  for (int t = 0; t < n; t++) {
    const uint8_t* key = head.keys + head.tokens[t];
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
  for (int r = 0; r < kRows; r++) {
    head.top[first + r] = top[r];
    head.mass[first + r] = exponentiate(head.logits + r * n, n, 1.0f, top[r]);
  }
  for (int i = 0; i < dim; i += kLanes) {
    Floats sum[kRows] = {};
    for (int t = 0; t < n; t++) {
      const Floats v = read<kFormat>(head.values + head.tokens[t] + (int64_t)i * bytes);
      for (int r = 0; r < kRows; r++) sum[r] += v * head.logits[r * n + t];
    }
    for (int r = 0; r < kRows; r++) store(head.sums + (int64_t)(first + r) * dim + i, sum[r]);
  }
}

template <Format kFormat>
void window_of(const WindowHead& head) {
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

// exp(logit - top), 0 where nothing is in the part.
inline float weight_of(float logit, float top) { return logit == -__builtin_inff() ? 0 : __builtin_expf(logit - top); }

void window_merge(const WindowMerge& merge) {
  const int dim = merge.dim;
  float sums[kMaxDim];
  for (int r = 0; r < merge.groups; r++) {
    const float *near_sums = merge.sums + (int64_t)r * dim, *part = merge.part + (int64_t)r * dim;
    const float top = merge.top[r], lse = merge.part_lse[r];
    const float sink = merge.sink ? merge.sink[r] : -__builtin_inff();
    float highest = lse > top ? lse : top;
    highest = sink > highest ? sink : highest;
    float near = weight_of(top, highest), far = weight_of(lse, highest);
    const float all = near * merge.mass[r] + far + weight_of(sink, highest);
    if (all != 0) {
      near /= all;
      far /= all;
    }
    for (int i = 0; i < dim; i += kLanes)
      store(sums + i, load<Floats>(near_sums + i) * near + load<Floats>(part + i) * far);
    write(sums, merge.format, dim, merge.output + (int64_t)r * dim * bytes_of(merge.format));
  }
}
