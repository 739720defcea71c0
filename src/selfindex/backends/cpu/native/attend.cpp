#include "attend.h"

#include "operators.h"
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
  uint8_t key_scale[kTile], value_scale[kTile];
};

void locate(const Cache& cache, const Rows& rows, const int32_t* slots, int n, Tile& tile) {
  const Layout& layout = cache.layout;
  for (int t = 0; t < n; t++) {
    const uint32_t slot = static_cast<uint32_t>(slots[t]);
    const uint32_t size = static_cast<uint32_t>(layout.page);
    const uint32_t page = slot / size, at = slot % size;
    const uint8_t* index = cache.index_of(rows.row, page, rows.head);
    const uint8_t* payload = cache.payload_of(rows.row, page, rows.head);
    tile.page[t] = page;
    tile.index[t] = index;
    tile.codes[t] = index + layout.codes + at * static_cast<int64_t>(layout.dim / 8);
    tile.token[t] = payload + at * layout.token;
    tile.key_scale[t] = index[layout.key_scale + at];
    tile.value_scale[t] = payload[layout.value_scale + at];
    __builtin_prefetch(tile.codes[t]);
    __builtin_prefetch(tile.token[t]);
    __builtin_prefetch(tile.token[t] + layout.token - 1);
  }
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
}

void attend(const Kernels& kernels, const Cache& cache, const Rows& rows, const int32_t* slots,
            int64_t n, AttendScratch& scratch, Part& part) {
  const Layout& layout = cache.layout;
  const float* scales = scale_values();
  const bool signed_values = layout.value_bits == 3;
  const float unit = signed_values ? 1.0f / kUnits : 0.5f;
  const int width = rows.width;
  alignas(64) int8_t levels[kTile * kMaxDim];
  int32_t dots[kTile * 4];
  const uint8_t *crumbs[kTile], *signs[kTile];
  Tile tiles[2];

  if (n) locate(cache, rows, slots, static_cast<int>(std::min<int64_t>(kTile, n)), tiles[0]);
  for (int64_t start = 0; start < n; start += kTile) {
    const int live = static_cast<int>(std::min<int64_t>(kTile, n - start));
    const Tile& tile = tiles[start / kTile % 2];
    // Memory of the next tile is on its way while this one is computed.
    if (start + kTile < n)
      locate(cache, rows, slots + start + kTile,
             static_cast<int>(std::min<int64_t>(kTile, n - start - kTile)),
             tiles[(start / kTile + 1) % 2]);
    float key_scale[kTile];
    for (int t = 0; t < live; t++) {
      crumbs[t] = tile.token[t] + layout.magnitudes;
      signs[t] = tile.codes[t];
      key_scale[t] = scales[tile.key_scale[t]] * float_at(tile.index[t] + layout.key_base) *
                     (cache.scaling / kUnits);
      scratch.value_scale[start + t] =
          scales[tile.value_scale[t]] * float_at(tile.index[t] + layout.value_base) * unit;
    }
    kernels.expand(crumbs, signs, live, width, kEightLevels, levels);
    for (int r = 0; r < rows.count; r += 4) {
      const int some = std::min(4, rows.count - r);
      kernels.level_dots(levels, live, width, rows.whole + static_cast<int64_t>(r) * width, some,
                         dots);
      for (int k = 0; k < some; k++) {
        float* logits = scratch.logits + (r + k) * n + start;
        const float step = rows.whole_step[r + k];
        for (int t = 0; t < live; t++)
          logits[t] = static_cast<float>(dots[k * kTile + t]) * step * key_scale[t] +
                      rows.offsets[tile.page[t] * rows.count + r + k] * cache.scaling;
      }
    }
  }

  for (int r = 0; r < rows.count; r++) {
    float* logits = scratch.logits + r * n;
    float top = kNone;
    for (int64_t t = 0; t < n; t++) top = std::max(top, logits[t]);
    part.top[r] = top;
    part.mass[r] = n ? kernels.exponentiate(logits, n, 1.0f, top) : 0.0f;
    for (int64_t t = 0; t < n; t++) logits[t] *= scratch.value_scale[t];
  }

  std::fill(part.sums, part.sums + static_cast<int64_t>(rows.count) * width, 0.0f);
  for (int64_t start = 0; start < n; start += kTile) {
    const int live = static_cast<int>(std::min<int64_t>(kTile, n - start));
    Tile& tile = tiles[0];
    locate(cache, rows, slots + start, live, tile);
    for (int t = 0; t < live; t++) {
      crumbs[t] = tile.token[t] + layout.values;
      signs[t] = tile.token[t] + layout.value_signs;
    }
    kernels.expand(crumbs, signed_values ? signs : nullptr, live, width,
                   signed_values ? kEightLevels : kFourLevels, levels);
    kernels.accumulate(levels, live, width, scratch.logits + start, n, rows.count, part.sums);
  }
}

void read_tokens(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                 int64_t n, int threads, float* keys, float* values) {
  const Layout& layout = cache.layout;
  const int dim = layout.dim, width = padded(dim);
  const float* scales = scale_values();
  const bool signed_values = layout.value_bits == 3;
  const int64_t tiles = (n + kTile - 1) / kTile, share = 8;  // tiles of a task
  const int64_t shares = (tiles + share - 1) / share;
  parallel_for(threads, layout.heads * shares, [&](int64_t i, int) {
    Rows rows{};
    rows.row = row;
    rows.head = i / shares;
    alignas(64) int8_t levels[kTile * kMaxDim];
    alignas(64) float mean[kMaxDim];
    const uint8_t *crumbs[kTile], *signs[kTile], *index = nullptr;
    Tile tile;
    const int64_t first = i % shares * share * kTile, last = std::min(n, first + share * kTile);
    for (int64_t start = first; start < last; start += kTile) {
      const int live = static_cast<int>(std::min<int64_t>(kTile, last - start));
      const int64_t to = (rows.head * n + start) * dim;
      locate(cache, rows, slots + start, live, tile);
      for (int t = 0; t < live; t++) {
        crumbs[t] = tile.token[t] + layout.magnitudes;
        signs[t] = tile.codes[t];
      }
      kernels.expand(crumbs, signs, live, width, kEightLevels, levels);
      for (int t = 0; t < live; t++) {
        if (tile.index[t] != index) {
          index = tile.index[t];
          kernels.widen(reinterpret_cast<const int8_t*>(index + layout.mean), dim,
                        float_at(index + layout.mean_step), nullptr, mean);
        }
        const float scale = scales[tile.key_scale[t]] * float_at(index + layout.key_base) / kUnits;
        kernels.widen(levels + t * width, dim, scale, mean, keys + to + int64_t{t} * dim);
      }
      for (int t = 0; t < live; t++) {
        crumbs[t] = tile.token[t] + layout.values;
        signs[t] = tile.token[t] + layout.value_signs;
      }
      kernels.expand(crumbs, signed_values ? signs : nullptr, live, width,
                     signed_values ? kEightLevels : kFourLevels, levels);
      for (int t = 0; t < live; t++) {
        const float scale = scales[tile.value_scale[t]] * float_at(tile.index[t] + layout.value_base) *
                            (signed_values ? 1.0f / kUnits : 0.5f);
        kernels.widen(levels + t * width, dim, scale, nullptr, values + to + int64_t{t} * dim);
      }
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
    kernels.rotate(sum, cache.value_rotation, 1, dim, left);
    std::copy(left, left + dim, output + r * stride);
    lse[r * lse_stride] = top == kNone ? kNone : top + std::log(mass);
  }
}

}  // namespace selfindex
