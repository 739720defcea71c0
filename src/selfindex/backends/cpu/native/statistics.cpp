// What the pages of the paper preset share, from a prompt's keys.
#include <algorithm>
#include <cmath>
#include <vector>

#include "arena.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {
namespace {

// Tokens of a task, which its sums in single precision bear.
constexpr int64_t kShare = 2048;

// Of the tokens of one task.
struct Share {
  float *channels, *alpha;  // [dim]
  float* sums;              // [dim / 4][16][4]
  int32_t* members;         // [dim / 4][16]
};

void join_means(const std::vector<Share>& shares, int64_t tokens, int dim, float* mean) {
  for (int i = 0; i < dim; i++) {
    double sum = 0;
    for (const Share& share : shares) sum += share.channels[i];
    mean[i] = static_cast<float>(sum / static_cast<double>(tokens));
  }
}

void join_codes(const std::vector<Share>& shares, int64_t tokens, int dim, float* alpha, float* codebook) {
  for (int i = 0; i < dim; i++) {
    alpha[i] = 0;
    for (const Share& share : shares) alpha[i] = std::max(alpha[i], share.alpha[i]);
  }
  for (int group = 0; group < dim / 4; group++) {
    double sums[kGroupEntries][4] = {}, sizes[4] = {};
    int64_t members[kGroupEntries] = {};
    for (int code = 0; code < kGroupEntries; code++)
      for (const Share& share : shares) {
        const int at = group * kGroupEntries + code;
        members[code] += share.members[at];
        for (int i = 0; i < 4; i++) sums[code][i] += share.sums[4 * at + i];
      }
    // Every channel has the sign that the code says.
    for (const auto& sum : sums)
      for (int i = 0; i < 4; i++) sizes[i] += std::fabs(sum[i]);
    for (int code = 0; code < kGroupEntries; code++)
      for (int i = 0; i < 4; i++) {
        const double size = sizes[i] / static_cast<double>(tokens);
        codebook[(group * kGroupEntries + code) * 4 + i] = static_cast<float>(
            members[code] ? sums[code][i] / static_cast<double>(members[code]) : code >> i & 1 ? size : -size);
      }
  }
}

}  // namespace

void prompt_statistics(const Kernels& kernels, Format format, const Strided& keys, int64_t heads,
                       int64_t tokens, int dim, int threads, float* constants) {
  const int64_t codes = dim / 4 * kGroupEntries, count = (tokens + kShare - 1) / kShare;
  std::vector<std::vector<Share>> shares(heads, std::vector<Share>(count));
  Arena arena;
  arena.lay_out([&] {
    for (auto& own : shares)
      for (Share& share : own) {
        share.channels = arena.take<float>(dim);
        share.alpha = arena.take<float>(dim);
        share.sums = arena.take<float>(4 * codes);
        share.members = arena.take<int32_t>(codes);
      }
  });
  const auto first = [&](int64_t head, int64_t i) { return keys.at + head * keys.head + i * kShare * keys.token; };
  const auto size = [&](int64_t i) { return std::min(kShare, tokens - i * kShare); };
  const auto mean_of = [&](int64_t head) { return constants + head * 18 * dim; };
  run_phases(
      threads, heads,
      {{count,
        [&](int64_t head, int64_t i, int) {
          float* sums = shares[head][i].channels;
          std::fill(sums, sums + dim, 0.0f);
          kernels.channel_sums(first(head, i), format, keys.token, size(i), dim, sums);
        }},
       {1, [&](int64_t head, int64_t, int) { join_means(shares[head], tokens, dim, mean_of(head)); }},
       {count,
        [&](int64_t head, int64_t i, int) {
          const Share& share = shares[head][i];
          std::fill(share.alpha, share.alpha + dim, 0.0f);
          std::fill(share.sums, share.sums + 4 * codes, 0.0f);
          std::fill(share.members, share.members + codes, 0);
          kernels.code_sums(first(head, i), format, keys.token, size(i), dim, mean_of(head), share.alpha,
                            share.sums, share.members);
        }},
       {1, [&](int64_t head, int64_t, int) {
          float* mean = mean_of(head);
          join_codes(shares[head], tokens, dim, mean + dim, mean + 2 * dim);
        }}});
}

}  // namespace selfindex
