#include "rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace selfindex {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Query in steps of its largest channel / 32767; a dot product with 256 levels fits 32 bits.
float make_whole(const float* query, int dim, int width, int16_t* whole) {
  float top = 0, sum = 0;
  for (int i = 0; i < dim; i++) {
    top = std::max(top, std::fabs(query[i]));
    sum += std::fabs(query[i]);
  }
  std::fill(whole, whole + width, static_cast<int16_t>(0));
  if (!std::isfinite(sum)) return kNan;
  if (top == 0) return 0;
  const float step = top / 32767, inverse = 32767 / top;
  for (int i = 0; i < dim; i++)
    whole[i] = static_cast<int16_t>(std::lrint(std::min(std::max(query[i] * inverse, -32767.0f), 32767.0f)));
  return step;
}

}  // namespace

float make_tables(const float* query, int dim, uint8_t* tables) {
  float top = 0;
  for (int group = 0; group < dim / 4; group++) {
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += std::fabs(query[4 * group + i]);
    if (!std::isfinite(sum)) {
      std::fill(tables, tables + dim / 4 * kGroupEntries, static_cast<uint8_t>(kTableZero));
      return kNan;
    }
    top = std::max(top, sum);
  }
  const float inverse = top > 0 ? kTableLevels / top : 0;
  for (int group = 0; group < dim / 4; group++) {
    const float* q = query + 4 * group;
    uint8_t* table = tables + group * kGroupEntries;
    for (int code = 0; code < kGroupEntries / 2; code++) {
      float sum = 0;
      for (int i = 0; i < 4; i++) sum += code >> i & 1 ? q[i] : -q[i];
      const int entry = static_cast<int>(std::lrint(sum * inverse));
      table[code] = static_cast<uint8_t>(kTableZero + entry);
      table[kGroupEntries - 1 - code] = static_cast<uint8_t>(kTableZero - entry);
    }
  }
  return top / kTableLevels;
}

float make_split_tables(const float* query, const float* codebook, int dim, uint8_t* tables) {
  constexpr int kEntries = 128, kLevels = (kEntries * kEntries - 1) / 2;
  const int groups = dim / 4, size = groups * kGroupEntries;
  float entries[kMaxDim / 4 * kGroupEntries], middle[kMaxDim / 4], top = 0, sum = 0;
  for (int group = 0; group < groups; group++) {
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int code = 0; code < kGroupEntries; code++) {
      const int at = group * kGroupEntries + code;
      float entry = 0;
      for (int i = 0; i < 4; i++) entry += query[4 * group + i] * codebook[4 * at + i];
      entries[at] = entry;
      low = std::min(low, entry);
      high = std::max(high, entry);
      sum += std::fabs(entry);
    }
    middle[group] = low + (high - low) / 2;
    top = std::max(top, (high - low) / 2);
  }
  const bool finite = std::isfinite(sum);
  const float inverse = top > 0 ? kLevels / top : 0;
  for (int at = 0; at < size; at++) {
    const float level = (entries[at] - middle[at / kGroupEntries]) * inverse;
    const long entry = finite ? kLevels + std::lrint(std::min(std::max(level, -1.0f * kLevels), 1.0f * kLevels)) : 0;
    tables[at] = static_cast<uint8_t>(entry / kEntries);
    tables[size + at] = static_cast<uint8_t>(entry % kEntries);
  }
  return finite ? top / kLevels : kNan;
}

void Rows::allocate(Arena& arena, const Cache& cache, bool scored) {
  const int dim = cache.layout.dim;
  width = padded(dim);
  mapped = arena.take<float>(static_cast<int64_t>(count) * dim);
  whole = arena.take<int16_t>(static_cast<int64_t>(count) * width);
  whole_step = arena.take<float>(count);
  const bool paper = cache.layout.preset == kPaper;
  tables = scored ? arena.take<uint8_t>(int64_t{paper ? 2 : count} * dim / 4 * kGroupEntries) : nullptr;
  table_step = arena.take<float>(paper ? 1 : count);
  offsets = arena.take<float>(paper ? count : cache.pages * count);
}

void Rows::prepare(const Kernels& kernels, const Cache& cache) {
  const int dim = cache.layout.dim;
  if (cache.layout.preset == kPaper) return prepare_paper(cache);
  const float* balance = cache.constants_of(row, head);
  // The rotation is linear: 4 queries at a time keep its matrix in registers' reach.
  float balanced[4 * kMaxDim];
  for (int r = 0; r < count; r += 4) {
    const int n = std::min(4, count - r);
    for (int k = 0; k < n; k++)
      for (int i = 0; i < dim; i++) balanced[k * dim + i] = query[(r + k) * stride + i] / balance[i];
    kernels.rotate(balanced, cache.key_rotation, n, dim, mapped + static_cast<int64_t>(r) * dim);
  }
  for (int r = 0; r < count; r++) {
    const float* q = mapped + static_cast<int64_t>(r) * dim;
    whole_step[r] = make_whole(q, dim, width, whole + static_cast<int64_t>(r) * width);
    if (tables)
      table_step[r] =
          make_tables(q, dim, tables + static_cast<int64_t>(r) * dim / 4 * kGroupEntries);
  }
}

void Rows::prepare_paper(const Cache& cache) {
  const int dim = cache.layout.dim;
  const float *mean = cache.constants_of(row, head), *alpha = mean + dim, *codebook = alpha + dim;
  float middle[kMaxDim] = {};
  for (int r = 0; r < count; r++) {
    const float* q = query + r * stride;
    float offset = 0;
    for (int i = 0; i < dim; i++) {
      mapped[static_cast<int64_t>(r) * dim + i] = q[i] * alpha[i];
      offset += q[i] * mean[i];
      middle[i] += q[i];
    }
    offsets[r] = offset;
  }
  if (!tables) return;
  for (int i = 0; i < dim; i++) middle[i] /= static_cast<float>(count);
  table_step[0] = make_split_tables(middle, codebook, dim, tables);
}

void Rows::page_offsets(const Kernels& kernels, const Cache& cache, int64_t first, int64_t last) {
  const Layout& layout = cache.layout;
  if (layout.preset == kPaper) return;  // all pages have one, from `prepare`
  for (int64_t page = first; page < last; page++) {
    if (!cache.count(row, page)) continue;
    const uint8_t* index = cache.index_of(row, page, head);
    float* to = offsets + page * count;
    kernels.mean_dots(reinterpret_cast<const int8_t*>(index + layout.mean), mapped, count,
                      layout.dim, to);
    const float step = float_at(index + layout.mean_step);
    for (int r = 0; r < count; r++) to[r] *= step;
  }
}

void Cache::check() const {
  for (int64_t i = 0; i < batch * pages; i++)
    if (counts[i] > 0 && (table[i] < 0 || table[i] >= blocks))
      throw std::out_of_range("the block table names a block outside the pool");
}

const float* scale_values() {
  static const auto values = [] {
    struct {
      float of[256];
    } table;
    // 4 exponent bits over a bias of 15 as in a half, and 4 mantissa bits.
    for (int byte = 0; byte < 256; byte++) {
      const int exponent = byte >> 4, mantissa = byte & 15;
      table.of[byte] = exponent ? std::ldexp(16.0f + mantissa, exponent - 19)
                                : std::ldexp(static_cast<float>(mantissa), -18);
    }
    return table;
  }();
  return values.of;
}

}  // namespace selfindex
