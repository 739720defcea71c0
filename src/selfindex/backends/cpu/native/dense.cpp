// Attention to every encoded token.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "attend.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {
namespace {

constexpr int64_t kTaskTokens = 256;

// One KV head of one row of the batch.
struct Unit {
  Rows rows;
  int64_t tokens;
  std::vector<Part> parts;
};

}  // namespace

void dense_attend(const Kernels& kernels, const Cache& cache, const Queries& queries) {
  cache.check();
  const Layout& layout = cache.layout;
  const int rows = static_cast<int>(queries.groups * queries.queries);
  const int64_t units_count = cache.batch * layout.heads;
  // Slots of the tokens of each row of the batch, short pages closed up.
  std::vector<std::vector<int32_t>> slots(cache.batch);
  int64_t shares = 0;
  for (int64_t b = 0; b < cache.batch; b++) {
    for (int64_t page = 0; page < cache.pages; page++)
      for (int t = 0; t < cache.count(b, page); t++)
        slots[b].push_back(static_cast<int32_t>(page * layout.page + t));
    shares = std::max<int64_t>(shares, (slots[b].size() + kTaskTokens - 1) / kTaskTokens);
  }
  std::vector<Unit> units(units_count);
  std::vector<AttendScratch> scratch(std::max(1, queries.threads));
  thread_local Arena arena;
  for (int64_t i = 0; i < units_count; i++) {
    Unit& unit = units[i];
    unit.rows.row = i / layout.heads;
    unit.rows.head = i % layout.heads;
    unit.rows.count = rows;
    unit.rows.stride = layout.dim;
    unit.rows.query = queries.query + i * rows * layout.dim;
    unit.tokens = slots[unit.rows.row].size();
    unit.parts.resize((unit.tokens + kTaskTokens - 1) / kTaskTokens);
  }
  arena.lay_out([&] {
    for (Unit& unit : units) {
      unit.rows.allocate(arena, cache, false);
      for (Part& part : unit.parts) part.allocate(arena, unit.rows);
    }
    for (AttendScratch& some : scratch) some.allocate(arena, rows, kTaskTokens);
  });
  run_phases(queries.threads, units_count,
             {{1,
               [&](int64_t u, int64_t, int) {
                 units[u].rows.prepare(kernels, cache);
                 units[u].rows.page_offsets(kernels, cache, 0, cache.pages);
               }},
              {shares,
               [&](int64_t u, int64_t i, int worker) {
                 Unit& unit = units[u];
                 const int64_t from = i * kTaskTokens;
                 if (from < unit.tokens)
                   attend(kernels, cache, unit.rows, slots[unit.rows.row].data() + from,
                          std::min(kTaskTokens, unit.tokens - from), scratch[worker],
                          unit.parts[i]);
               }},
              {1, [&](int64_t u, int64_t, int) {
                 const Unit& unit = units[u];
                 merge(kernels, cache, unit.rows, unit.parts.data(), unit.parts.size(),
                       queries.output + u * rows * layout.dim, layout.dim, queries.lse + u * rows, 1);
               }}});
}

}  // namespace selfindex
