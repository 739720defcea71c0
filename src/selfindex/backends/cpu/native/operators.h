// The operators of src/selfindex/backends/ops.py that have kernels here.
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

}  // namespace selfindex
