// Attention to the full-precision tokens of a decode step, one KV head at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "operators.h"

namespace selfindex {

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

// Those of `window_attend`. Throws std::out_of_range where a row has no room for its new token.
Held held_in_place(const Step& step, uint8_t* keys, uint8_t* values, int64_t room);

class WindowPart {
 public:
  WindowPart(const Kernels& kernels, const Step& step, const Held& held);

  // Stores the new token and attends.
  void attend(int64_t row, int64_t head, int worker);
  // Merges that with the encoded part into the output.
  void merge(int64_t row, int64_t head, const float* part, const float* part_lse) const;

 private:
  struct Result {
    float *sums, *top, *mass;
  };

  const Kernels& kernels_;
  const Step& step_;
  const Held& held_;
  const int64_t token_;  // bytes
  std::vector<float*> logits_;   // of each worker
  std::vector<Result> results_;  // of each KV head of each row
  Arena arena_;
};

}  // namespace selfindex
