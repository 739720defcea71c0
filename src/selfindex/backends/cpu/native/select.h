// Exact top-k.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace selfindex {

// Reused from call to call.
struct SelectScratch {
  std::vector<float> maxima, best;
  std::vector<int32_t> candidates;
};

// The `count` best scores of n, equal ones decided for the lower index, written in ascending order
// to `chosen` (room for count + 1). Scores of -inf and those that are not numbers are never chosen.
// Returns how many were.
int64_t top_k(const Kernels& kernels, const float* scores, int64_t n, int64_t count,
              int32_t* chosen, SelectScratch& scratch);

}  // namespace selfindex
