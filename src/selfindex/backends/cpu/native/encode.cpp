// Raw pages to their planes.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {

void encode(const Kernels& kernels, const Pages& pages) {
  const Layout& layout = pages.layout;
  const int64_t dim = layout.dim, heads = layout.heads;
  const int threads = std::max(1, pages.threads);
  // Whole vectors of tokens for any instruction set.
  const int64_t tokens = (layout.page + 15) / 16 * 16;
  Arena arena;
  std::vector<float*> scratch(threads), scales(threads);
  arena.lay_out([&] {
    for (int i = 0; i < threads; i++) {
      scratch[i] = arena.take<float>(tokens * dim);
      scales[i] = arena.take<float>(tokens);
    }
  });
  parallel_for(threads, pages.count * heads, [&](int64_t i, int worker) {
    const int64_t page = i / heads, head = i % heads;
    const int live = std::min(std::max(pages.counts[page], 0), layout.page);
    kernels.encode({&layout, pages.format,
                    pages.keys.at + page * pages.keys.outer + head * pages.keys.head,
                    pages.values.at + page * pages.values.outer + head * pages.values.head,
                    pages.keys.token, pages.values.token, live,
                    pages.key_factor + page * pages.factor_stride + head * dim, pages.value_factor,
                    pages.order, pages.block,
                    pages.index + page * pages.index_stride + head * layout.index_record,
                    pages.payload + page * pages.payload_stride + head * layout.payload_record,
                    scratch[worker], scales[worker]});
  });
}

}  // namespace selfindex
