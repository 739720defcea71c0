// Score every token from the index, select the best, attend to those.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arena.h"
#include "attend.h"
#include "operators.h"
#include "parallel.h"
#include "select.h"

namespace selfindex {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kSignGain = 0.9f, kSharpness = 0.5f;
// Pages scored and tokens attended by one task: enough work to be worth a task, little enough
// to spread a short cache over threads.
constexpr int64_t kTaskSlots = 2048, kTaskTokens = 192;
// Logits of as many queries at a time as fit this many bytes, at least of one.
constexpr int64_t kMostBytes = 16 << 20;

// One new query of one KV head: the unit that selects.
struct Unit {
  Rows rows;
  int64_t query;  // which of the new ones
  int64_t budget;
  float* logits;  // [rows][slots], then votes in the first row; paper: scores [slots]
  float* tops;    // [tasks][rows], of the logits
  float* masses;  // [tasks][rows], sums of exponentials
  int32_t* slots;
  int64_t selected;
  bool broken;  // a query is not a number
  std::vector<float> weights;  // of the votes of each query head
  std::vector<Part> parts;
};

class SparseDecode {
 public:
  SparseDecode(const Kernels& kernels, const Cache& cache, const Queries& queries,
               const int32_t* budgets, int64_t width, int32_t* chosen, const Beside* beside)
      : kernels_(kernels), cache_(cache), queries_(queries), width_(width), chosen_(chosen), beside_(beside),
        groups_(static_cast<int>(queries.groups)),
        scored_(cache.layout.preset == kPaper ? 1 : groups_), slots_(cache.slots()),
        task_pages_(std::max<int64_t>(1, kTaskSlots / cache.layout.page)),
        ranges_((cache.pages + task_pages_ - 1) / task_pages_),
        selectors_(std::max(1, queries.threads)), scratch_(std::max(1, queries.threads)) {
    for (int64_t b = 0; b < cache.batch; b++)
      budgets_.push_back(std::max<int64_t>(0, std::min({int64_t{budgets[b]}, width, cache.tokens(b)})));
  }

  void run() {
    const int64_t all = cache_.batch * cache_.layout.heads * queries_.queries;
    const int64_t bytes = std::max<int64_t>(1, 4 * scored_ * slots_);
    const int64_t at_once = std::max<int64_t>(1, kMostBytes / bytes);
    for (int64_t first = 0; first < all; first += at_once)
      wave(first, std::min(all, first + at_once));
  }

 private:
  void wave(int64_t first, int64_t last) {
    units_.assign(last - first, Unit{});
    for (int64_t i = first; i < last; i++) place(units_[i - first], i);
    arena_.lay_out([&] {
      for (Unit& unit : units_) allocate(unit);
      for (AttendScratch& scratch : scratch_) scratch.allocate(arena_, groups_, kTaskTokens);
    });
    const int64_t units = last - first;
    const int64_t shares = (width_ + kTaskTokens - 1) / kTaskTokens;
    run_phases(
        queries_.threads, units,
        {{1, [&](int64_t u, int64_t, int) { units_[u].rows.prepare(kernels_, cache_); }},
         {ranges_, [&](int64_t u, int64_t range, int) { score(units_[u], range); }},
         // Scores of the paper preset are compared as they are.
         {paper() ? 0 : ranges_, [&](int64_t u, int64_t range, int) { normalise(units_[u], range); }},
         {1, [&](int64_t u, int64_t, int worker) { select(units_[u], selectors_[worker]); }},
         {shares + (beside_ ? 1 : 0),
          [&](int64_t u, int64_t i, int worker) {
            const Rows& rows = units_[u].rows;
            if (i == shares) beside_->attend(rows.row, rows.head, worker);
            else attend_share(units_[u], i, worker);
          }},
         {1, [&](int64_t u, int64_t, int) { finish(units_[u]); }}});
  }

  void attend_share(Unit& unit, int64_t share, int worker) {
    const int64_t from = share * kTaskTokens;
    if (from < unit.selected)
      attend(kernels_, cache_, unit.rows, unit.slots + from,
             std::min(kTaskTokens, unit.selected - from), scratch_[worker], unit.parts[share]);
  }

  void place(Unit& unit, int64_t i) const {
    const int64_t t = queries_.queries, head = i / t;
    unit.query = i % t;
    unit.rows.row = head / cache_.layout.heads;
    unit.rows.head = head % cache_.layout.heads;
    unit.rows.count = groups_;
    unit.rows.stride = t * cache_.layout.dim;
    unit.rows.query = queries_.query + first_row(unit) * cache_.layout.dim;
    unit.budget = budgets_[unit.rows.row];
    unit.parts.resize((unit.budget + kTaskTokens - 1) / kTaskTokens);
  }

  // Of the unit's first query head, in rows of queries and outputs; the next is `queries` further.
  int64_t first_row(const Unit& unit) const {
    return (unit.rows.row * cache_.layout.heads + unit.rows.head) * groups_ * queries_.queries +
           unit.query;
  }

  void allocate(Unit& unit) {
    unit.rows.allocate(arena_, cache_, true);
    unit.logits = arena_.take<float>(scored_ * slots_);
    unit.tops = arena_.take<float>(ranges_ * groups_);
    unit.masses = arena_.take<float>(ranges_ * groups_);
    unit.slots = arena_.take<int32_t>(unit.budget + 1);
    for (Part& part : unit.parts) part.allocate(arena_, unit.rows);
  }

  bool paper() const { return cache_.layout.preset == kPaper; }

  // The tables' sums for the mean query of the group.
  void score_paper(Unit& unit, int64_t page) const {
    const Layout& layout = cache_.layout;
    const Rows& rows = unit.rows;
    const int live = cache_.count(rows.row, page);
    float* scores = unit.logits + page * layout.page;
    std::fill(scores + live, scores + layout.page, kNone);
    if (!live) return;
    const uint8_t* codes = cache_.index_of(rows.row, page, rows.head) + layout.codes;
    constexpr int kPiece = 512;
    alignas(64) int16_t sums[2 * kPiece];
    for (int start = 0; start < live; start += kPiece) {
      const int n = std::min(kPiece, live - start);
      kernels_.lookup(codes + int64_t{start} * (layout.dim / 8), n, layout.dim / 8, rows.tables, 2, sums, kPiece);
      kernels_.join_sums(sums, sums + kPiece, n, scores + start);
    }
  }

  void score(Unit& unit, int64_t range) const {
    const Layout& layout = cache_.layout;
    Rows& rows = unit.rows;
    const float* scales = scale_values();
    const int zero = kTableZero * layout.dim / 4;
    const int64_t first = range * task_pages_, last = std::min(cache_.pages, first + task_pages_);
    if (paper()) {
      for (int64_t page = first; page < last; page++) score_paper(unit, page);
      return;
    }
    float* top = unit.tops + range * groups_;
    std::fill(top, top + groups_, kNone);
    rows.page_offsets(kernels_, cache_, first, last);
    // Of one page; pages of more tokens are done in pieces.
    constexpr int kPiece = 512;
    alignas(64) int16_t sums[4 * kPiece];
    float gain[kPiece];
    for (int64_t page = first; page < last; page++) {
      const int live = cache_.count(rows.row, page);
      for (int r = 0; r < groups_; r++) {
        float* at = unit.logits + r * slots_ + page * layout.page;
        std::fill(at + live, at + layout.page, kNone);
      }
      if (!live) continue;
      const uint8_t* index = cache_.index_of(rows.row, page, rows.head);
      const float base = float_at(index + layout.key_base) * (kSignGain * cache_.scaling);
      for (int start = 0; start < live; start += kPiece) {
        const int n = std::min(kPiece, live - start);
        for (int t = 0; t < n; t++) gain[t] = scales[index[layout.key_scale + start + t]] * base;
        for (int r = 0; r < groups_; r += 4) {
          const int some = std::min(4, groups_ - r);
          kernels_.lookup(index + layout.codes + int64_t{start} * (layout.dim / 8), n,
                          layout.dim / 8, rows.tables + int64_t{r} * layout.dim / 4 * kGroupEntries,
                          some, sums, kPiece);
          for (int k = 0; k < some; k++) {
            const float offset = rows.offsets[page * groups_ + r + k] * cache_.scaling;
            float* logits = unit.logits + (r + k) * slots_ + page * layout.page + start;
            top[r + k] = std::max(top[r + k],
                                  kernels_.to_logits(sums + k * kPiece, gain, n, zero,
                                                     rows.table_step[r + k], offset, logits));
          }
        }
      }
    }
  }

  // Logits to exponentials, whose largest of the whole row is 1.
  void normalise(Unit& unit, int64_t range) const {
    const int64_t first = range * task_pages_ * cache_.layout.page;
    const int64_t n = std::min(slots_, first + task_pages_ * cache_.layout.page) - first;
    for (int r = 0; r < groups_; r++) {
      float top = kNone;
      for (int64_t other = 0; other < ranges_; other++)
        top = std::max(top, unit.tops[other * groups_ + r]);
      if (top == kNone) top = 0;
      unit.masses[range * groups_ + r] = kernels_.exponentiate(
          unit.logits + r * slots_ + first, n, kSharpness, kSharpness * top);
    }
  }

  void select(Unit& unit, SelectScratch& scratch) const {
    if (unit.budget == 0) {
      unit.selected = 0;
      return;
    }
    if (paper()) unit.broken = std::isnan(unit.rows.table_step[0]);
    else vote(unit);
    unit.selected = top_k(kernels_, unit.logits, slots_, unit.budget, unit.slots, scratch);
  }

  // Exponentials of all query heads to votes, in the first row.
  void vote(Unit& unit) const {
    const Layout& layout = cache_.layout;
    std::vector<float>& weight = unit.weights;
    weight.assign(groups_, 0.0f);
    for (int64_t range = 0; range < ranges_; range++)
      for (int r = 0; r < groups_; r++) weight[r] += unit.masses[range * groups_ + r];
    // Votes that are not numbers select nothing; a zero as the result would hide them.
    unit.broken = std::any_of(weight.begin(), weight.end(), [](float w) { return std::isnan(w); });
    for (float& w : weight) w = 1 / std::max(w, 1e-30f);
    float* votes = unit.logits;
    kernels_.weigh(unit.logits, slots_, weight.data(), groups_, slots_, votes);
    for (int64_t page = 0; page < cache_.pages; page++)
      std::fill(votes + page * layout.page + cache_.count(unit.rows.row, page),
                votes + (page + 1) * layout.page, kNone);
  }

  void finish(Unit& unit) const {
    const int64_t row = first_row(unit), shares = (unit.selected + kTaskTokens - 1) / kTaskTokens;
    float* output = queries_.output + row * cache_.layout.dim;
    merge(kernels_, cache_, unit.rows, unit.parts.data(), shares, output, unit.rows.stride,
          queries_.lse + row, queries_.queries);
    if (unit.broken)
      for (int r = 0; r < groups_; r++) {
        std::fill_n(output + r * unit.rows.stride, cache_.layout.dim, kNan);
        queries_.lse[row + r * queries_.queries] = kNan;
      }
    if (beside_) beside_->finish(unit.rows.row, unit.rows.head);
    if (!chosen_) return;
    const int64_t place = (unit.rows.row * cache_.layout.heads + unit.rows.head) * queries_.queries +
                          unit.query;
    int32_t* to = chosen_ + place * width_;
    std::fill(std::copy(unit.slots, unit.slots + unit.selected, to), to + width_, -1);
  }

  const Kernels& kernels_;
  const Cache& cache_;
  const Queries& queries_;
  const int64_t width_;
  int32_t* const chosen_;
  const Beside* const beside_;
  const int groups_, scored_;  // query heads of a KV head, and how many scores of theirs a token has
  const int64_t slots_, task_pages_, ranges_;
  std::vector<SelectScratch> selectors_;
  std::vector<AttendScratch> scratch_;
  std::vector<int64_t> budgets_;
  std::vector<Unit> units_;
  Arena arena_;
};

}  // namespace

void sparse_decode(const Kernels& kernels, const Cache& cache, const Queries& queries,
                   const int32_t* budgets, int64_t width, int32_t* chosen, const Beside* beside) {
  cache.check();
  SparseDecode(kernels, cache, queries, budgets, width, chosen, beside).run();
}

}  // namespace selfindex
