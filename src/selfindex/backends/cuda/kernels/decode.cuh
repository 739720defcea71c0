// Score and select, one cluster a row (sequence x KV head), each block a contiguous run of pages: a
// preset's `score_row` leaves keys of the tokens and their histogram. What it keeps of a page stays in
// shared memory, as far as it fits, the rest in scratch memory (the L2 cache). Keys lie over that, or those
// of the pages in scratch where the ring was.
template <int WARPS> __device__ __forceinline__ void decode_row(const Params& p) {
  extern __shared__ __align__(128) u8 memory[];
  constexpr int RING = WARPS * STAGES * SLOT, SELECT = COUNTS_WHILE_SCORING ? RING : 0, RESIDENT = SELECT ? RING + SELECT_BYTES : RING;
  __shared__ QueryMemory query;
  static_assert(sizeof(SelectMemory<WARPS>) <= SELECT_BYTES && (SELECT || SELECT_BYTES <= RING), "the selection's memory");
  SelectMemory<WARPS>& m = *(SelectMemory<WARPS>*)(memory + SELECT);
  Block block{cluster_rank(), p.cluster, (int)blockIdx.x / p.cluster, 0, 0};
  PageReader<WARPS> reader;
  if (SELECT) clear_histogram(m);
  const int take = prepare_row<WARPS>(p, block.row, query, block.rank == 0, [&](int used) {
    const int share = (used + block.size - 1) / block.size, last = min((block.rank + 1) * share, used);
    block.first = min(block.rank * share, used);
    block.pages = last - block.first;
    reader.open(p, block.row, block.first, last, memory);
  });
  if (take == 0) { allow_next(); return; }   // the same for all blocks of the cluster
  // All of them start where their page 0 would be.
  u8 *resident = memory + RESIDENT, *scratch = p.scratch + ((i64)blockIdx.x * p.cta_pages - (blockIdx.x + 1) * p.resident) * CHUNK_BYTES;
  u8* after_ring = memory + (SELECT ? 0 : SELECT_BYTES) - p.resident * 2 * PAGE;
  const KeyPlaces keys{resident, p.ring_keys ? after_ring : scratch, p.resident, CHUNK_BYTES, p.ring_keys ? 2 * PAGE : CHUNK_BYTES};
  score_row<WARPS>(p, block, m, reader, query, keys, resident, scratch);   // ends with a barrier
  select_keys<WARPS>(m, keys, block.pages, (i64)block.first * PAGE, take, block.rank, block.size, p.selected + (i64)block.row * p.width);
}

extern "C" __global__ void __launch_bounds__(256, D == 256 || G > 4 ? 1 : 2) decode8(const __grid_constant__ Params p) { decode_row<8>(p); }
#if PAPER || (G <= 4 && D < 256)   // more heads do not fit the registers of 512 threads
extern "C" __global__ void __launch_bounds__(512, 1) decode16(const __grid_constant__ Params p) { decode_row<16>(p); }
#endif

// The selection alone, for its test: keys u16 [rows, n], n a multiple of 128, overwritten -> selected [rows, width].
extern "C" __global__ void __launch_bounds__(256, 1) select_test(u16* keys, int n, const int* budgets, int width, int size, int* selected) {
  extern __shared__ __align__(128) u8 memory[];
  SelectMemory<8>& m = *(SelectMemory<8>*)memory;
  const int rank = cluster_rank(), row = blockIdx.x / size, k = budgets[row];
  if (k == 0) return;
  const int pages = n / PAGE, share = (pages + size - 1) / size, first = min(rank * share, pages), last = min(first + share, pages);
  u16* own = keys + (i64)row * n + first * PAGE;
  for (int i = threadIdx.x; i < BINS; i += 256) m.histogram[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < (last - first) * PAGE; i += 256) if (own[i]) atomicAdd(&m.histogram[own[i] >> FINE_BITS], 1u);
  __syncthreads();
  select_keys<8>(m, KeyPlaces{(u8*)own, (u8*)own, 0, 0, PAGE * 2}, last - first, (i64)first * PAGE, k, rank, size, selected + (i64)row * width);
}
