#include "paper.h"

#include "parallel.h"

#include <algorithm>
#include <cstring>

namespace selfindex {
namespace {

constexpr int kMostGroups = kMaxDim / kPaperGroup;

// Where the tokens of a tile lie: keys or values.
class Tile {
 public:
  // Finds tokens and has their memory fetched.
  void locate(const Cache& cache, int64_t row, int64_t head, const int32_t* slots, int n, bool keys) {
    const Layout& layout = cache.layout;
    const int64_t halves = layout.halves();
    n_ = n;
    for (int t = 0; t < n; t++) {
      const uint32_t slot = static_cast<uint32_t>(slots[t]), size = static_cast<uint32_t>(layout.page);
      const uint32_t page = slot / size, at = slot % size;
      const uint8_t* payload = cache.payload_of(row, page, head);
      crumbs_[t] = payload + at * layout.token + (keys ? layout.magnitudes : layout.values);
      scales_[t] = payload + (keys ? layout.key_scale : layout.value_scale) + at * halves;
      zeros_[t] = payload + (keys ? layout.key_zero : layout.value_zero) + at * halves;
      __builtin_prefetch(crumbs_[t]);
      __builtin_prefetch(scales_[t]);
      __builtin_prefetch(zeros_[t]);
      if (!keys) continue;
      signs_[t] = cache.index_of(row, page, head) + layout.codes + at * static_cast<int64_t>(layout.dim / 8);
      __builtin_prefetch(signs_[t]);
      // Values come next, from the same places.
      __builtin_prefetch(payload + at * layout.token + layout.values);
      __builtin_prefetch(payload + layout.value_scale + at * halves);
      __builtin_prefetch(payload + layout.value_zero + at * halves);
    }
    keys_ = keys;
  }

  GroupedTokens tokens(const Kernels& kernels, const Layout& layout) {
    floats(kernels, layout, scales_, scale_);
    floats(kernels, layout, zeros_, zero_);
    return {crumbs_, keys_ ? signs_ : nullptr, scale_, zero_, n_, layout.dim};
  }

 private:
  void floats(const Kernels& kernels, const Layout& layout, const uint8_t* const* from, float* to) const {
    alignas(64) uint16_t halves[kTile * kMostGroups];
    const int groups = layout.groups();
    for (int t = 0; t < n_; t++) std::memcpy(halves + t * groups, from[t], 2 * groups);
    const int all = n_ * groups, whole = (all + 15) / 16 * 16;
    std::memset(halves + all, 0, 2 * (whole - all));
    kernels.to_floats(reinterpret_cast<const uint8_t*>(halves), kFloat16, whole, to);
  }

  const uint8_t *crumbs_[kTile], *signs_[kTile], *scales_[kTile], *zeros_[kTile];
  alignas(64) float scale_[kTile * kMostGroups], zero_[kTile * kMostGroups];
  int n_ = 0;
  bool keys_ = false;
};

int tile_size(int64_t left) { return static_cast<int>(std::min<int64_t>(kTile, left)); }

}  // namespace

void key_logits_paper(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
                      int64_t n, AttendScratch& scratch) {
  float dots[kTile * 4];
  Tile tiles[2];
  const auto locate = [&](int64_t start) {
    if (start < n)
      tiles[start / kTile % 2].locate(cache, rows.row, rows.head, slots + start, tile_size(n - start), true);
  };
  locate(0);
  for (int64_t start = 0; start < n; start += kTile) {
    // Memory of the next tile is on its way while this one is computed.
    locate(start + kTile);
    const GroupedTokens tokens = tiles[start / kTile % 2].tokens(kernels, cache.layout);
    for (int r = 0; r < rows.count; r += 4) {
      const int some = std::min(4, rows.count - r);
      kernels.grouped_dots(tokens, rows.mapped + int64_t{r} * cache.layout.dim, some, dots);
      for (int k = 0; k < some; k++)
        for (int t = 0; t < tokens.n; t++)
          scratch.logits[(r + k) * n + start + t] = (dots[k * kTile + t] + rows.offsets[r + k]) * cache.scaling;
    }
  }
}

void add_values_paper(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
                      int64_t n, const AttendScratch& scratch, Part& part) {
  Tile tile;
  for (int64_t start = 0; start < n; start += kTile) {
    tile.locate(cache, rows.row, rows.head, slots + start, tile_size(n - start), false);
    kernels.grouped_sums(tile.tokens(kernels, cache.layout), scratch.logits + start, n, rows.count, part.sums,
                         rows.width);
  }
}

void read_tokens_paper(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                       int64_t n, int threads, float* keys, float* values) {
  const Layout& layout = cache.layout;
  constexpr int64_t kShare = 8 * kTile;  // tokens of a task
  const int64_t shares = (n + kShare - 1) / kShare;
  parallel_for(threads, layout.heads * shares, [&](int64_t i, int) {
    const int64_t head = i / shares, first = i % shares * kShare, last = std::min(n, first + kShare);
    const float *mean = cache.constants_of(row, head), *alpha = mean + layout.dim;
    Tile tile;
    for (int64_t start = first; start < last; start += kTile) {
      const int64_t to = (head * n + start) * layout.dim;
      tile.locate(cache, row, head, slots + start, tile_size(last - start), true);
      kernels.grouped_widen(tile.tokens(kernels, layout), alpha, mean, keys + to);
      tile.locate(cache, row, head, slots + start, tile_size(last - start), false);
      kernels.grouped_widen(tile.tokens(kernels, layout), nullptr, nullptr, values + to);
    }
  });
}

}  // namespace selfindex
