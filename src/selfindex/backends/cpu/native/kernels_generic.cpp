// Plain C++ for any processor.
#include "kernels.h"

namespace selfindex {
namespace generic {
namespace {

constexpr int kLanes = 8;
struct Lanes {
  template <class T>
  static auto floats(const T* from) {
    typedef float Result __attribute__((vector_size(4 * kLanes)));
    Result result;
    for (int i = 0; i < kLanes; i++) result[i] = from[i];
    return result;
  }
  static unsigned at_least(const float* from, float threshold) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= (unsigned)(from[i] >= threshold) << i;
    return bits;
  }
  template <class V>
  static void interleave(V a, V b, V& low, V& high) {
    for (int i = 0; i < kLanes / 2; i++) {
      low[2 * i] = a[i], low[2 * i + 1] = b[i];
      high[2 * i] = a[i + kLanes / 2], high[2 * i + 1] = b[i + kLanes / 2];
    }
  }
};
#include "kernels_body.h"
#include "formats_body.h"
#include "encode_body.h"
#include "paper_body.h"
#include "window_body.h"

void lookup(const uint8_t* codes, int tokens, int bytes, const uint8_t* tables, int rows,
            int16_t* sums, int64_t stride) {
  for (int r = 0; r < rows; r++) {
    const uint8_t* table = tables + (int64_t)r * bytes * 2 * kGroupEntries;
    for (int t = 0; t < tokens; t++) {
      int sum = 0;
      for (int j = 0; j < bytes; j++) {
        const int code = codes[t * bytes + j];
        sum += table[2 * j * kGroupEntries + (code & 15)];
        sum += table[(2 * j + 1) * kGroupEntries + (code >> 4)];
      }
      sums[r * stride + t] = (int16_t)sum;
    }
  }
}

void expand(const uint8_t* const* crumbs, const uint8_t* const* signs, int n, int width,
            const int8_t* magnitudes, int8_t* levels) {
  for (int t = 0; t < n; t++) {
    for (int i = 0; i < width; i++) {
      const int8_t level = magnitudes[crumbs[t][i / 4] >> (2 * (i % 4)) & 3];
      const bool negative = signs && !(signs[t][i / 8] >> (i % 8) & 1);
      levels[t * width + i] = negative ? (int8_t)-level : level;
    }
  }
}

void level_dots(const int8_t* levels, int n, int width, const int16_t* row, int rows,
                int32_t* dots) {
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < n; t++) {
      int32_t sum = 0;
      for (int i = 0; i < width; i++) sum += levels[t * width + i] * row[r * width + i];
      dots[r * kTile + t] = sum;
    }
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {"generic", lookup, to_logits, exponentiate, weigh, maxima, join_sums, reaching,
                         mean_dots, rotate, expand, level_dots, dot_logits, accumulate, widen,
                         grouped_dots, grouped_sums, grouped_widen, encode, encode_paper,
                         channel_sums, code_sums, window, window_merge, to_floats};

}  // namespace generic
}  // namespace selfindex
