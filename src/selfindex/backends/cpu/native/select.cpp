#include "select.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace selfindex {
namespace {

// Scores that are split into `count` parts or more have at least `count` that reach the count-th
// largest of the parts' maxima. The more parts, the closer that is to the count-th largest score.
float lower_bound(const Kernels& kernels, const float* scores, int64_t n, int64_t count,
                  std::vector<float>& maxima) {
  constexpr float lowest = std::numeric_limits<float>::lowest();  // not the -inf of empty slots
  const int64_t size = std::min<int64_t>(n / count, 16);
  if (size < 2) return lowest;
  const int64_t parts = n / size;
  maxima.resize(parts);
  kernels.maxima(scores, size, parts, maxima.data());
  std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<float>());
  return std::max(lowest, maxima[count - 1]);
}

}  // namespace

int64_t top_k(const Kernels& kernels, const float* scores, int64_t n, int64_t count,
              int32_t* chosen, SelectScratch& scratch) {
  count = std::min(count, n);
  if (count <= 0) return 0;
  scratch.candidates.resize(n);
  int32_t* candidates = scratch.candidates.data();
  const int64_t found = kernels.reaching(
      scores, n, lower_bound(kernels, scores, n, count, scratch.maxima), candidates);
  count = std::min(count, found);
  if (count == 0) return 0;
  std::vector<float>& best = scratch.best;
  best.resize(found);
  for (int64_t i = 0; i < found; i++) best[i] = scores[candidates[i]];
  std::nth_element(best.begin(), best.begin() + count - 1, best.end(), std::greater<float>());
  const float last = best[count - 1];
  int64_t ties = 0;
  for (int64_t i = 0; i < count; i++) ties += best[i] == last;

  int64_t taken = 0;
  for (int64_t i = 0; i < found; i++) {
    const float score = scores[candidates[i]];
    const bool tie = score == last;
    chosen[taken] = candidates[i];
    taken += (score > last) | (tie & (ties > 0));
    ties -= tie;
  }
  return taken;
}

}  // namespace selfindex
