// Reading tokens of the paper preset (docs/format.md).
#pragma once

#include <cstdint>

#include "attend.h"
#include "cache.h"
#include "kernels.h"
#include "rows.h"

namespace selfindex {

// Logits of the tokens in `slots` [n] to `scratch`.
void key_logits_paper(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
                      int64_t n, AttendScratch& scratch);

// Their values, times the weights that are in the logits' place by then, onto the part's sums.
void add_values_paper(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
                      int64_t n, const AttendScratch& scratch, Part& part);

// As `read_tokens`.
void read_tokens_paper(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                       int64_t n, int threads, float* keys, float* values);

}  // namespace selfindex
