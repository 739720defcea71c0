// A whole decode step of a layer in one loop of tasks: encoded tokens and full-precision ones side by side.
#include <algorithm>

#include "arena.h"
#include "operators.h"
#include "window.h"

namespace selfindex {

void step_attend(const Kernels& kernels, const Cache& cache, const Step& step, uint8_t* keys, uint8_t* values,
                 int64_t room, const int32_t* budgets, int64_t width) {
  cache.check();
  const Held held = held_in_place(step, keys, values, room);
  WindowPart window(kernels, step, held);
  const int64_t rows = step.batch * step.heads * step.groups, dim = step.dim;
  Arena arena;
  float *query = nullptr, *output = nullptr, *lse = nullptr;
  arena.lay_out([&] {
    query = arena.take<float>(rows * dim);
    output = arena.take<float>(rows * dim);
    lse = arena.take<float>(rows);
  });
  const int64_t per_row = step.heads * step.groups;
  for (int64_t i = 0; i < rows; i++)
    kernels.to_floats(step.query.at + i / per_row * step.query.outer + i % per_row * step.query.head,
                      step.format, step.dim, query + i * dim);
  const Queries queries{query, step.groups, 1, step.threads, output, lse};
  const Beside beside{
      [&](int64_t row, int64_t head, int worker) { window.attend(row, head, worker); },
      [&](int64_t row, int64_t head) {
        const int64_t first = (row * step.heads + head) * step.groups;
        window.merge(row, head, output + first * dim, lse + first);
      }};
  if (budgets) sparse_decode(kernels, cache, queries, budgets, width, nullptr, &beside);
  else dense_attend(kernels, cache, queries, &beside);
}

}  // namespace selfindex
