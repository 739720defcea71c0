// The operators of src/selfindex/backends/operators that have kernels here.
#pragma once

#include <cstdint>
#include <functional>

#include "cache.h"
#include "kernels.h"

namespace selfindex {

// What is done for every KV head of every row in the same loop of tasks, of one new query a row.
struct Beside {
  std::function<void(int64_t row, int64_t head, int worker)> attend;
  std::function<void(int64_t row, int64_t head)> finish;  // once the operator's own results are there
};

// budgets [batch]; at most `width` tokens a row are read. `chosen`, unless null, receives the
// selected slots, int32 [batch][heads][queries][width], -1 beyond.
void sparse_decode(const Kernels& kernels, const Cache& cache, const Queries& queries,
                   const int32_t* budgets, int64_t width, int32_t* chosen, const Beside* beside = nullptr);

void dense_attend(const Kernels& kernels, const Cache& cache, const Queries& queries,
                  const Beside* beside = nullptr);

// Decodes the tokens in `slots` [n] of a row in the coded domain: keys, values [heads][n][dim].
void read_tokens(const Kernels& kernels, const Cache& cache, int64_t row, const int32_t* slots,
                 int64_t n, int threads, float* keys, float* values);

// A tensor [outer][heads][tokens][dim] with adjacent channels; strides in bytes.
struct Strided {
  const uint8_t* at;
  int64_t outer, head, token;
};

// Full-precision tokens in the blocks of an engine, [blocks][heads][size][2 dim]: keys and then values
// of a token. Position p of a row is in block table[p / size], there at p % size. Strides in bytes.
struct PagedTokens {
  uint8_t* at;
  int64_t blocks, block, head, token, size;
  const int32_t* table;  // [batch][columns]
  int64_t columns;

  // Throws std::out_of_range where the table has no place for a position or names no block.
  int64_t block_of(int64_t row, int64_t position) const;
  // Bytes from `at` to the position, in KV head 0.
  int64_t offset(int64_t row, int64_t position) const {
    return block_of(row, position) * block + position % size * token;
  }
};

// Where pages go, and what encoding their tokens takes.
struct Pages {
  Layout layout;
  Format format;
  int64_t count;
  const int32_t* counts;  // [count], tokens of each page
  const float* constants;  // [1 or count][heads][layout.constants()], see EncodeRecord, as the next three
  int64_t constants_stride;
  const float* value_factor;
  int order;
  const float* block;
  const int32_t* blocks;  // [count], of the pools; a page whose block is negative is skipped
  int64_t room;           // blocks of the pools
  uint8_t *index, *payload;
  int64_t index_bytes, payload_bytes, index_stride, payload_stride;
  int threads;
};

// keys, values [count][heads][page][dim]. Throws std::out_of_range, before anything is written, where
// a block is not in the pools.
void encode(const Kernels& kernels, const Pages& pages, const Strided& keys, const Strided& values);

// Of keys [heads][tokens][dim], tokens > 0: constants [heads][18 dim] of the paper preset.
void prompt_statistics(const Kernels& kernels, Format format, const Strided& keys, int64_t heads,
                       int64_t tokens, int dim, int threads, float* constants);

// The page of row b holds its positions from first[b] on; also throws as `PagedTokens::block_of`.
void encode_paged(const Kernels& kernels, const Pages& pages, const PagedTokens& tokens,
                  const int32_t* first);

// The end of a decode step.
struct Step {
  Format format;
  int64_t batch, heads;
  int groups, dim;
  Strided query;                 // [batch][heads * groups][1][dim]
  Strided new_keys, new_values;  // [batch][heads][1][dim]
  const int32_t* lengths;        // [batch]
  const float *part, *part_lse, *sink;  // [batch][heads * groups][dim] and [..], [heads * groups]
  uint8_t* output;                      // [batch][heads * groups][dim]
  float scaling;
  int threads;

  int64_t token_bytes() const { return int64_t{dim} * (format == kFloat32 ? 4 : 2); }
};

// keys, values [batch][heads][room][dim]. Throws std::out_of_range, before anything is written, where
// a row has no room for its new token.
void window_attend(const Kernels& kernels, const Step& step, uint8_t* keys, uint8_t* values, int64_t room);

// A row attends to its positions [0, min(sinks, starts[b])) and [starts[b], lengths[b]], of which those
// in block 0 do not exist; one of negative length gives zeros. Throws std::out_of_range, before anything
// is written, as `PagedTokens::block_of` and where a row starts behind its new token.
void paged_window_attend(const Kernels& kernels, const Step& step, const PagedTokens& tokens,
                         const int32_t* starts, int64_t sinks);

// `sparse_decode`, or `dense_attend` without budgets, and then `window_attend` with what that gave as
// the step's part.
void step_attend(const Kernels& kernels, const Cache& cache, const Step& step, uint8_t* keys, uint8_t* values,
                 int64_t room, const int32_t* budgets, int64_t width);

}  // namespace selfindex
