// Scores of every token of a block's pages, from the index alone, a warp a page: binary matrix products
// (and + population count) of tokens' feature words with the bit planes of their weights
// (prepare_paper.cuh), 8 planes a product. Scores are kept in 16 bits over the range that the weights
// allow; keys are those in 11 bits over the range that the row's tokens take.
constexpr int CHUNK_BYTES = 2 * PAGE;      // scores of a page, u16 [PAGE]
constexpr int STEPS = (D + 127) / 128;     // products of 128 channels

__device__ __forceinline__ void binary_mma(int* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }

// Parities of the sets of a group's bits, for the 8 groups of a word.
__device__ __forceinline__ void features(u32* f, u32 x) {
  const u32 next = (x >> 1 & 0x77777777) | (x << 3 & 0x88888888), second = (x >> 2 & 0x33333333) | (x << 2 & 0xcccccccc);
  f[0] = x;
  f[1] = x ^ next;
  f[2] = f[1] ^ second;
  f[3] = ((x ^ second) & 0x33333333) | ((f[2] ^ x << 1) & 0xcccccccc); }

// Sign words of tokens 8 (first + i) + g, i = 0 .. 3, channels 128 step + 32 j ...
__device__ __forceinline__ void load_signs(u32* a, u32 record, int first, int step, int lane) {
#if D == 128
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(record + (8 * first + lane) * CODE));
#else
#pragma unroll
  for (int i = 0; i < 4; i++)   // words past the head meet zero planes
    a[i] = load_shared(record + (8 * (first + i) + (lane >> 2)) * CODE + min(step * 4 + (lane & 3), R - 1) * 4);
#endif
}

template <int WARPS> struct Summary {
  u32 least[WARPS], most[WARPS];   // score of a warp's tokens
  uint2 block;                     // the same of the block
};

// Sets *ragged if any page is not full.
template <int WARPS>
__device__ __forceinline__ void score_pages(const Params& p, int row, int first, int last, u8* ring_memory,
                                            u32 resident, u8* scratch, Summary<WARPS>& summary, const QueryMemory& query, bool* ragged) {
  const int lane = __shfl_sync(~0u, threadIdx.x, threadIdx.x) & 31, w = threadIdx.x >> 5, g = lane >> 2, j = lane & 3;
  PageReader<WARPS> reader(p, row, first, last, ring_memory, lane, w);
  reader.fetch(0);
  u32 plane[STEPS][2][FEATURES];   // of this column's bit in the lower and in the upper bytes
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int byte = 0; byte < 2; byte++)
#pragma unroll
      for (int f = 0; f < FEATURES; f++) plane[step][byte][f] = step * 4 + j < R ? query.planes[byte * 8 + g][f][step * 4 + j] : 0;
  const int last_bit = j == 3 ? -2 : 2;   // bit 15 counts negative
  const int base = query.least;
  const float factor = 65535.f / (float)max(query.range, 1);
  u32 least = ~0u, most = 0;
  for (int n = 0; n < reader.mine; n++) {
    const u32 record = reader.ring.wait(n);
    reader.fetch(n + 1);
    const int tokens = load_shared(record + SLOT - 16) >> 24;
    if (tokens < PAGE) *ragged = true;
    const int page = n * WARPS + w;
    const bool near = page < p.resident;
    u8* far = scratch + (i64)page * CHUNK_BYTES;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      int lower[2][4] = {}, upper[2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4], f[4][FEATURES];
        load_signs(a, record, 4 * q, step, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) features(f[i], a[i]);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int pair = 0; pair < FEATURES; pair += 2) {
            const u32 *x = f[2 * t] + pair, *y = f[2 * t + 1] + pair;
            binary_mma(lower[t], x[0], y[0], x[1], y[1], plane[step][0][pair], plane[step][0][pair + 1]);
            binary_mma(upper[t], x[0], y[0], x[1], y[1], plane[step][1][pair], plane[step][1][pair + 1]);
          }
      }
      int sum[4];   // of this lane's columns, tokens 8 (4 q + i) + g
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int *lo = lower[i / 2] + i % 2 * 2, *up = upper[i / 2] + i % 2 * 2;
        sum[i] = (lo[0] + 2 * lo[1] + 256 * (up[0] + last_bit * up[1])) << 2 * j;
      }
      // Of the four, lane j gets the j-th, over all columns.
      const bool high = j & 2, odd = j & 1;
      const int x = (high ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, high ? sum[0] : sum[2], 2);
      const int y = (high ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, high ? sum[1] : sum[3], 2);
      const int score = (odd ? y : x) + __shfl_xor_sync(~0u, odd ? x : y, 1);
      const int token = 8 * (4 * q + j) + g;
      const u32 code = min((u32)((float)(score - base) * factor), 65535u);
      if (token < tokens) { least = min(least, code); most = max(most, code); }
      if (near) store_shared_half(resident + page * CHUNK_BYTES + token * 2, code);
      else *(u16*)(far + token * 2) = (u16)code;
    }
    __syncwarp();   // the slot may be filled again
  }
  reader.ring.close(lane);
  least = __reduce_min_sync(~0u, least);
  most = __reduce_max_sync(~0u, most);
  if (lane == 0) { summary.least[w] = least; summary.most[w] = most; }
}

// Keys of a block's tokens, from their place between the row's least and largest score, and their histogram.
template <int WARPS>
__device__ __forceinline__ void make_keys(const Params& p, SelectMemory<WARPS>& m, const KeyPlaces& keys, const u8* resident, const u8* scratch,
                                          Summary<WARPS>& summary, const int* counts, int first, int pages, bool ragged, int rank, int size) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  if (w == 0) {   // lane = warp
    const u32 own_least = __reduce_min_sync(~0u, lane < WARPS ? summary.least[lane] : ~0u);
    const u32 own_most = __reduce_max_sync(~0u, lane < WARPS ? summary.most[lane] : 0);
    if (lane == 0) summary.block = make_uint2(own_least, own_most);
  }
  cluster_sync();
  // lane = block of the cluster
  const uint2 part = lane < size ? load_remote2(&summary.block, lane) : make_uint2(~0u, 0);
  const u32 least = __reduce_min_sync(~0u, part.x), range = __reduce_max_sync(~0u, part.y) - least;
  const u32 factor = range > BINS - 2 ? (BINS - 2 << 16) / range : 1 << 16;
  constexpr int BATCH = 4;   // loads under way
  for (int start = w; start < pages; start += WARPS * BATCH) {
    uint2 codes[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS < pages ? start + i * WARPS : start;
      codes[i] = *(const uint2*)((page < p.resident ? resident : scratch) + (i64)page * CHUNK_BYTES + lane * 8);
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int page = start + i * WARPS;
      if (page >= pages) break;
      const auto key = [&](u32 code) { return 1 + ((code - least) * factor >> 16) & 0xffff; };
      const auto two = [&](u32 pair) { return key(pair & 0xffff) | key(pair >> 16) << 16; };
      put_keys(m, keys.at(page), make_uint2(two(codes[i].x), two(codes[i].y)), ragged ? counts[first + page] : PAGE, lane);
    }
  }
}
