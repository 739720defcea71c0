// The operators of src/selfindex/backends/operators that have kernels here.
#pragma once

#include <cstdint>

#include "cache.h"
#include "kernels.h"

namespace selfindex {

// budgets [batch]; at most `width` tokens a row are read. `chosen`, unless null, receives the
// selected slots, int32 [batch][heads][queries][width], -1 beyond.
void sparse_decode(const Kernels& kernels, const Cache& cache, const Queries& queries,
                   const int32_t* budgets, int64_t width, int32_t* chosen);

void dense_attend(const Kernels& kernels, const Cache& cache, const Queries& queries);

// Decodes the tokens in `slots` [n] of a row in the coded domain: keys, values [heads][n][dim].
void read_tokens(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                 int64_t n, int threads, float* keys, float* values);

// A tensor [outer][heads][tokens][dim] with adjacent channels; strides in bytes.
struct Strided {
  const uint8_t* at;
  int64_t outer, head, token;
};

struct Pages {
  Layout layout;
  Format format;
  int64_t count;
  Strided keys, values;     // [count][heads][page][dim]
  const int32_t* counts;  // [count], tokens of each page
  const float* key_factor;  // [1 or count][heads][dim]
  int64_t factor_stride;
  const float* value_factor;  // [dim]
  int order;                  // see EncodeRecord
  const float* block;
  uint8_t *index, *payload;  // zeros
  int64_t index_stride, payload_stride;
  int threads;
};

// Everything but the pages' counts.
void encode(const Kernels& kernels, const Pages& pages);

struct Window {
  Format format;
  int64_t batch, heads, room;
  int groups, dim;
  Strided query;  // [batch][heads * groups][1][dim]
  Strided new_keys, new_values;  // [batch][heads][1][dim]
  uint8_t *keys, *values;      // [batch][heads][room][dim]
  const int32_t* lengths;      // [batch]
  const float *part, *part_lse, *sink;  // [batch][heads * groups][dim] and [..], [heads * groups]
  uint8_t* output;                      // [batch][heads * groups][dim]
  float scaling;
  int threads;
};

// Throws std::out_of_range where a row has no room for its new token.
void window_attend(const Kernels& kernels, const Window& window);

}  // namespace selfindex
