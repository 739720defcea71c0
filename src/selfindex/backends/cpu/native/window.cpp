// The full-precision part of a decode step.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {

void window_attend(const Kernels& kernels, const Window& w) {
  int64_t longest = 0;
  for (int64_t b = 0; b < w.batch; b++) {
    if (w.lengths[b] < 0 || w.lengths[b] >= w.room)
      throw std::out_of_range("a row has no room for the new token");
    longest = std::max<int64_t>(longest, w.lengths[b] + 1);
  }
  const int threads = std::max(1, w.threads), bytes = w.format == kFloat32 ? 4 : 2;
  const int64_t token = static_cast<int64_t>(w.dim) * bytes;
  Arena arena;
  std::vector<float*> logits(threads);
  arena.lay_out([&] {
    for (float*& some : logits) some = arena.take<float>(4 * longest);
  });
  parallel_for(threads, w.batch * w.heads, [&](int64_t i, int worker) {
    const int64_t b = i / w.heads, head = i % w.heads, first = head * w.groups;
    const int64_t row = b * w.heads * w.groups + first;
    kernels.window({w.format, w.dim, w.groups, w.lengths[b],
                    w.query.at + b * w.query.outer + first * w.query.head,
                    w.new_keys.at + b * w.new_keys.outer + head * w.new_keys.head,
                    w.new_values.at + b * w.new_values.outer + head * w.new_values.head,
                    w.query.head, w.keys + i * w.room * token, w.values + i * w.room * token,
                    w.part + row * w.dim, w.part_lse + row, w.sink ? w.sink + first : nullptr,
                    w.output + row * token, w.scaling, logits[worker]});
  });
}

}  // namespace selfindex
