// The full-precision part of a decode step.
#include "window.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "parallel.h"

namespace selfindex {
namespace {

void run(const Kernels& kernels, const Step& step, const Held& held) {
  WindowPart window(kernels, step, held);
  parallel_for(std::max(1, step.threads), step.batch * step.heads, [&](int64_t i, int worker) {
    const int64_t row = i / step.heads, head = i % step.heads, first = i * step.groups;
    window.attend(row, head, worker);
    window.merge(row, head, step.part + first * step.dim, step.part_lse + first);
  });
}

}  // namespace

Held held_in_place(const Step& step, uint8_t* keys, uint8_t* values, int64_t room) {
  const int64_t token = step.token_bytes();
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
  return held;
}

WindowPart::WindowPart(const Kernels& kernels, const Step& step, const Held& held)
    : kernels_(kernels), step_(step), held_(held), token_(step.token_bytes()),
      logits_(std::max(1, step.threads)), results_(step.batch * step.heads) {
  int longest = 0;
  for (int64_t b = 0; b < step.batch; b++) longest = std::max(longest, held.count(b));
  arena_.lay_out([&] {
    for (float*& logits : logits_) logits = arena_.take<float>(int64_t{4} * longest);
    for (Result& result : results_)
      result = {arena_.take<float>(int64_t{step.groups} * step.dim), arena_.take<float>(step.groups),
                arena_.take<float>(step.groups)};
  });
}

void WindowPart::attend(int64_t row, int64_t head, int worker) {
  if (step_.lengths[row] < 0) return;
  uint8_t *keys = held_.keys + head * held_.head, *values = held_.values + head * held_.head;
  if (const int64_t added = held_.added[row]; added >= 0) {
    const Strided &k = step_.new_keys, &v = step_.new_values;
    std::memcpy(keys + added, k.at + row * k.outer + head * k.head, token_);
    std::memcpy(values + added, v.at + row * v.outer + head * v.head, token_);
  }
  const Result& result = results_[row * step_.heads + head];
  const Strided& query = step_.query;
  kernels_.window({step_.format, step_.dim, step_.groups,
                   query.at + row * query.outer + head * step_.groups * query.head, query.head, keys, values,
                   held_.tokens.data() + held_.starts[row], held_.count(row), step_.scaling, logits_[worker],
                   result.sums, result.top, result.mass});
}

void WindowPart::merge(int64_t row, int64_t head, const float* part, const float* part_lse) const {
  const int64_t i = row * step_.heads + head;
  uint8_t* output = step_.output + i * step_.groups * token_;
  if (step_.lengths[row] < 0) {
    std::memset(output, 0, step_.groups * token_);
    return;
  }
  const Result& result = results_[i];
  kernels_.window_merge({step_.format, step_.dim, step_.groups, result.sums, result.top, result.mass, part,
                         part_lse, step_.sink ? step_.sink + head * step_.groups : nullptr, output});
}

void window_attend(const Kernels& kernels, const Step& step, uint8_t* keys, uint8_t* values, int64_t room) {
  run(kernels, step, held_in_place(step, keys, values, room));
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
  run(kernels, step, held);
}

}  // namespace selfindex
