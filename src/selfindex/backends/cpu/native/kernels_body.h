// Kernels whose code is the same for all instruction sets: vectors of kLanes floats in the vector
// extension of GCC and Clang, which the compiler lowers to what the including file is compiled for.
// Included inside a namespace of its own, so that no two instruction sets share a symbol, and
// without templates of the standard library for the same reason. The including file has `Lanes`:
// `floats` reads kLanes int8 or int16 numbers, `at_least` is a bit per float that is not less,
// `interleave` makes a0 b0 a1 b1 .. of two vectors.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
inline V load(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class T, class V>
inline void store(T* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

inline Floats spread(float x) { return x - Floats{}; }

inline float total(Floats x) {
  // Pairwise, which compiles to shuffles and halves the rounding error.
  float part[kLanes];
  store(part, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// exp(x) for x <= 0, relative error below 3e-7; below -87 about 1e-38.
inline Floats exp_negative(Floats x) {
  const Floats lowest = spread(-87.0f);
  x = x < lowest ? lowest : x;  // keeps what is not a number
  const float round = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  Floats n = x * 1.44269504f + round;
  Ints exponent = (Ints)n << 23;
  n = n - round;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats y = spread(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Floats)(exponent + (127 << 23));
}

float to_logits(const int16_t* sums, const float* gain, int n, int zero, float factor, float offset,
                float* logits) {
  Floats best = spread(-__builtin_inff());
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats sum = (Floats)Lanes::floats(sums + i) - (float)zero;
    Floats logit = sum * (load<Floats>(gain + i) * factor) + offset;
    store(logits + i, logit);
    best = logit > best ? logit : best;
  }
  float top = -__builtin_inff();
  for (int j = 0; j < kLanes; j++) top = best[j] > top ? best[j] : top;
  for (; i < n; i++) {
    logits[i] = (float)(sums[i] - zero) * (gain[i] * factor) + offset;
    top = logits[i] > top ? logits[i] : top;
  }
  return top;
}

void dot_logits(const int32_t* dots, const float* scale, const float* offset, int n, float step,
                float factor, float* logits) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats dot = __builtin_convertvector(load<Ints>(dots + i), Floats);
    store(logits + i, (dot * step * load<Floats>(scale + i) + load<Floats>(offset + i)) * factor);
  }
  for (; i < n; i++) logits[i] = ((float)dots[i] * step * scale[i] + offset[i]) * factor;
}

float exponentiate(float* x, int64_t n, float factor, float shift) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats y = exp_negative(load<Floats>(x + i) * factor - shift);
    store(x + i, y);
    sum += y;
  }
  float rest = 0;
  for (; i < n; i++) {
    x[i] = exp_negative(spread(x[i] * factor - shift))[0];
    rest += x[i];
  }
  return total(sum) + rest;
}

void weigh(const float* x, int64_t stride, const float* weight, int rows, int64_t n, float* votes) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats sum{};
    for (int r = 0; r < rows; r++) sum += load<Floats>(x + r * stride + i) * weight[r];
    store(votes + i, sum);
  }
  for (; i < n; i++) {
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += x[r * stride + i] * weight[r];
    votes[i] = sum;
  }
}

void maxima(const float* scores, int64_t size, int64_t parts, float* maxima) {
  int64_t i = 0;
  for (; i + kLanes <= parts; i += kLanes) {
    Floats top = spread(-__builtin_inff());
    for (int64_t j = 0; j < size; j++) {
      const Floats score = load<Floats>(scores + j * parts + i);
      top = score > top ? score : top;
    }
    store(maxima + i, top);
  }
  for (; i < parts; i++) {
    float top = -__builtin_inff();
    for (int64_t j = 0; j < size; j++)
      top = scores[j * parts + i] > top ? scores[j * parts + i] : top;
    maxima[i] = top;
  }
}

void join_sums(const int16_t* high, const int16_t* low, int n, float* scores) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(scores + i, (Floats)Lanes::floats(high + i) * 128.0f + (Floats)Lanes::floats(low + i));
  for (; i < n; i++) scores[i] = (float)high[i] * 128.0f + (float)low[i];
}

int64_t reaching(const float* scores, int64_t n, float threshold, int32_t* found) {
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (unsigned left = Lanes::at_least(scores + i, threshold); left; left &= left - 1)
      found[count++] = (int32_t)i + __builtin_ctz(left);
  for (; i < n; i++)
    if (scores[i] >= threshold) found[count++] = (int32_t)i;
  return count;
}

template <int kRows>
inline void mean_dots_rows(const int8_t* mean, const float* row, int dim, float* dots) {
  Floats sum[kRows] = {};
  for (int i = 0; i < dim; i += kLanes) {
    const Floats m = (Floats)Lanes::floats(mean + i);
    for (int r = 0; r < kRows; r++) sum[r] += m * load<Floats>(row + r * dim + i);
  }
  for (int r = 0; r < kRows; r++) dots[r] = total(sum[r]);
}

void mean_dots(const int8_t* mean, const float* row, int rows, int dim, float* dots) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) mean_dots_rows<4>(mean, row + r * dim, dim, dots + r);
  for (; r < rows; r++) mean_dots_rows<1>(mean, row + r * dim, dim, dots + r);
}

template <int kRows>
inline void rotate_rows(const float* x, const float* matrix, int dim, float* y) {
  for (int column = 0; column < dim; column += kLanes) {
    Floats sum[kRows] = {};
    for (int i = 0; i < dim; i++) {
      Floats m = load<Floats>(matrix + (int64_t)i * dim + column);
      for (int r = 0; r < kRows; r++) sum[r] += m * x[(int64_t)r * dim + i];
    }
    for (int r = 0; r < kRows; r++) store(y + (int64_t)r * dim + column, sum[r]);
  }
}

void rotate(const float* x, const float* matrix, int rows, int dim, float* y) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) rotate_rows<4>(x + r * dim, matrix, dim, y + r * dim);
  for (; r < rows; r++) rotate_rows<1>(x + r * dim, matrix, dim, y + r * dim);
}

template <int kRows>
inline void accumulate_rows(const int8_t* levels, int n, int width, const float* weight,
                            int64_t stride, float* sums) {
  for (int column = 0; column < width; column += 2 * kLanes) {
    Floats low[kRows], high[kRows];
    for (int r = 0; r < kRows; r++) {
      low[r] = load<Floats>(sums + r * width + column);
      high[r] = load<Floats>(sums + r * width + column + kLanes);
    }
    for (int t = 0; t < n; t++) {
      Floats a = (Floats)Lanes::floats(levels + t * width + column);
      Floats b = (Floats)Lanes::floats(levels + t * width + column + kLanes);
      for (int r = 0; r < kRows; r++) {
        low[r] += a * weight[r * stride + t];
        high[r] += b * weight[r * stride + t];
      }
    }
    for (int r = 0; r < kRows; r++) {
      store(sums + r * width + column, low[r]);
      store(sums + r * width + column + kLanes, high[r]);
    }
  }
}

void accumulate(const int8_t* levels, int n, int width, const float* weight, int64_t stride,
                int rows, float* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    accumulate_rows<4>(levels, n, width, weight + r * stride, stride, sums + r * width);
  switch (rows - r) {
    case 3: accumulate_rows<3>(levels, n, width, weight + r * stride, stride, sums + r * width); break;
    case 2: accumulate_rows<2>(levels, n, width, weight + r * stride, stride, sums + r * width); break;
    case 1: accumulate_rows<1>(levels, n, width, weight + r * stride, stride, sums + r * width); break;
    default: break;
  }
}

void widen(const int8_t* levels, int dim, float scale, const float* mean, float* to) {
  for (int i = 0; i < dim; i += kLanes) {
    const Floats level = (Floats)Lanes::floats(levels + i) * scale;
    store(to + i, mean ? level + load<Floats>(mean + i) : level);
  }
}
