// The inner loops, compiled once per instruction set; `kernels_named` finds them at run time.
#pragma once

#include <cstdint>

#include "cache.h"

namespace selfindex {

constexpr int kMaxDim = 256;
constexpr int kGroupEntries = 16;
// Table entries are kTableZero + round(entry / step), at most 127, so that the entries of two
// groups add up in a byte.
constexpr int kTableLevels = 63;
constexpr int kTableZero = 64;
// Integer steps of one unit of the 8-level quantiser (docs/format.md).
constexpr int kUnits = 53;
constexpr int kTile = 16;
// Largest Hadamard matrix that is not made by doubling.
constexpr int kMaxOrder = 20;

enum Format : int { kFloat32, kBFloat16, kFloat16 };

// One KV head of a page to encode. Strides are bytes from one token to the next.
struct EncodeRecord {
  const Layout* layout;
  Format format;
  const uint8_t *keys, *values;
  int64_t key_stride, value_stride;
  int live;                                 // tokens
  const float* constants;                   // of the head: balanced: as value_factor; paper: mean, alpha
  const float* value_factor;                // [dim], balanced: what channels are multiplied by before H
  int order;                                // of `block`, 1 for none
  const float* block;                       // [order][order]
  uint8_t *index, *payload;                 // records, zeros
  float *scratch, *scales;                  // [tokens padded][dim] and [tokens padded]
};

// Attention to the full-precision tokens of one KV head of a row; the queries are `groups`,
// `query_stride` bytes apart.
struct WindowHead {
  Format format;
  int dim, groups;
  const uint8_t* query;
  int64_t query_stride;
  const uint8_t *keys, *values;
  const int64_t* tokens;  // [count], bytes from `keys` and `values` to each token
  int count;
  float scaling;
  float* logits;           // [4][count]
  float *sums;             // [groups][dim], of the values, weighted by exp(logit - top)
  float *top, *mass;       // [groups]
};

// Its output, merged with attention to encoded tokens and a learned sink.
struct WindowMerge {
  Format format;
  int dim, groups;
  const float *sums, *top, *mass;       // as above
  const float *part, *part_lse, *sink;  // [groups][dim], [groups], [groups] or null
  uint8_t* output;                      // [groups][dim]
};

// Tokens of the paper preset: 2-bit codes, and a scale and a zero point for kPaperGroup channels each.
struct GroupedTokens {
  const uint8_t* const* crumbs;  // [n]
  const uint8_t* const* signs;   // [n], or null
  const float *scale, *zero;     // [n][groups]
  int n, dim;
};

// Channels padded to whole steps of the decoder. Padding channels hold arbitrary bytes.
inline int padded(int dim) { return (dim + 31) / 32 * 32; }

struct Kernels {
  const char* name;

  // sums[r][t] = sum of table entries of token t in the tables of row r.
  // codes [tokens][bytes], tables [rows][2 * bytes][16], sums [rows][stride], stride >= tokens.
  void (*lookup)(const uint8_t* codes, int tokens, int bytes, const uint8_t* tables, int rows,
                 int16_t* sums, int64_t stride);

  // logits[t] = (sums[t] - zero) * gain[t] * factor + offset; returns the largest.
  float (*to_logits)(const int16_t* sums, const float* gain, int n, int zero, float factor,
                     float offset, float* logits);

  // x[i] = exp(factor * x[i] - shift); returns the sum. Arguments of exp are at most 0.
  float (*exponentiate)(float* x, int64_t n, float factor, float shift);

  // votes[i] = sum over rows r of weight[r] * x[r][i].
  void (*weigh)(const float* x, int64_t stride, const float* weight, int rows, int64_t n,
                float* votes);

  // maxima[i] = the largest of scores[i + j * parts], j < size.
  void (*maxima)(const float* scores, int64_t size, int64_t parts, float* maxima);

  // scores[t] = 128 * high[t] + low[t].
  void (*join_sums)(const int16_t* high, const int16_t* low, int n, float* scores);

  // Indices of the scores that are at least `threshold`, ascending, to `found` [n]; returns how many.
  int64_t (*reaching)(const float* scores, int64_t n, float threshold, int32_t* found);

  // dots[r] = row[r] . mean, int8 mean [dim], rows [rows][dim].
  void (*mean_dots)(const int8_t* mean, const float* row, int rows, int dim, float* dots);

  // y = x @ matrix, x and y [rows][dim], matrix [dim][dim].
  void (*rotate)(const float* x, const float* matrix, int rows, int dim, float* y);

  // Levels of n tokens from 2-bit codes and, unless null, sign bits: levels [n][width], width
  // a multiple of 32. magnitudes[16] holds the level of code c at c and 4 c.
  void (*expand)(const uint8_t* const* crumbs, const uint8_t* const* signs, int n, int width,
                 const int8_t* magnitudes, int8_t* levels);

  // dots[r][t] = row[r] . levels[t]; rows int16 [rows][width], dots int32 [rows][kTile].
  void (*level_dots)(const int8_t* levels, int n, int width, const int16_t* row, int rows,
                     int32_t* dots);

  // logits[t] = (dots[t] * step * scale[t] + offset[t]) * factor.
  void (*dot_logits)(const int32_t* dots, const float* scale, const float* offset, int n, float step,
                     float factor, float* logits);

  // sums[r] += sum over t of weight[r][t] * levels[t]; weight rows are `stride` apart.
  void (*accumulate)(const int8_t* levels, int n, int width, const float* weight, int64_t stride,
                     int rows, float* sums);

  // to[i] = levels[i] * scale + mean[i]; `mean` may be null.
  void (*widen)(const int8_t* levels, int dim, float scale, const float* mean, float* to);

  // Of the paper preset. What a token's channels are: x = zero + scale * code, or -x where the sign bit
  // is not set.

  // dots[r][t] = row[r] . x[t]; rows [rows][dim], dots [rows][kTile].
  void (*grouped_dots)(const GroupedTokens& tokens, const float* row, int rows, float* dots);

  // sums[r] += sum over t of weight[r][t] * x[t]; rows of weights and sums are as far apart as said.
  void (*grouped_sums)(const GroupedTokens& tokens, const float* weight, int64_t weight_stride, int rows,
                       float* sums, int64_t sums_stride);

  // to[t] = x[t] * factor + add, [dim] each; or x[t] where these are null.
  void (*grouped_widen)(const GroupedTokens& tokens, const float* factor, const float* add, float* to);

  void (*encode)(const EncodeRecord& record);

  void (*encode_paper)(const EncodeRecord& record);

  // sums[i] += channel i of n tokens, `stride` bytes apart.
  void (*channel_sums)(const uint8_t* tokens, Format format, int64_t stride, int64_t n, int dim, float* sums);

  // Of n tokens less the mean [dim]: alpha[i], the largest magnitude, where it grows; and for every code
  // of 4 channels the sum of those that have it, sums [dim / 4][16][4], and how many, members [dim / 4][16].
  void (*code_sums)(const uint8_t* tokens, Format format, int64_t stride, int64_t n, int dim,
                    const float* mean, float* alpha, float* sums, int32_t* members);

  void (*window)(const WindowHead& head);

  // 0 where no part has a token.
  void (*window_merge)(const WindowMerge& merge);

  // n numbers of a format to float32; n is a multiple of 16.
  void (*to_floats)(const uint8_t* from, Format format, int n, float* to);
};

// The named instruction set ("generic", "avx2", "avx512", "neon"), null where it cannot run here.
const Kernels* kernels_named(const char* name);

}  // namespace selfindex
