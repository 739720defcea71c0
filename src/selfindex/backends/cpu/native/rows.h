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
  float* mapped;            // [count][dim], in the coded domain; paper: times alpha
  int16_t* whole;           // [count][width], mapped / whole_step
  float* whole_step;        // [count]
  uint8_t* tables;          // [count][dim / 4][16]; paper: [2][dim / 4][16], see make_split_tables
  float* table_step;        // [count], not a number where a query is not; paper: [1]
  float* offsets;           // [pages][count], mapped . mean of the page; paper: [count], query . mean

  void allocate(Arena& arena, const Cache& cache, bool scored);
  // Fills all but the offsets; tables where they were allocated.
  void prepare(const Kernels& kernels, const Cache& cache);
  void page_offsets(const Kernels& kernels, const Cache& cache, int64_t first, int64_t last);

 private:
  void prepare_paper(const Cache& cache);
};

// Paper preset: tables of the mean of the queries, whose entries are 128 * the first + the second, in
// steps of 1 / 16382 of the range of the widest group; a constant that no selection sees is left out.
// Returns the step, which is not a number where an entry is not.
float make_split_tables(const float* query, const float* codebook, int dim, uint8_t* tables);

// Tables of one query [dim] in bytes: the entry stands for (byte - kTableZero) * step.
float make_tables(const float* query, int dim, uint8_t* tables);

}  // namespace selfindex
