// Attention of the queries of one KV head over a list of encoded tokens.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cache.h"
#include "kernels.h"
#include "rows.h"

namespace selfindex {

// Attention over one share of the tokens: sums over its values, weighted by exp(logit - top).
struct Part {
  float* sums;   // [rows][width]
  float *top, *mass;  // [rows]

  void allocate(Arena& arena, const Rows& rows);
};

// Working memory of one thread.
struct AttendScratch {
  float* logits;        // [rows][most tokens of a share]
  float* value_scale;   // [most tokens of a share]
  const uint8_t** token;  // the same, where they are in the payload

  void allocate(Arena& arena, int rows, int64_t tokens);
};

// Fills `part` from the tokens in `slots` [n]; the pages' offsets in `rows` must be there.
void attend(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
            int64_t n, AttendScratch& scratch, Part& part);

// Merges parts into outputs in the model's domain: output rows `stride` floats apart, and
// log-sum-exps `lse_stride` apart; (0, -inf) where there is no token.
void merge(const Kernels& kernels, const Cache& cache, const Rows& rows, const Part* parts,
           int64_t count, float* output, int64_t stride, float* lse, int64_t lse_stride);

}  // namespace selfindex
