// Score and select, one cluster a row (sequence x KV head), each block a contiguous run of pages:
//   mass[t] = sum over the group's heads of softmax(logit)[t];  key = 11-bit float of the mass
// Codes stay in shared memory, as far as they fit, the others in scratch memory (the L2 cache). Keys
// lie over the codes of their page, or those of the others where the ring was.
template <int WARPS> __device__ __forceinline__ void decode_row(const Params& p) {
  extern __shared__ __align__(128) u8 memory[];
  constexpr int THREADS = WARPS * 32, RING = WARPS * STAGES * SLOT;
  __shared__ float2 totals[WARPS][HEADS];
  __shared__ float2 block_totals[HEADS];
  __shared__ float shift[HEADS];
  __shared__ bool ragged;
  __shared__ QueryMemory query;
  static_assert(sizeof(SelectMemory<WARPS>) <= SELECT_BYTES && SELECT_BYTES <= RING, "the selection reuses the ring");
  const int rank = cluster_rank(), size = p.cluster, row = blockIdx.x / size;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  if (tid == 0) ragged = false;
  prepare_row<WARPS>(p, row, query, rank == 0);   // ends with a barrier
  const int used = query.used;
  if (query.take == 0) { allow_next(); return; }   // the same for all blocks of the cluster
  const int share = (used + size - 1) / size, first = min(rank * share, used), last = min(first + share, used), pages = last - first;
  // Both start where their page 0 would be.
  u8* scratch = p.scratch + ((i64)blockIdx.x * p.cta_pages - (blockIdx.x + 1) * p.resident) * CHUNK_BYTES;
  score_pages<WARPS>(p, row, first, last, memory, shared_address(memory + RING), scratch, totals, query, &ragged);
  __syncthreads();
  SelectMemory<WARPS>& m = *(SelectMemory<WARPS>*)memory;
  for (int head = w; head < HEADS; head += WARPS) {   // lane = warp
    const float2 own = lane < WARPS ? totals[lane][head] : make_float2(FAR, 0.f);
    const float best = warp_max(own.x), total = warp_sum(own.y * ex2(own.x - best));
    if (lane == 0) block_totals[head] = make_float2(best, total);
  }
  for (int i = tid; i < BINS; i += THREADS) m.histogram[i] = 0;
  cluster_sync();
  for (int head = w; head < HEADS; head += WARPS) {   // lane = block of the cluster
    const uint2 part = lane < size ? load_remote2(&block_totals[head], lane) : make_uint2(__float_as_uint(FAR), 0);
    const float own = __uint_as_float(part.x), best = warp_max(own), total = warp_sum(__uint_as_float(part.y) * ex2(own - best));
    // Codes and totals both carry 2^TOP; read as bfloat16, a code's exponent is 112 too small.
    if (lane == 0) shift[head] = head < G ? 112.f - best - lg2(fmaxf(total, 1e-30f)) : -1000.f;
  }
  __syncthreads();
  const int* counts = p.counts + (i64)(row / p.heads) * p.pages;
  KeyPlaces keys{memory + RING, p.ring_keys ? memory + SELECT_BYTES - p.resident * 2 * PAGE : scratch, p.resident,
                 CHUNK_BYTES, p.ring_keys ? 2 * PAGE : CHUNK_BYTES};
  // A lane's tokens are 4 lane + (i ^ order): the permutes put their keys in order.
  const int order = mix(lane & 7);
  const u32 keys01 = order == 0 ? 0x3210 : order == 1 ? 0x1032 : order == 2 ? 0x7654 : 0x5476, keys23 = keys01 ^ 0x4444;
  // Several pages are loaded before the first is needed.
  constexpr int BATCH = QUADS == 1 ? 4 : 1;
  for (int start = w; start < pages; start += WARPS * BATCH) {
    uint4 codes[BATCH][QUADS];
    float4 maxima[BATCH][QUADS];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS < pages ? start + i * WARPS : start;
      const u8* chunk = (page < p.resident ? memory + RING : scratch) + (i64)page * CHUNK_BYTES;
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        codes[i][quad] = *(const uint4*)(chunk + quad * 512 + lane * 16);
        maxima[i][quad] = *(const float4*)(chunk + CHUNK_MAXIMA + quad * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS;
      if (page >= pages) break;
      u32 mass[2] = {0x22802280, 0x22802280};   // 2^-58: the smallest key is 1
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        const uint4 v = codes[i][quad];
        const float4 top = maxima[i][quad];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        const float tops[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (quad * 4 + j >= G) break;
          const u32 factor = bfloat_pair(ex2(tops[j] + shift[quad * 4 + j]));
          mass[0] = multiply_add_bfloat2(words[j] & CODE_PAIR, factor, mass[0]);
          mass[1] = multiply_add_bfloat2(__funnelshift_r(words[j], words[j], 8) & CODE_PAIR, factor, mass[1]);
        }
      }
      __syncwarp();   // keys overwrite the codes of their own page
      // 6 exponent and 5 mantissa bits of the mass, 2^-58 .. 2^6.
      const u32 a = (mass[0] >> 2 & 0x3fff3fff) - 2207 * 0x10001, b = (mass[1] >> 2 & 0x3fff3fff) - 2207 * 0x10001;
      uint2 pair = make_uint2(prmt(a, b, keys01), prmt(a, b, keys23));
      if (ragged) {
        const int present = counts[first + page] - lane * 4;   // of this lane's tokens
        if (present < 4) pair.y &= present == 3 ? 0xffff : 0;
        if (present < 2) pair.x &= present == 1 ? 0xffff : 0;
      }
      *(uint2*)(keys.at(page) + lane * 8) = pair;
      // Bin 0 counts what does not exist; nobody reads it.
      atomicAdd(&m.histogram[pair.x & 0xffff], 1u);
      atomicAdd(&m.histogram[pair.x >> 16], 1u);
      atomicAdd(&m.histogram[pair.y & 0xffff], 1u);
      atomicAdd(&m.histogram[pair.y >> 16], 1u);
    }
  }
  __syncthreads();
  if (tid == 0) m.histogram[0] = 0;
  select_keys<WARPS>(m, keys, pages, (i64)first * PAGE, query.take, rank, size, p.selected + (i64)row * p.width);
}

extern "C" __global__ void __launch_bounds__(256, D == 256 || G > 4 ? 1 : 2) decode8(const __grid_constant__ Params p) { decode_row<8>(p); }
#if G <= 4 && D < 256   // more heads do not fit the registers of 512 threads
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
