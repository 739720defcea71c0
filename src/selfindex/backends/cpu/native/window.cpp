// The full-precision part of a decode step.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "operators.h"
#include "parallel.h"

namespace selfindex {
namespace {

// The tokens that rows attend to.
struct Held {
  uint8_t *keys, *values;
  int64_t head;                 // bytes from one KV head to the next
  std::vector<int64_t> tokens;  // bytes from `keys` and `values` to each token of all rows
  std::vector<int64_t> starts;  // [batch + 1], where a row's begin among them
  std::vector<int64_t> added;   // [batch], the same for the new token, negative for none

  explicit Held(int64_t batch) : starts(1, 0), added(batch, -1) { starts.reserve(batch + 1); }
  int count(int64_t row) const { return static_cast<int>(starts[row + 1] - starts[row]); }
};

int bytes_of(const Step& step) { return step.format == kFloat32 ? 4 : 2; }

void attend(const Kernels& kernels, const Step& step, const Held& held) {
  int longest = 0;
  for (int64_t b = 0; b < step.batch; b++) longest = std::max(longest, held.count(b));
  const int threads = std::max(1, step.threads);
  const int64_t token = static_cast<int64_t>(step.dim) * bytes_of(step);
  Arena arena;
  std::vector<float*> logits(threads), sums(threads), tops(threads), masses(threads);
  arena.lay_out([&] {
    for (int i = 0; i < threads; i++) {
      logits[i] = arena.take<float>(int64_t{4} * longest);
      sums[i] = arena.take<float>(static_cast<int64_t>(step.groups) * step.dim);
      tops[i] = arena.take<float>(step.groups);
      masses[i] = arena.take<float>(step.groups);
    }
  });
  parallel_for(threads, step.batch * step.heads, [&](int64_t i, int worker) {
    const int64_t b = i / step.heads, head = i % step.heads, first = head * step.groups;
    const int64_t row = b * step.heads * step.groups + first;
    uint8_t* output = step.output + row * token;
    if (step.lengths[b] < 0) {
      std::memset(output, 0, step.groups * token);
      return;
    }
    uint8_t *keys = held.keys + head * held.head, *values = held.values + head * held.head;
    if (held.added[b] >= 0) {
      std::memcpy(keys + held.added[b], step.new_keys.at + b * step.new_keys.outer + head * step.new_keys.head, token);
      std::memcpy(values + held.added[b],
                  step.new_values.at + b * step.new_values.outer + head * step.new_values.head, token);
    }
    kernels.window({step.format, step.dim, step.groups,
                    step.query.at + b * step.query.outer + first * step.query.head, step.query.head, keys,
                    values, held.tokens.data() + held.starts[b], held.count(b), step.scaling, logits[worker],
                    sums[worker], tops[worker], masses[worker]});
    kernels.window_merge({step.format, step.dim, step.groups, sums[worker], tops[worker], masses[worker],
                          step.part + row * step.dim, step.part_lse + row,
                          step.sink ? step.sink + first : nullptr, output});
  });
}

}  // namespace

void window_attend(const Kernels& kernels, const Step& step, uint8_t* keys, uint8_t* values, int64_t room) {
  const int64_t token = static_cast<int64_t>(step.dim) * bytes_of(step);
  Held held(step.batch);
  held.keys = keys;
  held.values = values;
  held.head = room * token;
  for (int64_t b = 0; b < step.batch; b++) {
    if (step.lengths[b] < 0 || step.lengths[b] >= room)
      throw std::out_of_range("a row has no room for the new token");
    for (int64_t t = 0; t <= step.lengths[b]; t++)
      held.tokens.push_back(b * step.heads * held.head + t * token);
    held.starts.push_back(held.tokens.size());
    held.added[b] = held.tokens.back();
  }
  attend(kernels, step, held);
}

void paged_window_attend(const Kernels& kernels, const Step& step, const PagedTokens& tokens,
                         const int32_t* starts, int64_t sinks) {
  Held held(step.batch);
  held.keys = tokens.at;
  held.values = tokens.at + tokens.token / 2;
  held.head = tokens.head;
  for (int64_t b = 0; b < step.batch; b++) {
    const int64_t last = step.lengths[b], start = std::max(starts[b], 0);
    if (last >= 0) {
      if (start > last) throw std::out_of_range("a row's full-precision tokens start behind its new one");
      const int64_t before = std::min(sinks, start);
      for (int64_t i = 0; i < before + last - start + 1; i++) {
        const int64_t position = i < before ? i : i - before + start, block = tokens.block_of(b, position);
        if (block == 0) continue;
        held.tokens.push_back(tokens.offset(b, position));
        if (position == last) held.added[b] = held.tokens.back();
      }
    }
    held.starts.push_back(held.tokens.size());
  }
  attend(kernels, step, held);
}

}  // namespace selfindex
