// The queries that share a KV head, prepared for scoring and attention.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cache.h"
#include "kernels.h"

namespace selfindex {

struct Rows {
  int64_t row, head;  // of the batch, KV head
  const float* query;
  int64_t stride;  // from one query to the next, in floats
  int count;
  int width;                // channels padded for the decoder
  float* mapped;            // [count][dim], in the coded domain
  int16_t* whole;           // [count][width], mapped / whole_step
  float* whole_step;        // [count]
  uint8_t* tables;          // [count][dim / 4][16]
  float* table_step;        // [count]
  float* offsets;           // [pages][count], mapped . mean of the page

  void allocate(Arena& arena, const Cache& cache, bool scored);
  // Fills all but the offsets; tables where they were allocated.
  void prepare(const Kernels& kernels, const Cache& cache);
  void page_offsets(const Kernels& kernels, const Cache& cache, int64_t first, int64_t last);
};

// Tables of one query [dim] in bytes: the entry stands for (byte - kTableZero) * step.
float make_tables(const float* query, int dim, uint8_t* tables);

}  // namespace selfindex
