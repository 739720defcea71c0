// Score and select, one cluster a row (sequence x KV head), each block a contiguous run of pages: a
// preset's `score_pages` leaves codes of the tokens' scores, from which its `make_keys` makes 11-bit keys
// once the whole row has been scored. Codes stay in shared memory, as far as they fit, the others in
// scratch memory (the L2 cache). Keys lie over the codes of their page, or those of the others where the
// ring was.
template <int WARPS> __device__ __forceinline__ void decode_row(const Params& p) {
  extern __shared__ __align__(128) u8 memory[];
  constexpr int THREADS = WARPS * 32, RING = WARPS * STAGES * SLOT;
  __shared__ Summary<WARPS> summary;
  __shared__ bool ragged;
  __shared__ QueryMemory query;
  static_assert(sizeof(SelectMemory<WARPS>) <= SELECT_BYTES && SELECT_BYTES <= RING, "the selection reuses the ring");
  const int rank = cluster_rank(), size = p.cluster, row = blockIdx.x / size;
  const int tid = threadIdx.x;
  if (tid == 0) ragged = false;
  prepare_row<WARPS>(p, row, query, rank == 0);   // ends with a barrier
  const int used = query.used;
  if (query.take == 0) { allow_next(); return; }   // the same for all blocks of the cluster
  const int share = (used + size - 1) / size, first = min(rank * share, used), last = min(first + share, used), pages = last - first;
  // Both start where their page 0 would be.
  u8* scratch = p.scratch + ((i64)blockIdx.x * p.cta_pages - (blockIdx.x + 1) * p.resident) * CHUNK_BYTES;
  score_pages<WARPS>(p, row, first, last, memory, shared_address(memory + RING), scratch, summary, query, &ragged);
  __syncthreads();
  SelectMemory<WARPS>& m = *(SelectMemory<WARPS>*)memory;
  for (int i = tid; i < BINS; i += THREADS) m.histogram[i] = 0;
  const KeyPlaces keys{memory + RING, p.ring_keys ? memory + SELECT_BYTES - p.resident * 2 * PAGE : scratch, p.resident,
                       CHUNK_BYTES, p.ring_keys ? 2 * PAGE : CHUNK_BYTES};
  make_keys<WARPS>(p, m, keys, memory + RING, scratch, summary, p.counts + (i64)(row / p.heads) * p.pages, first, pages, ragged, rank, size);
  __syncthreads();
  if (tid == 0) m.histogram[0] = 0;
  select_keys<WARPS>(m, keys, pages, (i64)first * PAGE, query.take, rank, size, p.selected + (i64)row * p.width);
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
  for (int i = threadIdx.x; i < (last - first) * PAGE; i += 256) if (own[i]) atomicAdd(&m.histogram[own[i]], 1u);
  __syncthreads();
  select_keys<8>(m, KeyPlaces{(u8*)own, (u8*)own, 0, 0, PAGE * 2}, last - first, (i64)first * PAGE, k, rank, size, selected + (i64)row * width);
}
