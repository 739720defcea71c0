// Encoding, one block a page and KV head, one pass over K and V. A warp keeps its tokens in registers,
// channel = 32 r + lane; bits are collected by votes. What a preset does with a page is `encode_page`.
constexpr int ENCODE_WARPS = D == 256 ? 16 : 8, OWN = PAGE / ENCODE_WARPS;

struct EncodeParams {
  const void *keys, *values;                        // [n, H, PAGE, D], last dimension contiguous; of paged ones, of token 0 of block 0
  i64 key_page, key_head, key_token;                // strides in elements
  i64 value_page, value_head, value_token;
  const int* counts;                                // [n]
  const float* constants;                           // [1 or n, H, CONSTANTS]
  i64 constants_row;
  const int* blocks;                                // [n]: where a page goes, negative for nowhere; or null, one behind the other
  u8 *index, *payload;                              // [N, strides]
  i64 index_stride, payload_stride, index_bytes, payload_bytes;
  int heads;
};

// Tokens that lie in the blocks of a serving engine: position p of page n is in block table[n][p / block].
struct PagedTokens {
  const int* table;                                 // [n, columns], or fewer of every row
  const int* first;                                 // [n]: position of a page's first token
  int columns, block;
};

// Bits 0..15 of a and b interleaved: a in even places.
__device__ __forceinline__ u32 interleave(u32 a, u32 b) {
  a = (a | a << 8) & 0x00ff00ff; b = (b | b << 8) & 0x00ff00ff;
  a = (a | a << 4) & 0x0f0f0f0f; b = (b | b << 4) & 0x0f0f0f0f;
  a = (a | a << 2) & 0x33333333; b = (b | b << 2) & 0x33333333;
  a = (a | a << 1) & 0x55555555; b = (b | b << 1) & 0x55555555;
  return a | b << 1; }
__device__ __forceinline__ u32 pick(const u32* words, int i) {
  u32 v = words[0];
#pragma unroll
  for (int r = 1; r < R; r++) v = i == r ? words[r] : v;
  return v; }
// A token's 2-bit codes from the votes on their bits: word of 16 channels a lane.
__device__ __forceinline__ void store_crumbs(u8* to, const u32* low, const u32* high, int lane) {
  if (lane < D / 16) {
    const int shift = (lane & 1) * 16;
    *(u32*)(to + lane * 4) = interleave(pick(low, lane >> 1) >> shift & 0xffff, pick(high, lane >> 1) >> shift & 0xffff);
  } }
__device__ __forceinline__ void store_bits(u8* to, const u32* bits, int lane) { if (lane < R) *(u32*)(to + lane * 4) = pick(bits, lane); }

// After the last head of a page: its count, and zeros, so that equal tokens give equal bytes. By all
// threads of the block of the first head.
__device__ __forceinline__ void end_page(const EncodeParams& p, u8* index, u8* payload, int count) {
  if (threadIdx.x == 0) *(int*)(index + (i64)p.heads * INDEX_RECORD) = count;
  for (i64 i = (i64)p.heads * INDEX_RECORD + 4 + threadIdx.x; i < p.index_bytes; i += ENCODE_WARPS * 32) index[i] = 0;
  for (i64 i = (i64)p.heads * PAYLOAD_RECORD + threadIdx.x; i < p.payload_bytes; i += ENCODE_WARPS * 32) payload[i] = 0;
}

// Where the tokens of a warp are, in elements from the first key and value.
struct StridedSource {
  const EncodeParams& p;
  int n, h, first;

  __device__ __forceinline__ i64 key(int i) const { return n * p.key_page + h * p.key_head + (first + i) * p.key_token; }
  __device__ __forceinline__ i64 value(int i) const { return n * p.value_page + h * p.value_head + (first + i) * p.value_token; }
};
struct PagedSource {
  i64 place;                                        // of the token of this lane

  __device__ __forceinline__ i64 key(int i) const { return __shfl_sync(~0u, place, i); }
  __device__ __forceinline__ i64 value(int i) const { return key(i); }
};

// Encode `count` tokens of page n and head h into a block of the pools; by all threads.
template <class Source>
__device__ void encode_page(const EncodeParams& p, const Source& source, int n, int h, int block, int count);

constexpr int AT_A_TIME = D == 256 || D == 96 ? 1 : 2;   // blocks on a multiprocessor

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, AT_A_TIME) encode(const __grid_constant__ EncodeParams p) {
  const int n = blockIdx.x / p.heads, h = blockIdx.x % p.heads, block = p.blocks ? p.blocks[n] : n;
  if (block < 0) return;
  encode_page(p, StridedSource{p, n, h, (int)threadIdx.x / 32 * OWN}, n, h, block, max(0, min(p.counts[n], PAGE)));
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, AT_A_TIME) encode_paged(const __grid_constant__ EncodeParams p, const __grid_constant__ PagedTokens tokens) {
  const int n = blockIdx.x / p.heads, h = blockIdx.x % p.heads, block = p.blocks[n];
  if (block < 0) return;
  const int count = max(0, min(p.counts[n], PAGE)), lane = threadIdx.x & 31, t = threadIdx.x / 32 * OWN + lane;
  PagedSource source = {0};
  if (lane < OWN && t < count) {
    const int position = tokens.first[n] + t;
    const i64 where = tokens.table[(i64)n * tokens.columns + position / tokens.block];
    source.place = where * p.key_page + h * p.key_head + position % tokens.block * p.key_token;
  }
  encode_page(p, source, n, h, block, count);
}
