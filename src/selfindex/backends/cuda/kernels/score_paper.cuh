// Scores of every token of a block's pages, from the index alone, a warp a page: binary matrix products
// (and + population count) of tokens' feature words with the bit planes of their weights
// (prepare_paper.cuh), 8 planes a product. Keys are scores in 15 bits over the range that the weights allow,
// so that they are final, and counted, as soon as a page has been scored.
constexpr bool COUNTS_WHILE_SCORING = true;
constexpr int CHUNK_BYTES = 2 * PAGE;      // keys of a page, u16 [PAGE]
constexpr int STEPS = (D + 127) / 128;     // products of 128 channels

__device__ __forceinline__ void binary_mma(int* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const int* c) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])); }

// Bits of a where the mask has ones, else of b.
__device__ __forceinline__ u32 select_bits(u32 mask, u32 a, u32 b) { u32 d; asm("lop3.b32 %0,%1,%2,%3,0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b)); return d; }

// Parities of the sets of a group's bits, for the 8 groups of a word. Few shifts go right: those to the
// left are multiplications, which have a pipe of their own.
__device__ __forceinline__ void features(u32* f, u32 x) {
  const u32 before = select_bits(0xeeeeeeee, x << 1, x >> 3), second = select_bits(0xcccccccc, x << 2, x >> 2);
  f[0] = x;
  f[1] = x ^ before;
  f[2] = x ^ before ^ second;
  f[3] = x ^ second ^ ((before ^ x << 3) & 0x88888888); }

// Sign words of tokens 8 (first + i) + g, i = 0 and 1, channels 128 step + 32 j ... Two at once, so that
// they meet their other features in one run of registers without copies.
__device__ __forceinline__ void load_signs(u32* a, u32 record, int first, int step, int lane) {
#if D == 128
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(record + (8 * first + (lane & 15)) * CODE));
#else
#pragma unroll
  for (int i = 0; i < 2; i++)   // words past the head meet zero planes
    a[i] = load_shared(record + (8 * (first + i) + (lane >> 2)) * CODE + min(step * 4 + (lane & 3), R - 1) * 4);
#endif
}

// Keys of a block's tokens and their histogram, those of pages in scratch memory moved to where the ring was
// if they fit; ends with a barrier.
template <int WARPS>
__device__ __forceinline__ void score_row(const Params& p, const Block& block, SelectMemory<WARPS>& m, PageReader<WARPS>& reader, QueryMemory& query,
                                          const KeyPlaces& keys, u8* resident, u8* scratch) {
  const int lane = __shfl_sync(~0u, threadIdx.x, threadIdx.x) & 31, w = threadIdx.x >> 5, g = lane >> 2, j = lane & 3;
  u32 plane[STEPS][2][FEATURES];   // of this column's bit in the lower and in the upper bytes
#pragma unroll
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int byte = 0; byte < 2; byte++)
#pragma unroll
      for (int f = 0; f < FEATURES; f++) plane[step][byte][f] = step * 4 + j < R ? query.planes[byte * 8 + g][f][step * 4 + j] : 0;
  // What a count in this lane's four columns stands for; bit 15 counts negative.
  int values[4] = {1 << 2 * j, 2 << 2 * j, 256 << 2 * j, j == 3 ? -(512 << 6) : 512 << 2 * j};
#pragma unroll
  for (int i = 0; i < 4; i++) asm volatile("" : "+r"(values[i]));   // products, not shifts
  // Keys of tokens leave out bin 0, and one at both ends for rounding. 2^23 makes integers the lower bits.
  constexpr int FIRST_KEY = FINE_BINS + 1, LAST_KEY = BINS * FINE_BINS - 2;
  const float slope = (float)(LAST_KEY - FIRST_KEY) / (float)max(query.range, 1), start = 8388608.f + FIRST_KEY - (float)query.least * slope;
  for (int n = 0; n < reader.mine; n++) {
    const u32 record = reader.ring.wait(n);
    reader.fetch(n + 1);
    const int tokens = load_shared(record + SLOT - 16) >> 24;
    const int page = n * WARPS + w;
    u16* to = (u16*)((page < p.resident ? resident : scratch) + (i64)page * CHUNK_BYTES);
#pragma unroll
    for (int q = 0; q < 4; q++) {
      int lower[2][4], upper[2][4];
      const int zero[4] = {0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
          u32 a[2], x[FEATURES], y[FEATURES];
          load_signs(a, record, 4 * q + 2 * t, step, lane);
          features(x, a[0]);
          features(y, a[1]);
#pragma unroll
          for (int f = 0; f < FEATURES; f += 2) {
            const u32 *low = plane[step][0] + f, *up = plane[step][1] + f;
            binary_mma(lower[t], x[f], y[f], x[f + 1], y[f + 1], low[0], low[1], step || f ? lower[t] : zero);
            binary_mma(upper[t], x[f], y[f], x[f + 1], y[f + 1], up[0], up[1], step || f ? upper[t] : zero);
          }
        }
      int sum[4];   // of this lane's columns, tokens 8 (4 q + i) + g
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int *lo = lower[i / 2] + i % 2 * 2, *up = upper[i / 2] + i % 2 * 2;
        sum[i] = lo[0] * values[0] + lo[1] * values[1] + up[0] * values[2] + up[1] * values[3];
      }
      // Of the four, lane j gets the j-th, over all columns.
      const bool high = j & 2, odd = j & 1;
      const int x = (high ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, high ? sum[0] : sum[2], 2);
      const int y = (high ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, high ? sum[1] : sum[3], 2);
      const int score = (odd ? y : x) + __shfl_xor_sync(~0u, odd ? x : y, 1);
      const int token = 8 * (4 * q + j) + g;
      const u32 key = token < tokens ? __float_as_uint(fmaf((float)score, slope, start)) & 0x7fff : 0;
      to[token] = (u16)key;
      atomicAdd(&m.histogram[key >> FINE_BITS], 1u);
    }
    __syncwarp();   // the slot may be filled again
  }
  reader.ring.close(lane);
  __syncthreads();
  if (threadIdx.x == 0) m.histogram[0] = 0;   // what does not exist
  if (!p.ring_keys || block.pages <= p.resident) return;
  constexpr int BATCH = 4;   // loads under way
  for (int first = p.resident + w; first < block.pages; first += WARPS * BATCH) {
    uint2 own[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) own[i] = *(const uint2*)(scratch + (i64)min(first + i * WARPS, block.pages - 1) * CHUNK_BYTES + lane * 8);
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i * WARPS < block.pages) *(uint2*)(keys.at(first + i * WARPS) + lane * 8) = own[i];
  }
  __syncthreads();
}
