#include "attend.h"

#include "operators.h"
#include "paper.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace selfindex {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The level of code c at c and 4 c, as `Kernels::expand` wants it.
constexpr int8_t kEightLevels[16] = {13, 40, 71, 114, 40, 0, 0, 0, 71, 0, 0, 0, 114, 0, 0, 0};
// Twice (code - 1.5).
constexpr int8_t kFourLevels[16] = {-3, -1, 1, 3, -1, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0};

// Where the tokens of a tile lie.
struct Tile {
  const uint8_t *codes[kTile], *token[kTile];
  const uint8_t* index[kTile];
  int64_t page[kTile];
  float key_scale[kTile], value_scale[kTile];
};

// Finds tokens one after the other; most are in the page of the one before.
class Locator {
 public:
  Locator(const Cache& cache, int64_t row, int64_t head) : cache_(cache), row_(row), head_(head) {}

  void locate(const int32_t* slots, int n, Tile& tile) {
    const Layout& layout = cache_.layout;
    for (int t = 0; t < n; t++) {
      if (static_cast<uint32_t>(slots[t]) - static_cast<uint32_t>(first_) >= static_cast<uint32_t>(layout.page)) turn_to(slots[t] / layout.page);
      const int64_t at = slots[t] - first_;
      tile.page[t] = page_;
      tile.index[t] = index_;
      tile.codes[t] = index_ + layout.codes + at * (layout.dim / 8);
      tile.token[t] = payload_ + at * layout.token;
      tile.key_scale[t] = scales_[index_[layout.key_scale + at]] * key_base_;
      tile.value_scale[t] = scales_[payload_[layout.value_scale + at]] * value_base_;
      __builtin_prefetch(tile.codes[t]);
      __builtin_prefetch(tile.token[t]);
      __builtin_prefetch(tile.token[t] + layout.token - 1);
    }
  }

 private:
  void turn_to(int32_t page) {
    const Layout& layout = cache_.layout;
    page_ = page;
    first_ = page * layout.page;
    index_ = cache_.index_of(row_, page, head_);
    payload_ = cache_.payload_of(row_, page, head_);
    key_base_ = float_at(index_ + layout.key_base) / kUnits;
    value_base_ = float_at(index_ + layout.value_base) * (layout.value_bits == 3 ? 1.0f / kUnits : 0.5f);
  }

  const Cache& cache_;
  const int64_t row_, head_;
  const float* const scales_ = scale_values();
  int32_t page_ = -1, first_ = std::numeric_limits<int32_t>::min();
  const uint8_t *index_ = nullptr, *payload_ = nullptr;
  float key_base_ = 0, value_base_ = 0;
};

// -inf of nothing; skips what is not a number.
float largest(const Kernels& kernels, const float* x, int64_t n) {
  constexpr int64_t kParts = 32;
  float maxima[kParts], top = kNone;
  const int64_t whole = n / kParts * kParts;
  if (whole) {
    kernels.maxima(x, n / kParts, kParts, maxima);
    for (const float part : maxima) top = std::max(top, part);
  }
  for (int64_t i = whole; i < n; i++) top = std::max(top, x[i]);
  return top;
}

}  // namespace

void Part::allocate(Arena& arena, const Rows& rows) {
  sums = arena.take<float>(static_cast<int64_t>(rows.count) * rows.width);
  top = arena.take<float>(rows.count);
  mass = arena.take<float>(rows.count);
}

void AttendScratch::allocate(Arena& arena, int rows, int64_t tokens) {
  logits = arena.take<float>(rows * tokens);
  value_scale = arena.take<float>(tokens);
  token = arena.take<const uint8_t*>(tokens);
}

namespace {

void key_logits(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
                int64_t n, AttendScratch& scratch) {
  const Layout& layout = cache.layout;
  const int width = rows.width;
  alignas(64) int8_t levels[kTile * kMaxDim];
  int32_t dots[kTile * 4];
  const uint8_t* crumbs[kTile];
  Tile tiles[2];
  Locator locator(cache, rows.row, rows.head);

  if (n) locator.locate(slots, static_cast<int>(std::min<int64_t>(kTile, n)), tiles[0]);
  for (int64_t start = 0; start < n; start += kTile) {
    const int live = static_cast<int>(std::min<int64_t>(kTile, n - start));
    const Tile& tile = tiles[start / kTile % 2];
    // Memory of the next tile is on its way while this one is computed.
    if (start + kTile < n)
      locator.locate(slots + start + kTile, static_cast<int>(std::min<int64_t>(kTile, n - start - kTile)),
                     tiles[(start / kTile + 1) % 2]);
    for (int t = 0; t < live; t++) crumbs[t] = tile.token[t] + layout.magnitudes;
    std::copy(tile.value_scale, tile.value_scale + live, scratch.value_scale + start);
    std::copy(tile.token, tile.token + live, scratch.token + start);
    kernels.expand(crumbs, tile.codes, live, width, kEightLevels, levels);
    for (int r = 0; r < rows.count; r += 4) {
      const int some = std::min(4, rows.count - r);
      kernels.level_dots(levels, live, width, rows.whole + static_cast<int64_t>(r) * width, some,
                         dots);
      for (int k = 0; k < some; k++) {
        float offset[kTile];
        for (int t = 0; t < live; t++) offset[t] = rows.offsets[tile.page[t] * rows.count + r + k];
        kernels.dot_logits(dots + k * kTile, tile.key_scale, offset, live, rows.whole_step[r + k],
                           cache.scaling, scratch.logits + (r + k) * n + start);
      }
    }
  }

}

void add_values(const Kernels& kernels, const Cache& cache, const Rows& rows, int64_t n,
                const AttendScratch& scratch, Part& part) {
  const Layout& layout = cache.layout;
  const bool signed_values = layout.value_bits == 3;
  const int width = rows.width;
  alignas(64) int8_t levels[kTile * kMaxDim];
  const uint8_t *crumbs[kTile], *signs[kTile];
  for (int r = 0; r < rows.count; r++)
    for (int64_t t = 0; t < n; t++) scratch.logits[r * n + t] *= scratch.value_scale[t];
  for (int64_t start = 0; start < n; start += kTile) {
    const int live = static_cast<int>(std::min<int64_t>(kTile, n - start));
    for (int t = 0; t < live; t++) {
      crumbs[t] = scratch.token[start + t] + layout.values;
      signs[t] = scratch.token[start + t] + layout.value_signs;
    }
    kernels.expand(crumbs, signed_values ? signs : nullptr, live, width,
                   signed_values ? kEightLevels : kFourLevels, levels);
    kernels.accumulate(levels, live, width, scratch.logits + start, n, rows.count, part.sums);
  }
}

}  // namespace

void attend(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
            int64_t n, AttendScratch& scratch, Part& part) {
  const bool paper = cache.layout.preset == kPaper;
  if (paper) key_logits_paper(kernels, cache, rows, slots, n, scratch);
  else key_logits(kernels, cache, rows, slots, n, scratch);
  for (int r = 0; r < rows.count; r++) {
    float* logits = scratch.logits + r * n;
    part.top[r] = largest(kernels, logits, n);
    part.mass[r] = n ? kernels.exponentiate(logits, n, 1.0f, part.top[r]) : 0.0f;
  }
  std::fill(part.sums, part.sums + static_cast<int64_t>(rows.count) * rows.width, 0.0f);
  if (paper) add_values_paper(kernels, cache, rows, slots, n, scratch, part);
  else add_values(kernels, cache, rows, n, scratch, part);
}

void read_tokens(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                 int64_t n, int threads, float* keys, float* values) {
  const Layout& layout = cache.layout;
  if (layout.preset == kPaper) return read_tokens_paper(kernels, cache, row, slots, n, threads, keys, values);
  const int dim = layout.dim, width = padded(dim);
  const bool signed_values = layout.value_bits == 3;
  const int64_t tiles = (n + kTile - 1) / kTile, share = 8;  // tiles of a task
  const int64_t shares = (tiles + share - 1) / share;
  parallel_for(threads, layout.heads * shares, [&](int64_t i, int) {
    const int64_t head = i / shares;
    Locator locator(cache, row, head);
    alignas(64) int8_t levels[kTile * kMaxDim];
    alignas(64) float mean[kMaxDim];
    const uint8_t *crumbs[kTile], *signs[kTile], *index = nullptr;
    Tile tile;
    const int64_t first = i % shares * share * kTile, last = std::min(n, first + share * kTile);
    for (int64_t start = first; start < last; start += kTile) {
      const int live = static_cast<int>(std::min<int64_t>(kTile, last - start));
      const int64_t to = (head * n + start) * dim;
      locator.locate(slots + start, live, tile);
      for (int t = 0; t < live; t++) crumbs[t] = tile.token[t] + layout.magnitudes;
      kernels.expand(crumbs, tile.codes, live, width, kEightLevels, levels);
      for (int t = 0; t < live; t++) {
        if (tile.index[t] != index) {
          index = tile.index[t];
          kernels.widen(reinterpret_cast<const int8_t*>(index + layout.mean), dim,
                        float_at(index + layout.mean_step), nullptr, mean);
        }
        kernels.widen(levels + t * width, dim, tile.key_scale[t], mean, keys + to + int64_t{t} * dim);
      }
      for (int t = 0; t < live; t++) {
        crumbs[t] = tile.token[t] + layout.values;
        signs[t] = tile.token[t] + layout.value_signs;
      }
      kernels.expand(crumbs, signed_values ? signs : nullptr, live, width,
                     signed_values ? kEightLevels : kFourLevels, levels);
      for (int t = 0; t < live; t++)
        kernels.widen(levels + t * width, dim, tile.value_scale[t], nullptr, values + to + int64_t{t} * dim);
    }
  });
}

void merge(const Kernels& kernels, const Cache& cache, const Rows& rows, const Part* parts,
           int64_t count, float* output, int64_t stride, float* lse, int64_t lse_stride) {
  const int dim = cache.layout.dim, width = rows.width;
  float sum[kMaxDim], left[kMaxDim];
  for (int r = 0; r < rows.count; r++) {
    float top = kNone, mass = 0;
    for (int64_t p = 0; p < count; p++) top = std::max(top, parts[p].top[r]);
    // A maximum skips what is not a number; the result must not.
    for (int64_t p = 0; p < count; p++)
      if (std::isnan(parts[p].mass[r])) top = parts[p].mass[r];
    std::fill(sum, sum + dim, 0.0f);
    for (int64_t p = 0; p < count && top != kNone; p++) {
      const float weight = std::exp(parts[p].top[r] - top);
      mass += weight * parts[p].mass[r];
      for (int i = 0; i < dim; i++)
        sum[i] += weight * parts[p].sums[static_cast<int64_t>(r) * width + i];
    }
    if (mass > 0)
      for (int i = 0; i < dim; i++) sum[i] /= mass;
    if (cache.value_rotation) kernels.rotate(sum, cache.value_rotation, 1, dim, left);
    std::copy_n(cache.value_rotation ? left : sum, dim, output + r * stride);
    lse[r * lse_stride] = top == kNone ? kNone : top + std::log(mass);
  }
}

}  // namespace selfindex
