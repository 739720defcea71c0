// What an operator reads: the page format, the pools and tables, the queries.
#pragma once

#include <cstdint>

namespace selfindex {

enum Preset : int { kBalanced, kPaper };

// Channels of the paper preset that share a scale and a zero point.
constexpr int kPaperGroup = 32;

// Byte offsets of docs/format.md, as src/selfindex/codec/format.py computes them; 0 for what a preset
// does not have. Key scales are in the index record of `balanced` and in the payload record of `paper`.
struct Layout {
  int heads, dim, page, value_bits;
  int64_t index_record, codes, key_scale, mean, mean_step, key_base, value_base;
  int64_t payload_record, token, magnitudes, values, value_signs, value_scale;
  int64_t key_zero, value_zero;
  Preset preset;

  int groups() const { return (dim + kPaperGroup - 1) / kPaperGroup; }
  // Bytes of a token's scales and zero points, side by side (paper).
  int halves() const { return 8 * groups(); }
  // Numbers of a head that its pages share: the balance; or mean, alpha and codebook [dim / 4][16][4].
  int64_t constants() const { return preset == kPaper ? int64_t{18} * dim : dim; }
};

struct Cache {
  Layout layout;
  const uint8_t *index, *payload;
  int64_t index_stride, payload_stride, blocks;
  const int32_t *table, *counts;  // [batch][pages]
  int64_t batch, pages;
  const float* constants;  // [1 or batch][heads][layout.constants()]
  int64_t constants_stride;
  // x @ rotation enters / leaves the coded domain; null where that is the model's own.
  const float *key_rotation, *value_rotation;
  float scaling;

  int64_t slots() const { return pages * layout.page; }
  // Throws std::out_of_range where the table names a block that is not there.
  void check() const;
  int count(int64_t row, int64_t page) const {
    const int32_t n = counts[row * pages + page];
    return n < 0 ? 0 : n > layout.page ? layout.page : n;
  }
  int64_t tokens(int64_t row) const {
    int64_t sum = 0;
    for (int64_t page = 0; page < pages; page++) sum += count(row, page);
    return sum;
  }
  const float* constants_of(int64_t row, int64_t head) const {
    return constants + row * constants_stride + head * layout.constants();
  }
  const uint8_t* index_of(int64_t row, int64_t page, int64_t head) const {
    return index + table[row * pages + page] * index_stride + head * layout.index_record;
  }
  const uint8_t* payload_of(int64_t row, int64_t page, int64_t head) const {
    return payload + table[row * pages + page] * payload_stride + head * layout.payload_record;
  }
};

// float32 [batch][heads][groups][queries][dim], and outputs of that shape and [..., queries].
struct Queries {
  const float* query;
  int64_t groups, queries;
  int threads;
  float *output, *lse;
};

inline float float_at(const uint8_t* from) {
  float x;
  __builtin_memcpy(&x, from, 4);
  return x;
}

// Values of the 8-bit scales (docs/format.md, E4M4).
const float* scale_values();

}  // namespace selfindex
