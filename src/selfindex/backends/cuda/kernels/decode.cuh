// Score and select, one cluster a row (sequence x KV head), each block a contiguous run of pages:
//   mass[t] = sum over the group's heads of softmax(logit)[t];  key = 14-bit float of the mass
// Codes stay in shared memory, or in scratch memory (the L2 cache) where they do not fit. Keys lie
// over the codes of their page, or in shared memory of their own.
template <int WARPS> __device__ __forceinline__ void decode_row(const Params& p) {
  extern __shared__ __align__(128) u8 memory[];
  constexpr int THREADS = WARPS * 32, RING = WARPS * STAGES * SLOT;
  __shared__ float2 totals[WARPS][HEADS];
  __shared__ float2 block_totals[HEADS];
  __shared__ float shift[HEADS];
  __shared__ __align__(8) u64 barriers[WARPS * STAGES];
  __shared__ __align__(16) u32 query[QUADS * MEAN_WORDS * 32 * 12];
  static_assert(sizeof(SelectMemory<WARPS>) <= RING, "the selection reuses the ring");
  const int rank = cluster_rank(), size = p.cluster, row = blockIdx.x / size;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  wait_previous();
  const int used = p.rowinfo[row * 2], k = p.rowinfo[row * 2 + 1];
  if (k == 0) { allow_next(); return; }   // the same for all blocks of the cluster
  const int share = (used + size - 1) / size, first = min(rank * share, used), last = min(first + share, used), pages = last - first;
  u8* chunks = p.scratch ? p.scratch + (i64)blockIdx.x * p.cta_pages * CHUNK_BYTES : memory + RING;
  score_pages<WARPS>(p, row, first, last, memory, chunks, totals, barriers, query);
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
    float own = FAR, part = 0.f;
    if (lane < size) {
      own = __uint_as_float(load_remote(&block_totals[head].x, lane));
      part = __uint_as_float(load_remote(&block_totals[head].y, lane));
    }
    const float best = warp_max(own), total = warp_sum(part * ex2(own - best));
    // Codes and totals both carry 2^TOP; read as float32, a code's exponent is 112 too small.
    if (lane == 0) shift[head] = head < G ? 112.f - best - lg2(fmaxf(total, 1e-30f)) : -1000.f;
  }
  __syncthreads();
  const int* counts = p.counts + (i64)(row / p.heads) * p.pages;
  u8* keys = p.shared_keys ? memory + RING : chunks;
  const int key_stride = p.shared_keys ? 2 * PAGE : CHUNK_BYTES;
#pragma unroll QUADS == 1 ? 4 : 1
  for (int page = w; page < pages; page += WARPS) {
    u8* chunk = chunks + (i64)page * CHUNK_BYTES;
    const int present = counts[first + page];
    float mass[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      const uint4 v = *(const uint4*)(chunk + quad * 512 + lane * 16);
      const float4 top = *(const float4*)(chunk + CHUNK_MAXIMA + quad * 16);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
      const float tops[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (quad * 4 + j >= G) break;
        const float factor = ex2(tops[j] + shift[quad * 4 + j]);
        mass[0] = fmaf(__uint_as_float(words[j] << 20 & 0x0ff00000), factor, mass[0]);
        mass[1] = fmaf(__uint_as_float(words[j] << 12 & 0x0ff00000), factor, mass[1]);
        mass[2] = fmaf(__uint_as_float(words[j] << 4 & 0x0ff00000), factor, mass[2]);
        mass[3] = fmaf(__uint_as_float(words[j] >> 4 & 0x0ff00000), factor, mass[3]);
      }
    }
    __syncwarp();   // keys overwrite the codes of their own page
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = (lane >> 3) * 32 + i * 8 + (lane & 7);
      int key = (int)(__float_as_uint(mass[i]) >> 15) - (68 << 8);   // exponents 2^-59 .. 2^4
      key = min(max(key, 1), BINS * FINE - 1);
      if (token >= present) key = 0;
      else atomicAdd(&m.histogram[key / FINE], 1u);
      ((u16*)(keys + page * key_stride))[token] = (u16)key;
    }
  }
  __syncthreads();
  select_keys<WARPS>(m, keys, key_stride, pages * PAGE, (i64)first * PAGE, k, rank, size, p.selected + (i64)row * p.width);
}

extern "C" __global__ void __launch_bounds__(256, D == 256 || G > 8 ? 1 : 2) decode8(const __grid_constant__ Params p) { decode_row<8>(p); }
#if G <= 8 && D < 256   // larger ones do not fit the registers of 512 threads
extern "C" __global__ void __launch_bounds__(512, 1) decode16(const __grid_constant__ Params p) { decode_row<16>(p); }
#endif

// The selection alone, for its test: keys u16 [rows, n], n a multiple of 128 -> selected [rows, width].
extern "C" __global__ void __launch_bounds__(256, 1) select_test(const u16* keys, int n, const int* budgets, int width, int size, int* selected) {
  extern __shared__ __align__(128) u8 memory[];
  SelectMemory<8>& m = *(SelectMemory<8>*)memory;
  const int rank = cluster_rank(), row = blockIdx.x / size, k = budgets[row];
  if (k == 0) return;
  const int pages = n / PAGE, share = (pages + size - 1) / size, first = min(rank * share, pages), last = min(first + share, pages);
  const u16* own = keys + (i64)row * n + first * PAGE;
  for (int i = threadIdx.x; i < BINS; i += 256) m.histogram[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < (last - first) * PAGE; i += 256) if (own[i]) atomicAdd(&m.histogram[own[i] / FINE], 1u);
  __syncthreads();
  select_keys<8>(m, (const u8*)own, PAGE * 2, (last - first) * PAGE, (i64)first * PAGE, k, rank, size, selected + (i64)row * width);
}
