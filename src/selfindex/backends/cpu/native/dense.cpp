// Attention to every encoded token.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "attend.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {
namespace {

// Tokens of a task, and tasks of a KV head: with more tokens there are more to a task.
constexpr int64_t kTaskTokens = 256, kMostShares = 128;
// Results of tasks at a time, at least those of one KV head.
constexpr int64_t kMostBytes = 16 << 20;

// One KV head of one row of the batch.
struct Unit {
  int64_t number;
  Rows rows;
  int64_t tokens;
  std::vector<Part> parts;
};

}  // namespace

void dense_attend(const Kernels& kernels, const Cache& cache, const Queries& queries, const Beside* beside) {
  cache.check();
  const Layout& layout = cache.layout;
  const int rows = static_cast<int>(queries.groups * queries.queries);
  // Slots of the tokens of each row of the batch, short pages closed up.
  std::vector<std::vector<int32_t>> slots(cache.batch);
  int64_t longest = 0;
  for (int64_t b = 0; b < cache.batch; b++) {
    for (int64_t page = 0; page < cache.pages; page++)
      for (int t = 0; t < cache.count(b, page); t++)
        slots[b].push_back(static_cast<int32_t>(page * layout.page + t));
    longest = std::max<int64_t>(longest, slots[b].size());
  }
  const int64_t share = std::max(kTaskTokens, (longest + kMostShares - 1) / kMostShares);
  const int64_t shares = (longest + share - 1) / share;
  const int64_t bytes = 4 * rows * (shares * padded(layout.dim) + cache.pages);
  const int64_t all = cache.batch * layout.heads;
  const int64_t at_once = std::min(all, std::max<int64_t>(1, kMostBytes / std::max<int64_t>(1, bytes)));
  std::vector<Unit> units(at_once);
  std::vector<AttendScratch> scratch(std::max(1, queries.threads));
  Arena arena;
  for (int64_t first = 0; first < all; first += at_once) {
    const int64_t count = std::min(at_once, all - first);
    for (int64_t u = 0; u < count; u++) {
      Unit& unit = units[u];
      unit.number = first + u;
      unit.rows.row = unit.number / layout.heads;
      unit.rows.head = unit.number % layout.heads;
      unit.rows.count = rows;
      unit.rows.stride = layout.dim;
      unit.rows.query = queries.query + unit.number * rows * layout.dim;
      unit.tokens = slots[unit.rows.row].size();
      unit.parts.resize((unit.tokens + share - 1) / share);
    }
    arena.lay_out([&] {
      for (int64_t u = 0; u < count; u++) {
        units[u].rows.allocate(arena, cache, false);
        for (Part& part : units[u].parts) part.allocate(arena, units[u].rows);
      }
      for (AttendScratch& some : scratch) some.allocate(arena, rows, share);
    });
    run_phases(queries.threads, count,
               {{1,
                 [&](int64_t u, int64_t, int) {
                   units[u].rows.prepare(kernels, cache);
                   units[u].rows.page_offsets(kernels, cache, 0, cache.pages);
                 }},
                {shares + (beside ? 1 : 0),
                 [&](int64_t u, int64_t i, int worker) {
                   Unit& unit = units[u];
                   if (i == shares) return beside->attend(unit.rows.row, unit.rows.head, worker);
                   const int64_t from = i * share;
                   if (from < unit.tokens)
                     attend(kernels, cache, unit.rows, slots[unit.rows.row].data() + from,
                            std::min(share, unit.tokens - from), scratch[worker], unit.parts[i]);
                 }},
                {1, [&](int64_t u, int64_t, int) {
                   const Unit& unit = units[u];
                   const int64_t to = unit.number * rows;
                   merge(kernels, cache, unit.rows, unit.parts.data(), unit.parts.size(),
                         queries.output + to * layout.dim, layout.dim, queries.lse + to, 1);
                   if (beside) beside->finish(unit.rows.row, unit.rows.head);
                 }}});
  }
}

}  // namespace selfindex
